"""The two ways in which the engine serves an adapter, as the gate needs to know them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ..engine.vllm.handle import EngineHandle
from ..engine.vllm.weights.fused import FusedWriter
from ..policy import adapter as adapters
from ..policy.adapter import Adapter
from ..policy.merging import MergedModule, twin_of
from ..server.trainer.remote import RemoteEngine


class Apart:
    """Base and adapter apart, in vLLM's LoRA layers. Nothing is rounded that the trainer does not round too.

    copies: how often a probe is asked, so that each engine gets all of it.
    """

    rounds, copies = False, 1

    def __init__(self, engine: EngineHandle, adapter: Adapter) -> None:
        self._engine, self._adapter = engine, adapter

    @contextlib.contextmanager
    def engine_without_adapter(self) -> Iterator[None]:
        """ms-swift's engine adds its LoRA request to rollouts while ``enable_lora`` is true (grpo_vllm_engine.py)."""
        engine = self._engine.engine
        before = engine.enable_lora
        engine.enable_lora = False
        try:
            yield
        finally:
            engine.enable_lora = before

    def trainer_without_adapter(self) -> contextlib.AbstractContextManager[None]:
        return adapters.scaled(self._adapter, 0.0)

    def trainer_as_rounded(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Served(Apart):
    """The same in rollout servers."""

    def __init__(self, engine: RemoteEngine, adapter: Adapter) -> None:
        self._servers, self._adapter = engine, adapter
        # ms-swift's client gives each server its share of the requests, one after the other
        self.copies = len(engine.servers.urls) if engine.servers is not None else 1

    @contextlib.contextmanager
    def engine_without_adapter(self) -> Iterator[None]:
        with self._servers.plain():
            yield


class Fused:
    """The adapter folded into the engine's weights, which are rounded once more than the trainer's."""

    copies = 1

    def __init__(self, engine: EngineHandle, writer: FusedWriter) -> None:
        self._engine, self._writer = engine, writer
        # FSDP2 gathers within ``standing_in``; which experts run differs from rank to rank: they would wait for ever
        experts = any(".experts." in module.path for module in writer.modules)
        self.rounds = not (experts and writer.adapter.sharding == "fsdp2")

    @contextlib.contextmanager
    def engine_without_adapter(self) -> Iterator[None]:
        try:
            with self._writer.plain_base():
                self._engine.reset_caches()
                yield
        finally:
            self._engine.reset_caches()

    def trainer_without_adapter(self) -> contextlib.AbstractContextManager[None]:
        if not self.rounds:
            return adapters.scaled(self._writer.adapter, 0.0)
        return standing_in(self._writer, merged=False)

    def trainer_as_rounded(self) -> contextlib.AbstractContextManager[None]:
        """The trainer computing with the weights that the engine should hold, one module's at a time."""
        return standing_in(self._writer, merged=True)


@contextlib.contextmanager
def standing_in(writer: FusedWriter, merged: bool) -> Iterator[None]:
    """The trainer's model with plain layers in place of PEFT's: of the base's weights, or of the merged ones, rounded
    as the engine rounds them. Only ``forward`` of single modules is shadowed; their parameters stay."""
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
        for source, value in module.values(whole).items() if merged else ():
            name = module.sent[source]
            values[name] = value.to(writer.dtype_of(source)).to(whole[name].dtype)
        twin = twin_of(module.module.get_submodule(inner), values, f"{inner}.")
        output: torch.Tensor = twin.forward(*args, **kwargs)
    return output
