"""Read-back audits: compare the bits in the engine's memory with what was staged from the trainer.

Each sync leaves checksums of what it staged. Before the next rollout the slots are summed in place, and the checksums
are compared. Only if they differ are single tensors compared, to say which differ and how. Fused weights have no such
checksums: what they should be is computed from the trainer again and compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..common.digest import checksum
from ..engine.port import BasePort, SlotsPort, WeightsPort
from .causes import Finding

ADAPTER = "read-back audit of the adapter"
BASE = "read-back audit of the base"
MERGED = "read-back audit of the merged weights"


def adapter(slots: SlotsPort, trainer_is_here: bool = True, ranks_are_here: bool = True) -> Finding | None:
    """Compare the LoRA slots with what the last sync staged for them. None when they are equal, or when vLLM's own
    loader wrote them and no plan tells where.

    trainer_is_here: the trainer's LoRA is on its device, so that single tensors can be compared.
    ranks_are_here: all ranks of a sharded trainer call this together.
    """
    if slots.expected is None:
        return None
    held = slots.read_back()
    same = held == slots.expected
    if slots.all_ranks(same) if ranks_are_here else same:
        return None
    if same:
        return Finding("unknown", ADAPTER, "another rank's slots differ")
    if held == slots.previous:
        return Finding("stale", ADAPTER, "the slots hold, bit for bit, what the sync before the last one wrote")
    if not trainer_is_here or (slots.adapter.sharding != "none" and not ranks_are_here):
        cause = "slots-changed" if slots.are_finite() else "not-finite"
        return Finding(cause, ADAPTER, f"{_differing(held, slots.expected)} parts of the adapter differ")
    return _by_tensor(slots)


@dataclass(frozen=True)
class Rounding:
    """lost_share: 1 - <W' - W, dW> / <dW, dW> over all merged weights, W' being W + dW as the engine holds it and dW
    the adapter's update: the share of the update that does not arrive, beyond what is chance in it (two standard
    errors). 0 to 1, as a rule. None while the update is zero."""

    lost_share: float | None


class _Lost:
    """Collects sums, on the device."""

    def __init__(self) -> None:
        self.lost: list[torch.Tensor] = []
        self.squares: list[torch.Tensor] = []
        self.added: list[torch.Tensor] = []

    def add(self, value: torch.Tensor, rounded: torch.Tensor, plain: torch.Tensor) -> None:
        update = value.float() - plain.float()
        lost = (value.float() - rounded.float()).mul_(update)
        self.lost.append(lost.sum(dtype=torch.float64))
        self.squares.append(lost.square_().sum(dtype=torch.float64))
        self.added.append(update.square_().sum(dtype=torch.float64))

    def rounding(self) -> Rounding:
        lost, squares, added = (float(torch.stack(s).sum()) for s in (self.lost, self.squares, self.added))
        return Rounding(max(lost - 2 * math.sqrt(squares), 0.0) / added if added else None)


@torch.no_grad()
def rounding(weights: WeightsPort) -> Rounding:
    """What rounding would lose now, computed from the trainer alone. A collective for a sharded trainer."""
    lost = _Lost()
    for value, rounded, plain in weights.expected():
        lost.add(value, rounded, plain)
    return lost.rounding()


@torch.no_grad()
def merged(weights: WeightsPort, part: int = 0, parts: int = 1) -> tuple[Finding | None, Rounding | None]:
    """Compare the engine's merged weights, of each ``parts``-th module from ``part`` on, with what they should be,
    computed from the trainer again. If all modules are compared, also say what rounding loses. (None, None) when the
    weights go through ``load_weights``, so that their regions are unknown. A collective for a sharded trainer."""
    if not weights.is_known:
        return None, None
    same, lost = [], _Lost()
    for placed in weights.placed(part, parts):
        rounded = placed.rounded
        same.append((rounded == placed.destination).all())
        if parts == 1:
            lost.add(placed.value, rounded, placed.plain)
    if not same or not weights.all_ranks(bool(torch.stack(same).all())):
        return (_by_weight(weights, part, parts) if same else None), None
    return None, lost.rounding() if parts == 1 else None


def _by_weight(weights: WeightsPort, part: int, parts: int) -> Finding:
    kinds: dict[str, list[str]] = {}
    total = 0
    for placed in weights.placed(part, parts):
        total += 1
        kind, detail = _compare_merged(placed)
        if kind:
            kinds.setdefault(kind, []).append(placed.source + detail)
    names = [name for found in kinds.values() for name in found]
    if not names:
        return Finding("unknown", MERGED, "another rank's weights differ")
    evidence = f"{len(names)} of {total} weights differ: {_some(names)}"
    (kind, found), *others = sorted(kinds.items(), key=lambda item: -len(item[1]))
    most = len(found) * 2 >= total and total > 1
    if others or kind == "other":
        return Finding("not-finite" if "not-finite" in kinds else "weights-changed", MERGED, evidence)
    cause = {
        "plain": "not-applied" if most else "weights-changed",
        "doubled": "double-count" if most else "module-doubled",
    }
    return Finding(cause.get(kind, kind), MERGED, evidence)


def _compare_merged(placed: Any) -> tuple[str, str]:
    held, value = placed.destination, placed.value.float()
    if torch.equal(placed.rounded, held):
        return "", ""
    if not bool(torch.isfinite(held).all()):
        return "not-finite", ""
    if torch.equal(placed.plain.to(held.dtype), held):
        return "plain", " holds the plain base"
    added = value - placed.plain.float()
    again = held.float() - value  # a second adapter on top is the update again, and two roundings
    share = float((again * added).sum() / added.square().sum())
    noise = (placed.rounded.float() - value).norm()
    if abs(share - 1) < 0.1 and (again - added).norm() < 0.1 * added.norm() + 2 * noise:
        return "doubled", ""
    return "other", ""


def base(record: BasePort, adapted: set[str], trainer_is_here: bool = True) -> Finding | None:
    """Compare the engine's base, in its packed layout, and the trainer's base with what was pushed.

    adapted: names of the engine's parameters in layers with a LoRA. If just these differ, an adapter was merged there.
    """
    changed = record.engine_differences()
    if changed:
        every = record.parameters
        evidence = f"{len(changed)} of the engine's {every} parameters differ: {_some(changed)}"
        if set(changed) == adapted and len(changed) > 1:
            return Finding("double-count", BASE, f"{evidence}; just those of the layers that have a LoRA")
        return Finding("base-replaced" if len(changed) > max(1, every // 2) else "base-changed", BASE, evidence)
    changed = record.trainer_differences() if trainer_is_here else []
    if changed:
        evidence = f"{len(changed)} parameters of the trainer differ: {_some(changed)}"
        return Finding("trainer-base-changed", BASE, evidence)
    return None


def _by_tensor(slots: SlotsPort) -> Finding:
    """Which modules differ, and how. Sharded trainers all-gather for it, so all ranks come here together."""
    owner: dict[int, str] = {}
    for copies, parts in slots.staged():
        for copy, part in zip(copies, parts):
            if bool(part.any()):
                owner.setdefault(int(checksum(part)), copy.entry.key)
    kinds: dict[str, list[str]] = {}
    total = zero_b = 0
    for copies, parts in slots.staged():
        for copy, part in zip(copies, parts):
            total += 1
            kind, detail = _compare(copy.destination, part, owner)
            if kind:
                kinds.setdefault(kind, []).append(copy.entry.key + detail)
            zero_b += copy.entry.is_b and kind == "zero"
    return _summary(kinds, total, zero_b)


def _compare(held: torch.Tensor, part: torch.Tensor, owner: dict[int, str]) -> tuple[str, str]:
    if torch.equal(held, part):
        return "", ""
    if not bool(torch.isfinite(held).all()):
        return "not-finite", ""
    if not bool(held.any()):
        return "zero", ""
    belongs_to = owner.get(int(checksum(held)))
    if belongs_to:
        return "misplaced", f" holds {belongs_to}"
    ratio = float(held.float().norm() / part.float().norm()) if bool(part.any()) else math.inf
    close = math.isfinite(ratio) and torch.allclose(held.float(), part.float() * ratio, rtol=0.02, atol=0.0)
    if close and abs(ratio - 2) < 0.01:
        return "doubled", ""
    if close:
        return "scaled", f" is {ratio:.4g} times the trainer's"
    return "other", ""


def _summary(kinds: dict[str, list[str]], total: int, zero_b: int) -> Finding:
    names = [name for found in kinds.values() for name in found]
    b_tensors = max(1, total // 2)
    if not names:
        return Finding(
            "unknown", ADAPTER, "the checksums differ, yet every tensor is equal: the slots changed meanwhile"
        )
    (kind, found), *others = sorted(kinds.items(), key=lambda item: -len(item[1]))
    evidence = f"{len(names)} of {total} tensors differ: {_some(names)}"
    if others or kind == "other":
        worst = "not-finite" if "not-finite" in kinds else "slots-changed"
        return Finding("not-applied" if zero_b >= b_tensors else worst, ADAPTER, evidence)
    cause = {
        "doubled": "double-count" if len(found) >= b_tensors else "module-doubled",
        "scaled": "scaling",
        "zero": "not-applied" if zero_b >= b_tensors else "slots-changed",
    }
    return Finding(cause.get(kind, kind), ADAPTER, evidence)


def _differing(held: Sequence[int], expected: Sequence[int]) -> str:
    return f"{sum(a != b for a, b in zip(held, expected))} of {len(expected)}"


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
