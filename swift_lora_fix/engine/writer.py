"""How the adapter gets into the engine: straight into vLLM's LoRA slots once a plan is proved, else through its loader.

The loader (loader.py) is the slow twin: the plan is learnt and proved against it, and whatever the plan does not cover
goes through it for the rest of the run, after one warning.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import adapter as adapters
from ..adapter import Adapter
from ..errors import NonFiniteAdapterError
from ..log import info, warning
from . import loader, plan
from .handle import EngineHandle


@dataclass
class WriteReport:
    """What one write did: ``path`` is ``direct`` or ``loader``; seconds by stage; bytes put into the slots."""

    path: str
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_written: int = 0


class AdapterWriter:
    """Writes one trainer's adapter into one engine, again and again."""

    def __init__(self, engine: EngineHandle, adapter: Adapter, request_class: Any, direct: bool = True) -> None:
        self.engine, self.adapter, self.request_class = engine, adapter, request_class
        self.wants_plan = direct
        self.plan: plan.Plan | None = None
        self.slots_are_intact = False  # nothing happened to the slots since the last write (no sleep, no reload)
        self.written_versions: tuple[int, ...] | None = None
        self._check = _FiniteCheck(adapter, engine.lora_dtype)
        self._sources = _SourceCache()

    def is_current(self) -> bool:
        """Whether the slots still hold what was written last: nobody wrote to them since, no sleep in between."""
        return self.plan is None or (self.slots_are_intact and self.written_versions == self.plan.versions())

    def forget_slots(self) -> None:
        """The engine slept: what the slots hold is unknown, unused rank rows included."""
        self.slots_are_intact = False

    def validate(self, trainer: Any) -> None:
        """Before the first byte is written. Raises NonFiniteAdapterError: the engine then keeps the previous policy."""
        self._check.run(trainer)

    def write(self, trainer: Any) -> WriteReport:
        """Make the engine serve the trainer's adapter as it is now."""
        clock = _Clock()
        if self.plan is None and self.wants_plan:
            self._learn(trainer)
            clock.lap("plan")
        if self.plan is not None and self.engine.slot_index() == self.plan.index:
            return self._write_direct(trainer, self.plan, clock)
        if self.plan is not None:
            self._give_up("the adapter was taken out of its slot")
        return self._write_through_loader(trainer, clock)

    def _write_direct(self, trainer: Any, plan_: plan.Plan, clock: _Clock) -> WriteReport:
        if not self.slots_are_intact:
            torch._foreach_zero_(list(plan_.slots))
        # Gathered values live only inside the loop; a kept view would also pin what the trainer offloads.
        live = not adapters.is_sharded(self.adapter, trainer) and not getattr(trainer, "enable_offload", False)
        for index, (chunk, copies) in enumerate(plan_.copies):
            with adapters.whole_values(chunk, trainer) as values:
                calls = self._sources.of(index, copies, values) if live else source_views(copies, values)
                _run(calls)
        synchronize_device(plan_.slots[0])
        self.slots_are_intact, self.written_versions = True, plan_.versions()
        clock.lap("write")
        return WriteReport("direct", clock.laps, plan_.bytes_written)

    def _write_through_loader(self, trainer: Any, clock: _Clock) -> WriteReport:
        held = adapters.read_to_host(self.adapter, trainer)
        staged = loader.stage(self.adapter, held, self.engine.lora_dtype)
        clock.lap("read")
        loader.load(self.engine, self.adapter, staged, self.request_class)
        clock.lap("write")
        return WriteReport("loader", clock.laps, sum(t.numel() * t.element_size() for t in staged.values()))

    def _learn(self, trainer: Any) -> None:
        """Learn a plan from vLLM loading random values, prove it with them; on failure the loader it is, for good."""
        dtype = self.engine.lora_dtype
        values = plan.signature(self.adapter, dtype)
        staged = loader.stage(self.adapter, values, dtype, pinned=torch.cuda.is_available())
        try:
            learnt = plan.learn(
                self.adapter,
                staged,
                self.engine,
                lambda: loader.load(self.engine, self.adapter, staged, self.request_class),
            )
            plan.prove(learnt, values, write_copies)
        except plan.PlanError as error:
            self._give_up(str(error))
            return
        # vLLM keeps the staged tensors as its copy of the adapter: let that be a policy of this run
        for key, value in loader.stage(self.adapter, adapters.read_to_host(self.adapter, trainer), dtype).items():
            staged[key].copy_(value)
        self.plan, self.slots_are_intact = learnt, False
        copies = sum(len(copies) for _, copies in learnt.copies)
        info(f"the adapter goes straight into vLLM's LoRA slots: {copies} copies, proved against vLLM's own loader.")

    def _give_up(self, why: str) -> None:
        self.plan, self.wants_plan = None, False
        self._sources = _SourceCache()
        warning(f"the adapter goes through vLLM's own loader for the rest of this run: {why}.")


def write_copies(copies: Sequence[plan.Copy], values: Sequence[torch.Tensor]) -> None:
    """Write the copies of one chunk from its whole values: A cast, B scaled in fp32 and then cast, in foreach calls."""
    _run(source_views(copies, values))


def _run(calls: list[list[Any]]) -> None:
    for destinations, regions, scales in calls:
        if scales is not None:
            regions = torch._foreach_mul([r if r.dtype == torch.float32 else r.float() for r in regions], scales)
        torch._foreach_copy_(destinations, regions)


def source_views(copies: Sequence[plan.Copy], values: Sequence[torch.Tensor]) -> list[list[Any]]:
    """[destinations, regions of the values, scales or None] of each foreach call."""
    entries: dict[int, torch.Tensor] = {}
    for copy in copies:
        if id(copy.entry) not in entries:
            entries[id(copy.entry)] = values[len(entries)].contiguous()
    calls: list[list[Any]] = []
    for part in plan.strided_apart(copies):
        for scaled in (False, True):
            chosen = [copy for copy in part if (copy.entry.scale != 1.0) is scaled]
            if chosen:
                regions = [copy.region(entries[id(copy.entry)]) for copy in chosen]
                scales = [copy.entry.scale for copy in chosen] if scaled else None
                calls.append([[copy.destination for copy in chosen], regions, scales])
    return calls


def synchronize_device(tensor: torch.Tensor) -> None:
    """Wait for the writes: vLLM may generate on another stream."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


class _SourceCache:
    """Views of the live parameters, kept while their storage stays where it is."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[list[int], list[list[Any]]]] = {}

    def of(self, index: int, copies: Sequence[plan.Copy], values: Sequence[torch.Tensor]) -> list[list[Any]]:
        pointers = [value.data_ptr() for value in values]
        if index not in self.kept or self.kept[index][0] != pointers:
            self.kept[index] = (pointers, source_views(copies, values))
        return self.kept[index][1]


class _FiniteCheck:
    """One fused check that every value is finite, also once it is scaled and cast to the LoRA dtype."""

    def __init__(self, adapter: Adapter, dtype: torch.dtype) -> None:
        self.adapter, self.limit = adapter, torch.finfo(dtype).max
        self.scales: torch.Tensor | None = None

    @torch.no_grad()
    def run(self, trainer: Any) -> None:
        """Raise NonFiniteAdapterError naming the tensors. Sharded: each rank checks its own part, all raise or none."""
        local = adapters.shards(self.adapter)
        peaks = torch.stack(torch._foreach_norm([t if t.numel() else t.new_zeros(1) for t in local], float("inf")))
        if self.scales is None or self.scales.device != peaks.device:
            self.scales = torch.tensor([entry.scale for entry in self.adapter.entries], device=peaks.device)
        good = peaks.float() * self.scales <= self.limit  # false for NaN and for infinity
        all_good = good.all()
        if adapters.is_sharded(self.adapter, trainer):
            flag = all_good.int().to(trainer.accelerator.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
            all_good = flag.bool()
        if not bool(all_good):
            bad = [entry.key for entry, fine in zip(self.adapter.entries, good.tolist()) if not fine]
            raise NonFiniteAdapterError(
                f"The trainer's adapter has values that are not finite in {self.engine_dtype}: "
                f"{', '.join(bad[:4]) or 'on another rank'}{' ...' if len(bad) > 4 else ''} ({len(bad)} tensors). "
                "Nothing was written: the engine keeps the previous policy. Lower the learning rate, or resume from a "
                "checkpoint before the divergence."
            )

    @property
    def engine_dtype(self) -> str:
        return {torch.finfo(d).max: str(d) for d in (torch.float16, torch.bfloat16, torch.float32)}[self.limit]


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
