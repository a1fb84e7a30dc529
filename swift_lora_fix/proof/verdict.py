"""What the agreement gate found, as numbers, and the bounds that it is judged by. The one place of both.

No torch here: the command line's reports read the same bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# A match may stand this many noise floors off, in the mean. Measured on real runs: a trained LoRA makes logits, and
# bf16's steps with them, larger than the plain base's, up to 1.9 floors; a double count stood at 20 to 300.
FLOORS = 4.0
# Nats. Floors of right engines so far: 0.005 to 0.06. Above this the engine computes something else from the base,
# which no check of its bits shows: its kernels expect the weights in another layout.
FLOOR_CEILING = 0.5
MINIMUM_FLOOR = 1e-5  # nats; float32's own rounding of a logprob, where both sides compute alike


@dataclass(frozen=True)
class Distance:
    """|engine - trainer| over the probe's tokens, in nats: mean and maximum; kl is the k3 estimate of
    KL(engine || trainer), the mean of r - 1 - log r with r = p_trainer / p_engine (http://joschu.net/blog/kl-approx.html).
    """

    mean: float
    max: float
    kl: float


@dataclass(frozen=True)
class Verdict:
    """One passage through the gate. control_base, control_double: mean |logprob difference| in nats to what the trainer
    says without the adapter and with twice the adapter. rounding: in fused mode, by how much (the same mean) the one
    rounding of the merged weights moves what the trainer says; 0 otherwise."""

    distance: Distance
    floor: Distance
    control_base: float
    control_double: float
    rounding: float = 0.0

    @property
    def bound(self) -> float:
        return FLOORS * max(self.floor.mean + self.rounding, MINIMUM_FLOOR)

    @property
    def agrees(self) -> bool:
        return self.distance.mean <= self.bound  # False for NaN

    @property
    def is_distinguishable(self) -> bool:
        """Whether the engine's answers would have failed with the base alone, and with twice the adapter."""
        return min(self.control_base, self.control_double) > self.bound

    @property
    def reservation(self) -> str:
        """What a match does not tell yet, in words; empty where it tells everything."""
        controls = {"the plain base": self.control_base, "twice the adapter": self.control_double}
        near = [name for name, control in controls.items() if not control > self.bound]
        return f" (not distinguishable yet from {' and '.join(near)})" if near else ""

    def __str__(self) -> str:
        return (
            f"mean |logprob difference| {self.distance.mean:.3g} (max {self.distance.max:.3g}, "
            f"KL {self.distance.kl:.3g}), "
            f"allowed {self.bound:.3g}, which is {FLOORS:g} times the plain base's own noise"
            f"{f' and that of rounding the merged weights ({self.rounding:.3g})' if self.rounding else ''}; "
            f"to the base without the adapter {self.control_base:.3g}, to twice the adapter {self.control_double:.3g}"
        )


def distance_between(gaps: Sequence[float]) -> Distance:
    """Of the gaps logprob trainer - engine, in nats, a token each; NaN where there is none or one is not finite."""
    if not gaps or not all(map(math.isfinite, gaps)):
        return Distance(math.nan, math.nan, math.nan)
    kl = [math.exp(min(gap, 50.0)) - 1 - gap for gap in gaps]
    sizes = [abs(gap) for gap in gaps]
    return Distance(sum(sizes) / len(sizes), max(sizes), sum(kl) / len(kl))
