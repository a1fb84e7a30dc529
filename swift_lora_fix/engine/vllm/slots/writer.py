"""Writes the adapter into the engine: straight into vLLM's LoRA slots once a plan is proved, else through its loader.

The loader (loader.py) is the reference: the plan is learnt from it and proved against it. What no plan covers goes
through the loader for the rest of the run, after one warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ....common.clock import Clock
from ....common.digest import combine
from ....common.log import info, warning
from ....common.ranks import ranks_agree
from ....policy import adapter as adapters
from ....policy.adapter import Adapter, Chunk
from ...port import WriteReport
from ..finite import FiniteCheck
from ..handle import EngineHandle
from ..kernels.replay import Replayed
from . import loader, plan
from .staging import Staging, checksum_of, copy_all, covers_entries, host_digest, regions


class AdapterWriter:
    """Writes one adapter into one engine's LoRA slots, at each sync.

    device: where the adapter's values are. direct: learn a plan; otherwise vLLM's own loader writes each time.
    """

    def __init__(
        self, engine: EngineHandle, adapter: Adapter, request_class: Any, device: torch.device, direct: bool = True
    ) -> None:
        self.engine, self.adapter, self.request_class, self.device = engine, adapter, request_class, device
        self.wants_plan = direct
        self.plan: plan.Plan | None = None
        self.slots_are_intact = False  # no sleep or reload since the last write
        self.written_versions: tuple[int, ...] | None = None
        # by chunk, checksums of what the slots were given, last and the time before; None without a plan
        self.expected: list[int] | None = None
        self.previous: list[int] | None = None
        self._report = WriteReport("none")
        self._checksums: torch.Tensor | None = None  # on the device, a row a chunk: see ``_stage``
        self._staging: Staging | None = None
        self._check = FiniteCheck(adapter, engine.lora_dtype, device, self.all_ranks)
        self._write_replayed = Replayed(self._write_live, device)
        self._read_replayed = Replayed(self._read_slots, device)

    def is_current(self) -> bool:
        """Whether the slots still hold the last write: no later write, no sleep in between. True without a plan."""
        return self.plan is None or (self.slots_are_intact and self.written_versions == self.plan.versions())

    @property
    def place(self) -> str:
        """Where the adapter ends up, in words for the log."""
        return "engine's LoRA slots" if self.plan is not None else "vLLM's loader"

    def what_is_missing(self) -> str | None:
        """Why the adapter cannot be served, or None."""
        return self.engine.what_is_missing()

    def digest_of(self, held: dict[str, torch.Tensor]) -> str:
        """The policy digest of whole CPU values by PEFT key: the adapter as the engine should hold it."""
        return host_digest(self.adapter, held, self.engine.lora_dtype)

    def accept(self) -> None:
        """The slots were read back and hold what they should, whoever wrote to them last."""
        if self.plan is not None:
            self.slots_are_intact, self.written_versions = True, self.plan.versions()

    def forget(self) -> None:
        """The engine slept: what the slots hold is unknown, including rows beyond the adapter's rank."""
        self.slots_are_intact = False

    def begin_validation(self) -> None:
        """Start the checks of ``validate`` on the device. The trainer's values must not change until ``validate``."""
        self._check.begin(self._pointers())

    def validate(self) -> None:
        """Before the first byte is written. Raises NonFiniteAdapterError; the engine then keeps the previous policy."""
        self._check.finish()

    def write(self, keep_views: bool = True) -> WriteReport:
        """Make the engine serve the trainer's current adapter. On a GPU the last copies may still run when this
        returns: ``finish`` waits for them.

        keep_views: whether views of the live parameters may be kept for the next write. Not if the trainer offloads
        them:
            a view would keep their device memory from being freed.
        """
        clock = Clock()
        self._checksums = None
        if self.plan is None and self.wants_plan:
            self._learn()
            clock.lap("plan")
        if self.plan is not None and self.engine.slot_index() != self.plan.index:
            self._give_up("the adapter was taken out of its slot")
        write = self._write_direct if self.plan is not None else self._write_through_loader
        self._report = write(keep_views, clock)
        return self._report

    def write_by_reference(self) -> WriteReport:
        """The same, this once through vLLM's own loader even with a plan. Later writes use the plan again."""
        if self.plan is None:
            return self.write()
        clock = Clock()
        self._report = self._write_through_loader(True, clock)
        if self.engine.slot_index() != self.plan.index:
            self._give_up("vLLM's loader put the adapter into another slot")
        if self.plan is not None:  # expected checksums: of what a direct write would stage
            with torch.no_grad():
                self._checksums = torch.stack(
                    [self._stage(chunk, copies, values) for chunk, copies, values in self._walk(self.plan)]
                )
            self.slots_are_intact, self.written_versions = True, self.plan.versions()
        return self._report

    def finish(self) -> None:
        """Wait until the slots hold what was written: vLLM may generate on another stream."""
        if self._checksums is not None:
            rows = self._checksums.tolist()
            self._report.digest = combine(row[0] for row in rows)
            self.previous, self.expected = self.expected, [row[1] for row in rows]
        if self.plan is not None and self.plan.slots[0].is_cuda:
            torch.cuda.current_stream(self.plan.slots[0].device).synchronize()

    @torch.no_grad()
    def read_back(self) -> list[int]:
        """Checksums of what the slots hold now, to compare with ``expected``. Needs a plan."""
        assert self.plan is not None, "only a plan tells where the adapter lies"
        return self._read_replayed.run([id(self.plan)]).tolist()

    @torch.no_grad()
    def are_finite(self) -> bool:
        """Whether the slots hold neither NaN nor infinity. Needs a plan."""
        assert self.plan is not None, "only a plan tells where the adapter lies"
        return all(bool(torch.isfinite(slot).all()) for slot in self.plan.slots)

    @torch.no_grad()
    def clear(self) -> None:
        """Fill the slots with zeros. Needs a plan."""
        assert self.plan is not None, "only a plan tells where the adapter lies"
        for slot in self.plan.slots:
            slot.zero_()

    def adapted_parameters(self) -> set[str]:
        """Names of the engine's base parameters whose layers hold a part of the adapter; empty without a plan."""
        if self.plan is None:
            return set()
        written = {
            copy.destination.untyped_storage().data_ptr()
            for _, copies in self.plan.copies
            for copy in copies
            if copy.entry.is_b
        }
        return {
            f"{name}.base_layer.weight"
            for name, module in self.engine.model.named_modules()
            for slot in getattr(module, "lora_b_stacked", ())
            if slot.untyped_storage().data_ptr() in written
        }

    def staged(self) -> Iterator[tuple[Sequence[plan.Copy], list[torch.Tensor]]]:
        """Yield ``(copies, regions)`` by chunk: the places in the slots, and what they should hold, staged from the
        trainer now. Valid until the next chunk. A collective for a sharded trainer.
        """
        assert self.plan is not None
        for chunk, copies, values in self._walk(self.plan):
            with torch.no_grad():
                yield copies, regions(copies, chunk, self._stage_values(chunk, values))

    def _write_direct(self, keep_views: bool, clock: Clock) -> WriteReport:
        assert self.plan is not None
        with torch.no_grad():
            if not self.slots_are_intact:
                torch._foreach_zero_(list(self.plan.slots))
            if self.adapter.sharding == "none":
                self._checksums = self._write_replayed.run(self._pointers())
            else:
                self._checksums = torch.stack([self._write_chunk(*step) for step in self._walk(self.plan)])
        if not keep_views:
            self._write_replayed.forget()
            self._check.replayed.forget()
        self.slots_are_intact, self.written_versions = True, self.plan.versions()
        clock.lap("write")
        return WriteReport("direct", clock.laps, self.plan.bytes_written)

    def _write_live(self) -> torch.Tensor:
        assert self.plan is not None
        return torch.stack([self._write_chunk(*step) for step in self._walk(self.plan)])

    def _walk(self, plan_: plan.Plan) -> Any:
        for chunk, copies in plan_.copies:
            with adapters.whole_values(self.adapter, chunk, self.device) as values:
                yield chunk, copies, values

    def _write_chunk(self, chunk: Chunk, copies: Sequence[plan.Copy], values: Sequence[torch.Tensor]) -> torch.Tensor:
        checksums = self._stage(chunk, copies, values)
        assert self._staging is not None
        copy_all([copy.destination for copy in copies], regions(copies, chunk, self._staging.entries(chunk)))
        return checksums

    def _stage(self, chunk: Chunk, copies: Sequence[plan.Copy], values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Stage the chunk. Returns the checksums of its whole entries and of this rank's part of them: (2,) int64."""
        views = self._stage_values(chunk, values)
        assert self._staging is not None
        whole = self._staging.checksum(chunk)
        parts = whole if covers_entries(copies, chunk) else checksum_of(regions(copies, chunk, views))
        return torch.stack([whole, parts])

    def _stage_values(self, chunk: Chunk, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self._staging is None:
            assert self.plan is not None
            self._staging = Staging(self.adapter, self.engine.lora_dtype, self.plan.slots[0].device)
        return self._staging.fill(chunk, values)

    def _read_slots(self) -> torch.Tensor:
        assert self.plan is not None
        return torch.stack([checksum_of([copy.destination for copy in copies]) for _, copies in self.plan.copies])

    def _pointers(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.adapter.parameters]

    def _write_through_loader(self, keep_views: bool, clock: Clock) -> WriteReport:
        held = adapters.read_to_host(self.adapter, self.device)
        staged = loader.stage(self.adapter, held, self.engine.lora_dtype)
        digest = host_digest(self.adapter, staged, self.engine.lora_dtype, fold=False)
        clock.lap("read")
        loader.load(self.engine, self.adapter, staged, self.request_class)
        clock.lap("write")
        return WriteReport("loader", clock.laps, sum(t.numel() * t.element_size() for t in staged.values()), digest)

    def _learn(self) -> None:
        """Learn a plan by watching vLLM load random values, and prove it. On failure the loader is used for good."""
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
            self._staging = Staging(self.adapter, dtype, learnt.slots[0].device)
            plan.prove(learnt, values, self._write_chunk)
            failure = None
        except plan.PlanError as error:
            failure = str(error)
        if not self.all_ranks(failure is None):  # they all-gather together, so all must take the same path
            self._give_up(failure or "another rank cannot replay vLLM's loading")
            return
        # vLLM keeps the staged tensors as its copy of the adapter: replace the random values by the real ones
        for key, value in loader.stage(self.adapter, adapters.read_to_host(self.adapter, self.device), dtype).items():
            staged[key].copy_(value)
        self.plan, self.slots_are_intact = learnt, False
        copies = sum(len(copies) for _, copies in learnt.copies)
        info(f"the adapter goes straight into vLLM's LoRA slots: {copies} copies, proved against vLLM's own loader.")

    def all_ranks(self, fine: bool) -> bool:
        """Whether ``fine`` is true on all ranks that hold a part of this adapter."""
        return fine if self.adapter.sharding == "none" else ranks_agree(fine, self.device)

    def _give_up(self, why: str) -> None:
        self.plan, self.wants_plan, self._staging = None, False, None
        self.expected = self.previous = self._checksums = None
        self._write_replayed.forget()
        self._read_replayed.forget()
        warning(f"the adapter goes through vLLM's own loader for the rest of this run: {why}.")
