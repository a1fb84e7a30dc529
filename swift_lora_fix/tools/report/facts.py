"""What ``swift-lora-fix report`` knows of a run: its syncs, and whether they prove that the engine served the policy.

reading.py  reads the run's ``logging.jsonl`` into a frozen `RunReport`
chart.py    draws that
view.py     prints that

Times are in seconds. Mismatches are mean absolute differences of log-probabilities between engine and trainer, in nats
a token. Not every step has every number.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...proof.verdict import ALLOWED

CHART_NAME = "lora_sync.png"
PREFIX = "lora_sync/"
STAGES = ("validate", "write", "caches", "wait")  # parts of ``seconds``
REST = "rest"  # of ``seconds``
AUDIT = "audit"  # not in ``seconds``; nor is the gate, which is rare and would dwarf the rest


@dataclass(frozen=True)
class Step:
    """The numbers of one step, or of the evaluation after it, by their names without ``lora_sync/``."""

    step: int
    values: dict[str, float]
    is_evaluation: bool = False

    @property
    def place(self) -> str:
        return f"the evaluation after step {self.step}" if self.is_evaluation else f"step {self.step}"

    @property
    def position(self) -> float:
        """Its place on an axis of steps: an evaluation lies between its step and the next."""
        return self.step + 0.5 * self.is_evaluation

    @property
    def is_probed(self) -> bool:
        return "mismatch_mean" in self.values

    @property
    def is_distinguishable(self) -> bool:
        """Whether the probe could have told a wrong policy from the right one."""
        return self.is_probed and self.values.get("distinguishable", 0.0) > 0

    @property
    def is_wrong(self) -> bool:
        """Whether the engine served something else. NaN, or no verdict, counts as wrong."""
        return self.is_probed and not self.values.get("agrees", math.nan) > 0

    @property
    def is_open(self) -> bool:
        """Whether the probe left it undecided."""
        return self.is_probed and 0 < self.values.get("agrees", math.nan) < 1

    @property
    def ratio(self) -> float:
        """The mismatch as a multiple of what the policy's own numerics explain."""
        return self.values.get("ratio", math.nan)

    def split(self) -> dict[str, float]:
        """Seconds by stage; what no stage accounts for is `REST`."""
        parts = {stage: self.values.get(f"seconds_{stage}", 0.0) for stage in STAGES}
        parts[REST] = max(0.0, self.values.get("seconds", 0.0) - sum(parts.values()))
        return {**parts, AUDIT: self.values.get(f"seconds_{AUDIT}", 0.0)}


@dataclass(frozen=True)
class RunReport:
    """A run's steps in order, evaluations among them. words: what was noticed while reading, a sentence each."""

    folder: Path
    steps: tuple[Step, ...]
    words: tuple[str, ...] = ()

    @property
    def trained(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if not step.is_evaluation)

    @property
    def evaluations(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.is_evaluation)

    @property
    def synced(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if "seconds" in step.values)

    @property
    def probed(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.is_probed)

    @property
    def distinguishable(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.is_distinguishable)

    @property
    def wrong(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.is_wrong)

    @property
    def open(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.is_open)

    @property
    def exit_code(self) -> int:
        return 1 if self.wrong or not self.proved else 0

    @property
    def proved(self) -> tuple[Step, ...]:
        return tuple(step for step in self.distinguishable if not step.is_wrong and not step.is_open)

    @property
    def verdict(self) -> str:
        """One or two sentences."""
        if self.wrong:
            worst = max(self.wrong, key=lambda step: math.inf if math.isnan(step.ratio) else step.ratio)
            return (
                f"The engine did NOT serve the trainer's policy at {plural(len(self.wrong), 'probed step')}, the worst "
                f"at {worst.place} ({worst.ratio:.1f} times what its own numerics explain, {ALLOWED:g} are sound)."
            )
        if self.proved:
            worst = max(self.proved, key=lambda step: step.ratio)
            left = f" {plural(len(self.open), 'probed step')} left it open." if self.open else ""
            return (
                f"The engine served the trainer's policy at every step that could tell ({len(self.proved)} of "
                f"{len(self.probed)} probed): at most {worst.ratio:.2f} times the noise of its own numerics, at "
                f"{worst.place}.{left}"
            )
        if self.probed:
            return (
                f"Not proved: at none of the {plural(len(self.probed), 'probed step')} was the LoRA large enough to "
                "tell it from the noise. Train longer, or look at a run that starts from an adapter."
            )
        return "Not proved: no step was probed, so engine and trainer were never compared in this run."


def median_of(steps: Sequence[Step], name: str) -> float | None:
    values = [step.values[name] for step in steps if math.isfinite(step.values.get(name, math.nan))]
    return statistics.median(values) if values else None


def median_split(steps: Sequence[Step]) -> dict[str, float]:
    """The median seconds of each stage that took any time."""
    splits = [step.split() for step in steps]
    taken = [stage for stage in (*STAGES, REST, AUDIT) if any(split[stage] for split in splits)]
    return {stage: statistics.median(split[stage] for split in splits) for stage in taken}


# ---- how numbers are written, here and in the chart ----------------------------------------------------------------


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.9995 else f"{1e3 * seconds:.3g} ms"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
