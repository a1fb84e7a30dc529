"""What is known of one trainer and its engine between two syncs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .engine.vllm.handle import EngineHandle
from .engine.vllm.slots.writer import AdapterWriter, WriteReport
from .engine.vllm.weights.base import BaseRecord
from .engine.vllm.weights.fused import FusedWriter
from .policy import adapter, origin
from .server.trainer.remote import RemoteEngine
from .server.trainer.writer import RemoteWriter

FIRST_SYNCS = 3  # so many syncs after a start, a resume, the first sleep or a repair pass the gate


@dataclass
class Proof:
    """What was proved of the last sync. examined: it was audited. gates_due: so many syncs still pass the gate before
    only every Nth does. verdict: the gate's at this sync, None where it did not run. rounding: what the one rounding of
    the fused mode costs, None where that was not looked at. Times in seconds."""

    examined: bool = False
    gates_due: int = FIRST_SYNCS
    has_slept: bool = False
    gate: Any = None
    verdict: Any = None
    rounding: Any = None
    audit_seconds: float = 0.0  # of the adapter
    base_audit_seconds: float = 0.0
    gate_seconds: float = 0.0

    def begin_sync(self) -> None:
        self.examined, self.verdict, self.rounding = False, None, None
        self.audit_seconds = self.base_audit_seconds = self.gate_seconds = 0.0

    def note_disturbance(self, sleep: bool = False) -> None:
        """The engine slept for the first time, somebody wrote to it, or it was repaired: the gate is due again."""
        if not (sleep and self.has_slept):
            self.gates_due = FIRST_SYNCS
        self.has_slept = self.has_slept or sleep


@dataclass
class SyncState:
    """What the engine holds of one trainer. ``served_step`` is None while it does not hold the trainer's policy."""

    model: Any
    engine: EngineHandle | RemoteEngine
    adapter: adapter.Adapter
    writer: AdapterWriter | FusedWriter | RemoteWriter
    origin: origin.AdapterOrigin | None = None
    base_is_current: bool = False
    base_record: BaseRecord | None = None
    served_step: int | None = None
    syncs: int = 0
    base_pushes: int = 0
    last_seconds: float = 0.0
    last_write: WriteReport = field(default_factory=lambda: WriteReport("none"))
    proof: Proof = field(default_factory=Proof)
    auto: bool = False  # the mode may still change
    measured: Any = None  # what ``auto`` measured
    # what the log says once a run
    custody_is_said: bool = False
    lost_share_is_said: bool = False
    audit_is_said: bool = False
    auto_is_said: bool = False

    def inherit(self, old: SyncState) -> None:
        """Go on with the run of another state, around other objects: what is known of the run, not of the engine."""
        for name in ("origin", "syncs", "base_pushes", "auto", "measured"):
            setattr(self, name, getattr(old, name))
        for name in ("custody_is_said", "lost_share_is_said", "audit_is_said", "auto_is_said"):
            setattr(self, name, getattr(old, name))

    @property
    def mode(self) -> str:
        """``adapter``: base and adapter apart, in vLLM's LoRA layers; ``fused``: folded into the engine's weights."""
        return "fused" if isinstance(self.writer, FusedWriter) else "adapter"

    def summary(self) -> dict[str, Any]:
        """For ``swift_lora_fix.status()``."""
        return {
            "origin": str(self.origin) if self.origin else "not decided before the first sync",
            "served_step": self.served_step,
            "policy_digest": self.last_write.digest,
            "syncs": self.syncs,
            "base_pushes": self.base_pushes,
            "mode": self.mode,
            "path": self.last_write.path,
            "adapter_bytes": self.last_write.bytes_written,
            "sync_seconds": self.last_seconds,
            **{f"{stage}_seconds": seconds for stage, seconds in self.last_write.seconds.items()},
            "audit_seconds": self.proof.audit_seconds,
            "base_audit_seconds": self.proof.base_audit_seconds,
            "gate_seconds": self.proof.gate_seconds,
            "gate": str(self.proof.verdict) if self.proof.verdict else "did not run at this sync",
        }
