"""The writers of a colocated vLLM engine: adapter mode (in vLLM's LoRA layers) and fused mode (in its weights)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from ...common.clock import Clock
from ...errors import CacheResetError, EngineStateError
from ...policy import adapter as adapters
from ...policy.adapter import Adapter
from ...policy.merging import MergedModule, twin_of
from ...trainer import TrainerPort
from ..port import ServingPort, WriteReport
from .fitting import check_fits
from .handle import EngineHandle
from .slots.staging import host_digest
from .slots.writer import AdapterWriter
from .weights import base, held
from .weights.fused import FusedWriter


class AdapterModeWriter:
    """Sends the base once and the adapter at each sync. Raises UnsupportedAdapterError if vLLM cannot apply it."""

    mode: ClassVar[Literal["adapter", "fused"]] = "adapter"
    keeps_base = True
    weights = None

    def __init__(self, trainer: TrainerPort, engine: EngineHandle, adapter: Adapter, direct: bool) -> None:
        check_fits(adapter, engine)
        self.trainer, self.engine, self.adapter = trainer, engine, adapter
        self.slots = AdapterWriter(engine, adapter, trainer.adapter_request_class, trainer.device, direct)
        self.serving: ServingPort = AdapterServing(trainer, engine, adapter)
        self._held: base.BaseRecord | None = None  # of a base that cannot be sent
        self._pushed: base.Pushed | None = None

    @property
    def place(self) -> str:
        return self.slots.place

    def all_ranks(self, fine: bool) -> bool:
        return self.slots.all_ranks(fine)

    def begin_validation(self) -> None:
        self.slots.begin_validation()

    def validate(self) -> None:
        self.engine.check_idle()
        self.slots.validate()

    def send_base(self, straight: bool = False) -> base.BaseRecord:
        if not held.is_held(self.engine):
            before = self._pushed if straight else None
            self._pushed = base.push(self.trainer, self.engine, self.adapter, before=before)
            return self._pushed.record
        if self._held is None:
            self._held = held.prove(self.trainer, self.engine, self.adapter)
        lost = self._held.engine_differences()
        if lost:
            raise EngineStateError(
                f"The engine's quantised base is not what it loaded any more ({', '.join(lost[:4])}), and cannot be "
                "sent again: restart the run. With sleep level 2 an engine loses it: use level 1."
            )
        return self._held

    def write(self) -> WriteReport:
        keep_views = not self.trainer.offloads_model
        return _finished(self.engine, self.slots.write(keep_views), self.slots.finish)

    def write_by_reference(self) -> WriteReport:
        return _finished(self.engine, self.slots.write_by_reference(), self.slots.finish)

    def digest_of(self, held: dict[str, torch.Tensor]) -> str:
        return host_digest(self.adapter, held, self.engine.lora_dtype)

    def what_is_missing(self) -> str | None:
        return self.engine.what_is_missing()

    def is_current(self) -> bool:
        return self.slots.is_current()

    def adapted_parameters(self) -> set[str]:
        return self.slots.adapted_parameters()


class FusedModeWriter:
    """Writes the base with the adapter folded in over the engine's weights."""

    mode: ClassVar[Literal["adapter", "fused"]] = "fused"
    keeps_base = False  # only a push shows where the weights lie
    slots = None

    def __init__(
        self, trainer: TrainerPort, engine: EngineHandle, adapter: Adapter, modules: Sequence[MergedModule]
    ) -> None:
        self.trainer, self.engine, self.adapter = trainer, engine, adapter
        reload = partial(base.reload, trainer, engine, adapter)
        self.weights = FusedWriter(engine, adapter, modules, trainer.device, reload)
        self.serving: ServingPort = FusedServing(engine, self.weights)
        self._pushed: base.Pushed | None = None

    @property
    def place(self) -> str:
        return self.weights.place

    def all_ranks(self, fine: bool) -> bool:
        return self.weights.all_ranks(fine)

    def begin_validation(self) -> None:
        self.weights.begin_validation()

    def validate(self) -> None:
        self.engine.check_idle()
        self.weights.validate()

    def send_base(self, straight: bool = False) -> base.BaseRecord:
        """Straight without the weights that change: they are written right after it, where the push has proved them."""
        before = self._pushed if straight else None
        pushed = base.push(self.trainer, self.engine, self.adapter, self.weights.changing, before)
        if pushed is not before:
            self.weights.accept_base(pushed)
            self._pushed = replace(pushed, can_repeat=pushed.can_repeat and self.weights.is_known)
        return pushed.record

    def write(self) -> WriteReport:
        keep_views = not self.trainer.offloads_model
        return _finished(self.engine, self.weights.write(keep_views), self.weights.finish)

    def write_by_reference(self) -> WriteReport:
        """The caller has just pushed the base through vLLM's own loading, which proves the regions again."""
        return self.write()

    def digest_of(self, held: dict[str, torch.Tensor]) -> str:
        """Digest of the trainer's adapter itself, unscaled, in float32."""
        return host_digest(self.adapter, held, torch.float32, fold=False)

    def what_is_missing(self) -> str | None:
        if self.trainer.attaches_adapter:
            return "rollouts would add a LoRA request on top of the merged weights (engine.enable_lora)"
        return None

    def is_current(self) -> bool:
        return self.weights.is_current()

    def adapted_parameters(self) -> set[str]:
        return set()  # the adapter is in the weights, not in LoRA layers


def _finished(engine: EngineHandle, report: WriteReport, finish: Callable[[], None]) -> WriteReport:
    """Reset the caches of the previous policy while the last copies run, then wait for the copies."""
    clock = Clock()
    engine.reset_caches()
    clock.lap("caches")
    finish()
    clock.lap("wait")
    report.seconds.update(clock.laps)
    return report


class AdapterServing:
    """vLLM's LoRA layers apply the adapter. The engine rounds nothing that the trainer does not round too."""

    rounds, copies = False, 1
    stand_ins: Collection[torch.nn.Module] = ()

    def __init__(self, trainer: TrainerPort, engine: EngineHandle, adapter: Adapter) -> None:
        self._trainer, self._adapter = trainer, adapter
        self.reset_caches: Callable[[], None] | None = engine.reset_caches
        self.abort_unfinished: Callable[[], None] | None = engine.abort_unfinished
        self.dtype: torch.dtype | None = engine.dtype

    @contextlib.contextmanager
    def engine_without_adapter(self) -> Iterator[None]:
        before = self._trainer.attaches_adapter
        self._trainer.attach_adapter(False)
        try:
            yield
        finally:
            self._trainer.attach_adapter(before)

    def trainer_without_adapter(self) -> contextlib.AbstractContextManager[None]:
        return adapters.scaled(self._adapter, 0.0)

    def trainer_as_rounded(self) -> contextlib.AbstractContextManager[None]:
        raise AssertionError("nothing is rounded here")


class FusedServing:
    """The adapter is folded into the engine's weights, which are therefore rounded once more than the trainer's."""

    copies = 1

    def __init__(self, engine: EngineHandle, writer: FusedWriter) -> None:
        self._writer = writer
        self.reset_caches: Callable[[], None] | None = engine.reset_caches
        self.abort_unfinished: Callable[[], None] | None = engine.abort_unfinished
        self.dtype: torch.dtype | None = engine.dtype
        # ``standing_in`` all-gathers under FSDP2; ranks route to different experts, so these all-gathers would deadlock
        experts = any(".experts." in module.path for module in writer.modules)
        self.rounds = not (experts and writer.adapter.sharding == "fsdp2")
        wrapped = [module.module for module in writer.modules if module.inner is not None]
        self.stand_ins: Collection[torch.nn.Module] = set(wrapped) if self.rounds else ()

    @contextlib.contextmanager
    def engine_without_adapter(self) -> Iterator[None]:
        assert self.reset_caches is not None
        try:
            with self._writer.plain_base():
                self.reset_caches()
                yield
        except Exception as error:
            try:
                self.reset_caches()
            except CacheResetError as second:  # an engine that failed keeps its requests, so this fails too
                before = f"The engine had failed before: {type(error).__name__}: {error}"
                raise CacheResetError(f"{second} {before}") from error
            raise
        self.reset_caches()

    def trainer_without_adapter(self) -> contextlib.AbstractContextManager[None]:
        if not self.rounds:
            return adapters.scaled(self._writer.adapter, 0.0)
        return standing_in(self._writer, merged=False)

    def trainer_as_rounded(self) -> contextlib.AbstractContextManager[None]:
        """The trainer computes with the weights that the engine should hold, merged for one module at a time."""
        return standing_in(self._writer, merged=True)


@contextlib.contextmanager
def standing_in(writer: FusedWriter, merged: bool) -> Iterator[None]:
    """Make the trainer's model compute with plain layers in place of PEFT's: with the base weights, or with the merged
    ones rounded as in the engine. Only ``forward`` of single modules is shadowed; their parameters stay."""
    wrapped = [module for module in writer.modules if module.inner is not None]
    before = [vars(module.module).get("forward") for module in wrapped]
    for module in wrapped:
        vars(module.module)["forward"] = partial(_forward, writer, module, merged)
    try:
        yield
    finally:
        for module, forward in zip(wrapped, before):
            if forward is None:
                del vars(module.module)["forward"]
            else:
                vars(module.module)["forward"] = forward


def _forward(writer: FusedWriter, module: MergedModule, merged: bool, *args: Any, **kwargs: Any) -> torch.Tensor:
    inner = module.inner if merged else module.inner_plain
    assert inner is not None
    with writer.whole(module) as whole:
        values = dict(whole)
        for source, value in (writer.held(module, whole) if merged else {}).items():
            name = module.sent[source]
            values[name] = value.to(whole[name].dtype)
        twin = twin_of(module.module.get_submodule(inner), values, f"{inner}.")
        output: torch.Tensor = twin.forward(*args, **kwargs)
    return output
