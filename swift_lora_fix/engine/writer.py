"""How the adapter gets into the engine: straight into vLLM's LoRA slots once a plan is proved, else through its loader.

The loader (loader.py) is the slow twin: the plan is learnt and proved against it, and whatever the plan does not cover
goes through it for the rest of the run, after one warning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import adapter as adapters
from ..adapter import Adapter
from ..errors import NonFiniteAdapterError
from ..log import info, warning
from . import loader, plan
from .handle import EngineHandle
from .replay import Replayed


@dataclass
class WriteReport:
    """What one write did: ``path`` is ``direct`` or ``loader``; seconds by stage; bytes put into the slots."""

    path: str
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_written: int = 0


class AdapterWriter:
    """Writes one trainer's adapter into one engine, again and again. ``device`` is the trainer's."""

    def __init__(
        self, engine: EngineHandle, adapter: Adapter, request_class: Any, device: torch.device, direct: bool = True
    ) -> None:
        self.engine, self.adapter, self.request_class, self.device = engine, adapter, request_class, device
        self.wants_plan = direct
        self.plan: plan.Plan | None = None
        self.slots_are_intact = False  # nothing happened to the slots since the last write (no sleep, no reload)
        self.written_versions: tuple[int, ...] | None = None
        self._check = _FiniteCheck(adapter, engine.lora_dtype, device, self.everywhere)
        self._calls: list[ForeachCall] = []  # over the live parameters, where they are not sharded
        self._replayed = Replayed(lambda: _run(self._calls), device)

    def is_current(self) -> bool:
        """Whether the slots still hold what was written last: nobody wrote to them since, no sleep in between."""
        return self.plan is None or (self.slots_are_intact and self.written_versions == self.plan.versions())

    def forget_slots(self) -> None:
        """The engine slept: what the slots hold is unknown, unused rank rows included."""
        self.slots_are_intact = False

    def validate(self) -> None:
        """Before the first byte is written. Raises NonFiniteAdapterError: the engine then keeps the previous policy."""
        self._check.run(self._pointers())

    def write(self, keep_views: bool = True) -> WriteReport:
        """Make the engine serve the trainer's adapter as it is now. On a GPU the last copies may still be running when
        this returns: ``finish`` waits for them.

        keep_views: views of the live parameters may be kept for the next write; not where the trainer offloads them,
            which a view would keep from being freed.
        """
        clock = _Clock()
        if self.plan is None and self.wants_plan:
            self._learn()
            clock.lap("plan")
        if self.plan is not None and self.engine.slot_index() == self.plan.index:
            return self._write_direct(self.plan, keep_views, clock)
        if self.plan is not None:
            self._give_up("the adapter was taken out of its slot")
        return self._write_through_loader(clock)

    def finish(self) -> None:
        """Wait until the slots hold what was written: vLLM may generate on another stream."""
        if self.plan is not None and self.plan.slots[0].is_cuda:
            torch.cuda.current_stream(self.plan.slots[0].device).synchronize()

    def _write_direct(self, plan_: plan.Plan, keep_views: bool, clock: _Clock) -> WriteReport:
        with torch.no_grad():
            if not self.slots_are_intact:
                torch._foreach_zero_(list(plan_.slots))
            if self.adapter.sharding == "none":
                self._write_live(plan_, keep_views)
            else:
                for chunk, copies in plan_.copies:
                    with adapters.whole_values(self.adapter, chunk, self.device) as values:
                        write_copies(copies, values)
        self.slots_are_intact, self.written_versions = True, plan_.versions()
        clock.lap("write")
        return WriteReport("direct", clock.laps, plan_.bytes_written)

    def _write_live(self, plan_: plan.Plan, keep_views: bool) -> None:
        """Foreach calls over the live parameters, made once while the parameters' storage stays where it is."""
        pointers = self._pointers()
        # what is not contiguous is copied to be read, and that copy must not outlive this write
        keep_views = keep_views and all(parameter.is_contiguous() for parameter in self.adapter.parameters)
        if self._replayed.key != pointers:
            calls = [call for chunk, copies in plan_.copies for call in foreach_calls(copies, chunk.parameters)]
            self._calls = _merge_unscaled(calls)
        self._replayed.run(pointers)
        if not keep_views:
            self._calls = []
            self._replayed.forget()
            self._check.replayed.forget()

    def _pointers(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.adapter.parameters]

    def _write_through_loader(self, clock: _Clock) -> WriteReport:
        held = adapters.read_to_host(self.adapter, self.device)
        staged = loader.stage(self.adapter, held, self.engine.lora_dtype)
        clock.lap("read")
        loader.load(self.engine, self.adapter, staged, self.request_class)
        clock.lap("write")
        return WriteReport("loader", clock.laps, sum(t.numel() * t.element_size() for t in staged.values()))

    def _learn(self) -> None:
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
            failure = None
        except plan.PlanError as error:
            failure = str(error)
        if not self.everywhere(failure is None):  # ranks that gather together must go the same way
            self._give_up(failure or "another rank cannot replay vLLM's loading")
            return
        # vLLM keeps the staged tensors as its copy of the adapter: let that be a policy of this run
        for key, value in loader.stage(self.adapter, adapters.read_to_host(self.adapter, self.device), dtype).items():
            staged[key].copy_(value)
        self.plan, self.slots_are_intact = learnt, False
        copies = sum(len(copies) for _, copies in learnt.copies)
        info(f"the adapter goes straight into vLLM's LoRA slots: {copies} copies, proved against vLLM's own loader.")

    def everywhere(self, fine: bool) -> bool:
        """Whether it is fine on all ranks that hold parts of this adapter."""
        if self.adapter.sharding == "none":
            return fine
        flag = torch.tensor(int(fine), device=self.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
        return bool(flag)

    def _give_up(self, why: str) -> None:
        self.plan, self.wants_plan = None, False
        self._calls = []
        self._replayed.forget()
        warning(f"the adapter goes through vLLM's own loader for the rest of this run: {why}.")


@dataclass(frozen=True, eq=False)
class ForeachCall:
    """One batch of copies: regions of the source values to destinations, times ``scales`` (None: all 1) in fp32."""

    destinations: list[torch.Tensor]
    regions: list[torch.Tensor]
    scales: list[float] | None
    dense: bool  # both sides contiguous


def write_copies(copies: Sequence[plan.Copy], values: Sequence[torch.Tensor]) -> None:
    """Write the copies of one chunk from its whole values: A cast, B scaled in fp32 and then cast, in foreach calls."""
    _run(foreach_calls(copies, values))


def foreach_calls(copies: Sequence[plan.Copy], values: Sequence[torch.Tensor]) -> list[ForeachCall]:
    """Batches of the copies of one chunk. One strided tensor would slow a whole foreach call: they go apart."""
    value_of = dict(zip(dict.fromkeys(id(copy.entry) for copy in copies), values))
    batches: dict[tuple[bool, bool], list[plan.Copy]] = {}
    for copy in copies:
        batches.setdefault((copy.is_dense, copy.entry.scale != 1.0), []).append(copy)
    return [
        ForeachCall(
            [copy.destination for copy in batch],
            [copy.region(value_of[id(copy.entry)].contiguous()) for copy in batch],
            [copy.entry.scale for copy in batch] if scaled else None,
            dense,
        )
        for (dense, scaled), batch in batches.items()
    ]


def _merge_unscaled(calls: list[ForeachCall]) -> list[ForeachCall]:
    """Unscaled copies need no memory for a product: all dense ones go in one call, whatever their chunk."""
    plain = [call for call in calls if call.scales is None and call.dense]
    merged = ForeachCall([d for c in plain for d in c.destinations], [r for c in plain for r in c.regions], None, True)
    return [merged, *(call for call in calls if call not in plain)] if plain else calls


def _run(calls: list[ForeachCall]) -> None:
    for call in calls:
        regions = call.regions
        if call.scales is not None:
            regions = torch._foreach_mul([r if r.dtype == torch.float32 else r.float() for r in regions], call.scales)
        torch._foreach_copy_(call.destinations, regions)


class _FiniteCheck:
    """One fused check that every value is finite, also once it is scaled and cast to the LoRA dtype."""

    def __init__(
        self, adapter: Adapter, dtype: torch.dtype, device: torch.device, everywhere: Callable[[bool], bool]
    ) -> None:
        self.adapter, self.dtype, self.everywhere = adapter, dtype, everywhere
        self.scales = torch.tensor([entry.scale for entry in adapter.entries])
        self.replayed = Replayed(self._check, device)

    def _check(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For each entry whether it is fine, false for NaN and for infinity; and whether all are. On the device."""
        peaks = torch.stack(torch._foreach_norm(adapters.local_parts(self.adapter), float("inf"))).float()
        good = peaks * self.scales <= torch.finfo(self.dtype).max
        return good, good.all()

    @torch.no_grad()
    def run(self, pointers: list[int]) -> None:
        """Raise NonFiniteAdapterError naming the tensors. Sharded: each rank checks its own part, all raise or none.

        pointers: of the parameters; what is not sharded is checked in place while they stay the same.
        """
        self.scales = self.scales.to(adapters.local_parts(self.adapter)[0].device)
        good, all_good = self.replayed.run(pointers) if self.adapter.sharding == "none" else self._check()
        if not self.everywhere(bool(all_good)):
            bad = [entry.key for entry, fine in zip(self.adapter.entries, good.tolist()) if not fine]
            raise NonFiniteAdapterError(
                f"The trainer's adapter has values that are not finite in {self.dtype}: "
                f"{', '.join(bad[:4]) or 'on another rank'}{' ...' if len(bad) > 4 else ''} ({len(bad)} tensors). "
                "Nothing was written: the engine keeps the previous policy. Lower the learning rate, or resume from a "
                "checkpoint before the divergence."
            )


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
