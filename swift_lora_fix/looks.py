"""What a session keeps of its looks at the engine: when the next whole one is due, and what the last one found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .proof import audit, probe
from .proof.batch import Batch
from .proof.causes import Finding
from .proof.gate import Asked
from .proof.verdict import Verdict

FIRST_SYNCS = 3  # so many syncs after a start, a resume, the first sleep or a repair are looked at whole


@dataclass
class Schedule:
    """When a sync is looked at whole. due: so many syncs still are, before only every Nth is.

    A look that left something open is made again at sync ``again``, ``wait`` syncs later than it: 1, 2, 4, ...
    """

    due: int = FIRST_SYNCS
    has_slept: bool = False
    again: int | None = None
    wait: int = 1

    def is_due(self, sync: int, every: int) -> bool:
        return self.due > 0 or sync % every == 0 or (self.again is not None and sync >= self.again)

    def note_look(self) -> None:
        self.due = max(0, self.due - 1)

    def note_disturbance(self, sleep: bool = False) -> None:
        """The engine slept for the first time, somebody wrote to it, or it was repaired: look again."""
        if not (sleep and self.has_slept):
            self.due = FIRST_SYNCS
        self.has_slept = self.has_slept or sleep

    def note_told(self, sync: int, is_open: bool) -> None:
        """is_open: the look at this sync told neither that the engine is right nor that it is wrong."""
        self.again, self.wait = (sync + self.wait, 2 * self.wait) if is_open else (None, 1)


@dataclass
class Examination:
    """What was found of the last sync. verdicts: by kind of the probe's prompts. rounding: what the one rounding of the
    fused mode costs, None where that was not looked at. batch: the rollouts that were compared last. looked_at: in
    words, for the custody line. Times in seconds, of the adapter's audit, the base's, and the gate. probes_failed:
    probes that could not be made."""

    verdicts: dict[str, Verdict] = field(default_factory=dict)
    rounding: audit.Rounding | None = None
    batch: Batch | None = None
    looked_at: list[str] = field(default_factory=list)
    audit_seconds: float = 0.0
    base_audit_seconds: float = 0.0
    gate_seconds: float = 0.0
    probes_failed: int = 0

    @property
    def verdict(self) -> Verdict | None:
        """Of the short prompts, which are always asked first."""
        return self.verdicts.get(probe.SHORT)


@dataclass(frozen=True)
class Pending:
    """A look that waits until the trainer's model is back. asked: empty where this rank asked nobody."""

    asked: Sequence[Asked]
    finding: Finding | None


def custody(origin: str, place: str, digest: str, seen: Examination, gate_every: int) -> str:
    """The adapter's way from its file into the engine, and which links of it were looked at. origin: the file, "" where
    the adapter was made or its file could not be compared. place: where it lies in the engine."""
    way = " = ".join([origin, "trainer", place] if origin else ["trainer", place])
    looked, open_ends = list(seen.looked_at), list[str]()
    for kind, verdict in seen.verdicts.items():
        words = f"answers to {kind} prompts{verdict.reservation}"
        (looked if verdict.agrees else open_ends).append(words)
    if not seen.verdicts:
        why = "SWIFT_LORA_FIX_GATE_EVERY is 0" if not gate_every else "no probe could be judged at this sync"
        open_ends.append(f"answers of the engine ({why})")
    if not origin:
        open_ends.append("a file that the trainer's adapter came from")
    said = [f"chain of custody: {way}, policy digest {digest}", f"looked at: {', '.join(looked) or 'nothing'}"]
    if open_ends:
        said.append(f"not looked at: {', '.join(open_ends)}")
    return f"{'; '.join(said)}."
