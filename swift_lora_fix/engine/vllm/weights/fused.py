"""Fused mode: the engine's own weights become the trainer's with the adapter folded in, W + s*B*A.

The formula and its error bound are in policy/merging.py. The base push was watched, so it is known where in the engine
each weight lies: there W is overwritten by W + s*B*A. A weight that vLLM did not copy unchanged (a layout for some
kernel) has no known region. Then all weights go through ms-swift's and vLLM's own weight loading at each sync, one
tensor at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch

from ....common.clock import Clock
from ....common.digest import checksum, combine
from ....common.log import info, warning
from ....common.ranks import ranks_agree
from ....errors import UnsupportedAdapterError
from ....policy import adapter as adapters
from ....policy.adapter import Adapter
from ....policy.merging import MergedModule, Values
from ...port import WriteReport
from ..finite import FiniteCheck
from ..handle import EngineHandle
from ..kernels.replay import Replayed
from ..slots.staging import Staging, host_digest
from ..watch import Region
from . import folding
from .base import Pushed

Reload = Callable[[Collection[str], Callable[[str], torch.Tensor]], "set[str]"]


@dataclass(frozen=True)
class Placed:
    """One region of one of the engine's weights, and what should be there. Valid until the next one.

    rounded: the expected bits, computed as they are written.
    value: the same in float32, before rounding.
    plain: the base weight.
    """

    source: str
    region: Region
    rounded: torch.Tensor
    plain: torch.Tensor
    _values: Callable[[], dict[str, torch.Tensor]]

    @property
    def destination(self) -> torch.Tensor:
        return self.region.destination

    @cached_property
    def value(self) -> torch.Tensor:
        return self.region.region(self._values()[self.source])


class FusedWriter:
    """Writes the trainer's merged weights into one engine, at each sync. ``device`` is the trainer's.

    reload: sends the model with other values for the named parameters, see ``base.reload``.
    regions: where each of the trainer's parameters lies in the engine; None when the weights go through
        ``load_weights``, so that their regions are unknown.
    """

    def __init__(
        self,
        engine: EngineHandle,
        adapter: Adapter,
        modules: Sequence[MergedModule],
        device: torch.device,
        reload: Reload,
    ) -> None:
        self.engine, self.adapter, self.modules, self.device = engine, adapter, tuple(modules), device
        self.changing = frozenset(source for module in modules for source in module.sources)
        self.regions: dict[str, tuple[Region, ...]] | None = None
        self._audited: list[int] | None = None  # checksums at ``note_audited``
        self._reload = reload
        self._intact = False
        self._report = WriteReport("none")
        self._digests: torch.Tensor | None = None  # on the device: by chunk of the adapter that was written
        self._staging: Staging | None = None
        self._dtype = next(p.dtype for p in engine.model.parameters() if p.is_floating_point())
        self._check = FiniteCheck(adapter, self._dtype, device, self.all_ranks)
        self._folding = folding.of(device)
        self._folded: dict[int, MergedModule] = {}  # by id: those that the kernel writes
        self._replayed = Replayed(self._write_folded, device)
        self._digest_replayed = Replayed(self._digest, device)

    @property
    def place(self) -> str:
        """Where the adapter ends up, in words for the log."""
        if self.regions is None:
            return "vLLM's load_weights, folded in"
        return f"engine's weights, folded in at {sum(map(len, self.regions.values()))} proved places"

    def dtype_of(self, source: str) -> torch.dtype:
        """The dtype that the engine holds this parameter in."""
        return self.regions[source][0].destination.dtype if self.regions else self._dtype

    def all_ranks(self, fine: bool) -> bool:
        """Whether ``fine`` is true on all ranks that hold a part of this adapter."""
        return fine if self.adapter.sharding == "none" else ranks_agree(fine, self.device)

    def is_current(self) -> bool:
        """Whether nothing is known to have changed the engine's weights since the last write."""
        return self._intact

    def forget(self) -> None:
        """The engine slept: what it holds is unknown now."""
        self._intact = False

    def accept(self) -> None:
        """The engine's weights were compared and are what was written."""
        self._intact = True

    @property
    def is_known(self) -> bool:
        """Whether the weights' regions in the engine are known."""
        return self.regions is not None

    def note_audited(self) -> None:
        """The sync's audit has just run: remember checksums of the engine's weights as they are now."""
        self._audited = self._engine_checksums()

    @property
    def is_audited(self) -> bool:
        """Whether ``note_audited`` was called since the last write."""
        return self._audited is not None

    def engine_changed(self) -> bool:
        """Whether the engine's weights differ from those at ``note_audited``. Does not read the trainer."""
        return self._audited is not None and self._audited != self._engine_checksums()

    @torch.no_grad()
    def _engine_checksums(self) -> list[int]:
        assert self.regions is not None
        sums = [checksum(region.destination) for regions in self.regions.values() for region in regions]
        return torch.stack(sums).tolist()

    def accept_base(self, pushed: Pushed) -> None:
        """Called while the engine holds the trainer's plain base: learn where each weight lies, and prove it.

        Raises UnsupportedAdapterError when vLLM computed other tensors from a weight that the adapter changes: they
        would stay those of the plain base.
        """
        if not self.all_ranks(not pushed.derived):
            names = ", ".join(sorted(pushed.derived)[:2]) or "weights of another rank"
            raise UnsupportedAdapterError(
                f"vLLM makes another tensor out of {names}, "
                f"which would not follow the adapter that is folded in: use {self.adapter.words.with_lora} in adapter "
                "mode, or train without this module."
            )
        self._folded = {}
        self._replayed.forget()
        problem = self._missing(pushed)
        if self.all_ranks(problem is None):
            problem = self._misplaced(pushed)
        if self.all_ranks(problem is None):
            self.regions = pushed.regions
            if self._folded:
                info(f"fused mode: a kernel, proved against float64, folds {len(self._folded)} of {len(self.modules)}.")
        else:
            self.regions = None
            warning(
                "fused mode: the merged weights go through vLLM's own load_weights at each sync, which is slower: "
                f"{problem or 'another rank cannot write them in place'}."
            )

    def _missing(self, pushed: Pushed) -> str | None:
        missing = sorted(self.changing - pushed.regions.keys())
        if missing:
            return f"vLLM did not copy {missing[0]} as it is ({len(missing)} of {len(self.changing)} weights)"
        return None

    @torch.no_grad()
    def _misplaced(self, pushed: Pushed) -> str | None:
        """Why a region does not hold its weight, or None. No rank stops early: each module is all-gathered."""
        found: list[str] = []
        alive = {p.untyped_storage().data_ptr() for p in self.engine.model.parameters()}
        for module in self.modules:
            with self.whole(module) as whole:
                # ms-swift sends current values of modules_to_save and biases, but the base weight W of a LoRA layer
                sent = module.plain_values(whole) if module.is_lora else module.values(whole)
                for source in module.sources:
                    for region in pushed.regions[source]:
                        destination = region.destination
                        if destination.untyped_storage().data_ptr() not in alive:
                            found.append(f"vLLM moved what it had loaded of {source}")
                        elif not torch.equal(region.region(sent[source]).to(destination.dtype), destination):
                            found.append(f"the engine does not hold {source} where vLLM had copied it")
                if not found and self._kernel_accepts(module, whole, pushed):
                    self._folded[id(module)] = module
        return found[0] if found else None

    def _kernel_accepts(self, module: MergedModule, whole: Values, pushed: Pushed) -> bool:
        factors = module.factors(whole)
        regions = [region for source in module.sources for region in pushed.regions[source]]
        return factors is not None and all(self._folding.accepts(factors, region) for region in regions)

    def begin_validation(self) -> None:
        """Start the checks of ``validate`` on the device. The trainer's values must not change until ``validate``."""
        self._check.begin([parameter.data_ptr() for parameter in self.adapter.parameters])

    def validate(self) -> None:
        """Before the first byte is written. Raises NonFiniteAdapterError; the engine then keeps the previous policy."""
        self._check.finish()

    def write(self, keep_views: bool = True) -> WriteReport:
        """Write the trainer's current merged weights into the engine. ``finish`` waits for the device."""
        clock = Clock()
        self._intact, self._audited = False, None
        if self.adapter.sharding == "none":
            self._digests = self._digest_replayed.run([p.data_ptr() for p in self.adapter.parameters])
        else:
            self._digests = self._digest()
        clock.lap("digest")
        path = "fused" if self.regions is not None else "reload"
        written = self._write_all(merged=True)
        if not keep_views:
            for replayed in (self._check.replayed, self._replayed, self._digest_replayed):
                replayed.forget()
        self._intact = True
        clock.lap("write")
        self._report = WriteReport(path, clock.laps, written)
        return self._report

    def finish(self) -> None:
        """Wait until the engine holds what was written: vLLM may generate on another stream."""
        assert self._digests is not None, "write() comes first"
        self._report.digest = combine(self._digests.tolist())
        self._wait()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def digest_of(self, held: dict[str, torch.Tensor]) -> str:
        """The policy digest of whole CPU values by PEFT key: of the trainer's adapter itself, unscaled, in float32."""
        return host_digest(self.adapter, held, torch.float32, fold=False)

    def placed(self, part: int = 0, parts: int = 1) -> Iterator[Placed]:
        """Yield each region and what it should hold, computed from the trainer now: of all modules, or of every
        ``parts``-th from ``part`` on. A collective for a sharded trainer."""
        assert self.regions is not None, "only a plan tells where the weights lie"
        for module in self.modules[part::parts]:
            with self.whole(module) as whole:
                values, plain = cache(partial(module.values, whole)), module.plain_values(whole)
                for source, region, write in self._parts(module, whole, True, values):
                    rounded = torch.empty_like(region.destination)
                    write(rounded)
                    yield Placed(source, region, rounded, region.region(plain[source]), values)

    def expected(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """``(value, rounded, plain)`` of each whole weight that the adapter changes, from the trainer alone; value is
        float32. A collective for a sharded trainer."""
        for module in self.modules:
            with self.whole(module) as whole:
                plain, values = module.plain_values(whole), module.values(whole)
                held = module.rounded(values, whole, self.dtype_of)
                for source, value in values.items():
                    yield value, held[source], plain[source]

    def held(self, module: MergedModule, whole: Values) -> dict[str, torch.Tensor]:
        """The module's merged weights, whole, as the engine holds them, by source."""
        factors = module.factors(whole) if id(module) in self._folded else None
        if factors is not None:
            (source,) = module.sources
            destination = torch.empty_like(factors.w, dtype=self.dtype_of(source))
            if self._folding.write_whole(factors, destination):
                return {source: destination}
        return module.rounded(module.values(whole), whole, self.dtype_of)

    @contextlib.contextmanager
    def plain_base(self) -> Iterator[None]:
        """Inside, the engine holds exactly the model without the adapter; afterwards the trainer's policy again."""
        self._intact = False
        try:
            self.write_plain()
            yield
        finally:
            self._write_all(merged=True)
            self._wait()
        self._intact = True

    def write_plain(self) -> None:
        """Make the engine hold exactly the model without the adapter."""
        self._write_all(merged=False)
        self._wait()

    @torch.no_grad()
    def _write_all(self, merged: bool) -> int:
        """Write every changing weight, with the adapter or without. Returns the bytes written."""
        if self.regions is None:
            return self._write_through_load_weights(merged)
        replayed = merged and self.adapter.sharding == "none"
        if replayed and self._folded:
            self._replayed.run([p.data_ptr() for module in self._folded.values() for p in module.parameters.values()])
        for module in self.modules:
            if not (replayed and id(module) in self._folded):
                self._write_module(module, merged)
        return sum(_bytes(region.destination) for regions in self.regions.values() for region in regions)

    def _write_folded(self) -> None:
        """Reads only the trainer's own parameters and allocates no tensor, so that a CUDA graph can replay it."""
        for module in self._folded.values():
            self._write_module(module, merged=True)

    def _write_module(self, module: MergedModule, merged: bool) -> None:
        with self.whole(module) as whole:
            for _, region, write in self._parts(module, whole, merged, partial(module.values, whole)):
                write(region.destination)

    def _parts(
        self, module: MergedModule, whole: Values, merged: bool, values: Callable[[], dict[str, torch.Tensor]]
    ) -> Iterator[tuple[str, Region, Callable[[torch.Tensor], Any]]]:
        """For each region of the module: its source, the region, and a function that writes it to a given tensor.
        values: computes the merged ones, in float32."""
        assert self.regions is not None
        factors = module.factors(whole) if merged and id(module) in self._folded else None
        held = cache(lambda: module.rounded(values(), whole, self.dtype_of) if merged else module.plain_values(whole))
        for source in module.sources:
            for region in self.regions[source]:
                if factors is not None:
                    yield source, region, partial(self._folding.write, factors, region)
                else:
                    yield source, region, partial(_copy_region, held, source, region)

    def _write_through_load_weights(self, merged: bool) -> int:
        owner = {source: module for module in self.modules for source in module.sources}
        written = 0

        def value_of(source: str) -> torch.Tensor:
            nonlocal written
            with self.whole(owner[source]) as whole:
                module = owner[source]
                if merged:
                    value = module.rounded(module.values(whole), whole, self.dtype_of)[source]
                else:
                    value = module.plain_values(whole)[source].to(self.dtype_of(source))
            written += value.numel() * value.element_size()
            return value

        sent = self._reload(self.changing, value_of)
        if sent != self.changing:
            missing = sorted(self.changing - sent)
            raise RuntimeError(f"ms-swift did not send {missing[0]} ({len(missing)} of {len(self.changing)} weights)")
        return written

    @contextlib.contextmanager
    def whole(self, module: MergedModule) -> Iterator[dict[str, torch.Tensor]]:
        """Whole values of the module's parameters, by their names in it. Valid only inside."""
        with adapters.whole([*module.parameters.values()], self.adapter.sharding, self.device) as values:
            yield {name: value.detach() for name, value in zip(module.parameters, values)}

    @torch.no_grad()
    def _digest(self) -> torch.Tensor:
        if self._staging is None:
            self._staging = Staging(self.adapter, torch.float32, self.device)
        checksums = []
        for chunk in self.adapter.chunks:
            with adapters.whole_values(self.adapter, chunk, self.device) as values:
                self._staging.fill(chunk, values, fold=False)
                checksums.append(self._staging.checksum(chunk))
        return torch.stack(checksums)


def _copy_region(
    values: Callable[[], dict[str, torch.Tensor]], source: str, region: Region, destination: torch.Tensor
) -> None:
    destination.copy_(region.region(values()[source]))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
