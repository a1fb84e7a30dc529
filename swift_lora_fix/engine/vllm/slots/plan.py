"""The write plan: where each part of each LoRA tensor goes in vLLM's slots, learnt by watching vLLM load one adapter.

vLLM itself does the packing (qkv, gate/up), the tensor-parallel slicing and the name mapping. Nothing here knows a
layer's name or layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Callable

import torch

from ....policy.adapter import Adapter, AdapterEntry, Chunk
from ..handle import EngineHandle
from ..watch import CopyRecorder, Region


class PlanError(Exception):
    """vLLM's loading cannot be replayed. The message says which module and why; the caller falls back to the loader."""


@dataclass(frozen=True)
class Copy(Region):
    """One copy that vLLM made of an entry's tensor into a slot buffer, in the LoRA dtype."""

    entry: AdapterEntry

    @property
    def is_whole(self) -> bool:
        """Whether the region is the whole entry, in its own memory layout."""
        whole = torch.empty(self.entry.shape, device="meta")
        return self.destination.shape == whole.shape and self.offset == 0 and self.stride == whole.stride()


@dataclass(frozen=True)
class Plan:
    """copies: by chunk of the adapter, in its order. slots: whole slot rows, which vLLM zeroes before it writes."""

    copies: tuple[tuple[Chunk, tuple[Copy, ...]], ...]
    slots: tuple[torch.Tensor, ...]
    index: int

    @property
    def bytes_written(self) -> int:
        return sum(c.destination.numel() * c.destination.element_size() for _, copies in self.copies for c in copies)

    def versions(self) -> tuple[int, ...]:
        """PyTorch's in-place version counters of the slots: any write changes them."""
        return tuple([slot._version for slot in self.slots])


def signature(adapter: Adapter, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Values to learn and prove a plan with: random, so that no two regions are alike (a new lora_B is all zero)."""
    generator = torch.Generator().manual_seed(0)
    return {e.key: torch.randn(e.shape, generator=generator).to(dtype) for e in adapter.entries}


def learn(adapter: Adapter, staged: dict[str, torch.Tensor], engine: EngineHandle, load: Callable[[], None]) -> Plan:
    """Run ``load``, which has vLLM load ``staged`` by its own path, and return the copies that vLLM made.

    Raises PlanError when an entry was not copied, or was transformed into another tensor first.
    """
    with CopyRecorder(staged) as recorder:
        load()
    entries = {entry.key: entry for entry in adapter.entries}
    by_entry: dict[str, list[Copy]] = {}
    for key, destination, offset, stride in recorder.copies:
        by_entry.setdefault(key, []).append(Copy(destination, offset, stride, entries[key]))
    missing = [entry.key for entry in adapter.entries if entry.key not in by_entry]
    if missing:
        raise PlanError(f"vLLM does not copy {missing[0]} as it is ({len(missing)} of {len(entries)} tensors)")
    index = engine.slot_index()
    if index is None:
        raise PlanError("vLLM did not put the adapter into a LoRA slot")
    dtype = {copy.destination.dtype for found in by_entry.values() for copy in found}
    cleared = tuple(slot for slot in recorder.cleared if slot.dtype in dtype)
    if not cleared:
        raise PlanError("vLLM did not clear its LoRA slots, so what they hold besides the adapter is unknown")
    if any(slot.is_inference() for slot in cleared):
        raise PlanError("vLLM's LoRA slots are inference tensors, which do not tell when they are written to")
    copies = tuple(
        (chunk, tuple(copy for entry in chunk.entries for copy in by_entry[entry.key])) for chunk in adapter.chunks
    )
    return Plan(copies, cleared, index)


def prove(
    plan: Plan, staged_source: dict[str, torch.Tensor], write: Callable[[Chunk, Sequence[Copy], Any], Any]
) -> None:
    """Replay the plan from ``staged_source`` over zeroed slots and compare each region with what vLLM's loader wrote.

    write: ``write(chunk, copies, values)`` writes one chunk's copies from whole values on the engine's device. The
    comparison is bit for bit, because both paths scale in fp32 and round once. Raises PlanError naming the module.
    """
    for chunk, copies in plan.copies:
        expected = [copy.destination.clone() for copy in copies]
        for copy in copies:
            copy.destination.zero_()
        device = copies[0].destination.device
        write(chunk, copies, [staged_source[entry.key].to(device) for entry in chunk.entries])
        for copy, value in zip(copies, expected):
            if not torch.equal(copy.destination, value):
                raise PlanError(f"replaying {copy.entry.key} gives other values than vLLM's loader wrote")
            copy.destination.zero_()
    for slot in plan.slots:
        if bool(slot.any()):
            raise PlanError("vLLM's loader wrote to a LoRA slot what no recorded copy explains")
