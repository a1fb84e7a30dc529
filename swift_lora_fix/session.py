"""One trainer and its engine: the state machine of a run. Nothing else changes this state.

    unbound     nothing is known of the engine: at the start, with a new engine, after a sleep that discarded the base
    base_held   the engine holds the trainer's unmerged base, but no known policy
    served      a sync is complete: the engine holds the policy of one step
    examined    that policy was checked, rollouts may be made (checks that must wait are in ``pending``)

A framework's hooks call ``begin`` once. Then, for each rollout call and in this order: ``invalidate_if_lost``,
``synchronize`` (for a new step), ``before_rollout`` and ``after_rollout``. If another thread makes the rollouts while
the trainer takes its next step, ``look_at_once`` follows ``synchronize``.
"""

from __future__ import annotations

import enum
import time
import weakref
from typing import Any, Literal

import torch

from . import metrics, scope
from .auto import Auto
from .common.clock import Clock
from .common.log import info, warning
from .common.ranks import on_main_rank
from .common.settings import Settings
from .engine.port import BasePort, EnginePort, WriteReport, WriterPort
from .engine.vllm.colocated import AdapterModeWriter, FusedModeWriter
from .engine.vllm.dense import asked
from .engine.vllm.folders import FolderEngine, FolderWriter
from .engine.vllm.handle import EngineHandle
from .errors import EngineStateError, PolicyMismatchError, ResumeMismatchError
from .examiner import Examiner, Served
from .looks import Examination, Pending
from .policy import adapter as adapters
from .policy import merging, origin
from .proof.causes import Finding
from .server.trainer.remote import RemoteEngine
from .server.trainer.writer import RemoteWriter
from .trainer import BatchPort, RolloutPort, TrainerPort

Mode = Literal["adapter", "fused"]


class Phase(enum.Enum):
    UNBOUND = "unbound"
    BASE_HELD = "base_held"
    SERVED = "served"
    EXAMINED = "examined"


class Session:
    """One trainer, its engine, and what is known of both."""

    def __init__(self, trainer: TrainerPort, mode: Mode, auto: bool = False) -> None:
        self.trainer = trainer
        self.phase = Phase.UNBOUND
        self.origin: origin.AdapterOrigin | None = None
        self.base: BasePort | None = None
        self.served_step: int | None = None
        self.syncs = self.base_pushes = 0
        self.last_seconds = 0.0
        self.last_write = WriteReport("none")
        self.examiner = Examiner(trainer)
        self.pending: Pending | None = None
        self.auto = Auto() if auto else None
        self._repairs = False  # the next sync sends base and adapter through the reference path
        self._repaired_step: int | None = None  # a second mismatch at this step raises
        self._slept = False  # since the last write
        self._bind(mode)

    @property
    def mode(self) -> Mode:
        """``adapter``: base and adapter apart, in vLLM's LoRA layers; ``fused``: folded into the engine's weights."""
        return self.writer.mode

    # ---- what happens to the engine ----------------------------------------------------------------------------------

    def invalidate_if_lost(self) -> None:
        """Before a rollout call: find out what the engine lost in a sleep or by somebody's write, and schedule a sync.

        Sleep level 2 discards the base. Other levels may lose the LoRA slots (vLLM issues 39934, 53888): before the
        rollout the slots are compared in place. Only what cannot be compared is sent again. Rollout servers are asked
        elsewhere, by the sync itself and just before each rollout.
        """
        held = self.writer.slots or self.writer.weights
        if held is None or self.phase in (Phase.UNBOUND, Phase.BASE_HELD):
            return
        if self.engine.is_asleep:
            self._slept = True
            self.examiner.schedule.note_disturbance(sleep=True)
            held.forget()
            if self.trainer.sleep_level == 2:
                self._lose(Phase.UNBOUND)
            elif self._can_be_compared():
                self.phase = Phase.SERVED
            else:
                self._lose(Phase.BASE_HELD)
        elif not self.examiner.all_ranks(self.writer.is_current()):
            held.forget()
            self._lose(Phase.BASE_HELD)

    def synchronize(self) -> None:
        """Make the engine serve the trainer's policy: the base if it is missing, then the adapter; reset caches."""
        clock = Clock()
        started = clock.last
        if self.syncs:
            self.writer.begin_validation()  # the device checks values while the host checks the rest
            clock.lap("validate")
        bound = adapters.is_still_bound(self.adapter) and self.engine.is_of(self.trainer)
        if not self.syncs or not bound or (self._repairs and adapters.changed_scalings(self.adapter)):
            self._bind_again()
            self.writer.begin_validation()
        self.examiner.begin()
        self.pending = None
        adapters.check_unmerged(self.adapter)
        came_from = self._find_origin() if self.origin is None else None
        clock.lap("check")
        self.writer.validate()  # before anything is written
        clock.lap("validate")
        if self.auto is not None:
            self._choose_mode()
        if self.phase is Phase.UNBOUND or self._repairs:
            self.base = self.writer.send_base(straight=not self._repairs)
            self.base_pushes += 1
            clock.lap("base")
        self.phase, self.served_step = Phase.BASE_HELD, None
        self.last_write = self.writer.write_by_reference() if self._repairs else self.writer.write()
        if came_from is not None and came_from != self.last_write.digest:
            raise ResumeMismatchError(
                f"What was sent to the engine (digest {self.last_write.digest}) is not the adapter that the run starts "
                f"from (digest {came_from}): {self.origin}. Report this with your versions (swift-lora-fix doctor)."
            )
        self._repairs = self._slept = False
        self.last_write.seconds.update(clock.laps)
        self.last_seconds = time.perf_counter() - started
        self.phase, self.served_step = Phase.SERVED, self.trainer.step
        self.syncs += 1
        if self.writer.weights is not None and self.examiner.looks_later:
            finding = self.examiner.audit_weights_now(self._served())
            if finding is not None:
                self._act(finding, Settings.from_environment(), False, "Nothing was generated.")

    def before_rollout(self, rollout: RolloutPort) -> None:
        """Before the first rollout after each sync: check what the engine holds, and probe it when that is due. Later
        rollouts of the same sync return at once.

        Raises EngineStateError when the engine cannot serve the policy at all; PolicyMismatchError when it serves
        another one than the trainer's (setting ``on_mismatch``: ``raise``), or still does after a repair (``repair``).
        ``warn`` only logs it.
        """
        if self.engine.make_ready():
            self.examiner.schedule.note_disturbance()
            self.phase = Phase.SERVED
        if self._slept:
            self._write_what_sleep_lost()
        missing = self.what_is_missing()
        if self.phase is Phase.EXAMINED and missing is None and self.writer.is_current():
            return
        settings, first = Settings.from_environment(), self.phase is not Phase.EXAMINED
        together, later = self.examiner.are_together(first), self.examiner.looks_later
        repairs = settings.on_mismatch == "repair" and together and self._repaired_step != self.served_step
        if missing is not None and not (repairs and self.served_step is not None):
            raise EngineStateError(
                f"The rollout would not use the trainer's LoRA adapter: {missing}. Nothing was generated. "
                "Sync first (trainer._move_model_to_vllm()), and keep other adapters out of this engine."
            )
        finding, pending = self.examiner.look(self._served(), rollout, missing, first)
        self.pending = pending or self.pending
        if finding is not None and later and repairs:
            asked = self.pending.asked if self.pending is not None else ()
            self.pending = Pending(asked, finding)  # a repair needs the trainer's model on its device
            if finding.cause == "not-finite" and self.writer.slots is not None:
                self.writer.slots.clear()  # NaN would stay in the KV cache's memory, where a repair does not reach
        elif finding is not None and self._act(finding, settings, repairs, "Nothing was generated."):
            self.repair()
            finding, _ = self.examiner.look(self._served(), rollout, None, first)
            if finding is not None:
                raise PolicyMismatchError(
                    f"After a repair it still does not: {finding} Nothing was generated.", finding
                )
            info("repaired: the engine serves the trainer's policy again.")
        if first:
            self.phase = Phase.EXAMINED
            was_asked = self.examination.verdict is not None or bool(self.pending and self.pending.asked)
            if self.pending is None:
                self._finish_look(finding)
            if self.auto is not None and was_asked:
                self.auto.watch(rollout, self.writer, self.trainer.device)

    def after_rollout(self) -> bool:
        """After a rollout call, with the trainer's model back on its device: judge the probes. All ranks together.
        Returns whether the rollouts must be made again, after a repair.

        Raises PolicyMismatchError as ``before_rollout`` does: the rollouts exist by then, but are not trained on.
        """
        return self._judge_pending("Its rollouts are not trained on.")

    def look_at_once(self, rollout: RolloutPort | None) -> None:
        """Right after a sync, for a trainer whose rollouts another thread makes while it takes its next step: both have
        the same policy now, and nothing has been generated from it yet. In place of ``before_rollout`` and
        ``after_rollout``. All ranks together. A repair is another sync.

        rollout: to ask the engine, on the rank that makes rollouts; None on the others. Raises as ``before_rollout``.
        """

        def ask() -> None:
            if rollout is not None:
                self.before_rollout(rollout)

        while True:
            # an error is raised on every rank: the others would wait for the answers for ever
            problem = on_main_rank(ask, rollout is not None, self.trainer.ranks, self.trainer.device)
            if problem is not None:
                raise problem
            if not self._judge_pending("Nothing was generated."):
                return
            self.synchronize()

    def _judge_pending(self, so_far: str) -> bool:
        """Judge what waits. Returns whether base and adapter must be sent again."""
        pending = self._shared_pending()
        if pending is None:
            return False
        self.pending = None
        settings = Settings.from_environment()
        finding = pending.finding
        if pending.asked:
            finding = self.examiner.judge(self._served(), pending.asked, finding)
        finding = self.examiner.of_all_ranks(finding)
        repairs = settings.on_mismatch == "repair" and self._repaired_step != self.served_step
        if finding is not None and self._act(finding, settings, repairs, so_far):
            self._repaired_step = self.served_step
            self._lose(Phase.UNBOUND)
            self._repairs = True
            self.examiner.schedule.note_disturbance()
            return True
        if finding is None and self._repaired_step == self.served_step:
            info("repaired: the engine serves the trainer's policy again.")
        self._finish_look(finding)
        return False

    def note_batch(self, scored: BatchPort) -> None:
        """Compare the rollouts' own logprobs with the trainer's, once it has scored them and before it learns from
        them. All ranks together."""
        self.examiner.note_batch(self._served(), scored)

    def repair(self) -> None:
        """Send base and adapter again by the reference path; needs an awake engine and the model on its device."""
        step = self.served_step
        if adapters.changed_scalings(self.adapter):
            self._bind_again()
        self.served_step = None
        self.base = self.writer.send_base()
        self.base_pushes += 1
        self.last_write = self.writer.write_by_reference()
        self.examination.looked_at.clear()  # what was looked at is replaced
        self.phase, self.served_step = Phase.SERVED, step
        self.examiner.schedule.note_disturbance()

    def change_mode(self, mode: Mode) -> None:
        """Serve the policy in the other mode from the next write on. Base and adapter are sent again."""
        self._bind(mode)
        self.phase, self.served_step, self.base = Phase.UNBOUND, None, None
        self.examiner.forget_custody()
        self.trainer.attach_adapter(mode == "adapter")

    def _served(self) -> Served:
        return Served(self.served_step, self.syncs, self.base, self.auto is None)

    @property
    def examination(self) -> Examination:
        """What the checks of the last sync found."""
        return self.examiner.examination

    def what_is_missing(self) -> str | None:
        """Why the engine cannot serve the last sync's policy at all, or None."""
        if self.served_step is None:
            return "no sync has completed since the engine was started or slept"
        return self.writer.what_is_missing()

    def summary(self) -> dict[str, Any]:
        """For ``swift_lora_fix.status()``."""
        seen = self.examination
        return {
            "origin": str(self.origin) if self.origin else "not decided before the first sync",
            "phase": self.phase.value,
            "served_step": self.served_step,
            "policy_digest": self.last_write.digest,
            "syncs": self.syncs,
            "base_pushes": self.base_pushes,
            "mode": self.mode,
            "path": self.last_write.path,
            "adapter_bytes": self.last_write.bytes_written,
            "sync_seconds": self.last_seconds,
            **{f"{stage}_seconds": seconds for stage, seconds in self.last_write.seconds.items()},
            "audit_seconds": seen.audit_seconds,
            "base_audit_seconds": seen.base_audit_seconds,
            "gate_seconds": seen.gate_seconds,
            "batch": str(seen.batch) if seen.batch else "not compared since this sync",
            "gate": f"{seen.verdict.outcome}{seen.verdict.reservation}: {seen.verdict}"
            if seen.verdict
            else "did not run at this sync",
        }

    # ---- binding -----------------------------------------------------------------------------------------------------

    def _bind(self, mode: Mode) -> None:
        """Build adapter, engine and writer for the trainer's current model and engine."""
        trainer = self.trainer
        self.adapter = adapters.bind(trainer.model, apart=mode == "adapter", words=trainer.words)
        self.engine: EnginePort
        self.writer: WriterPort
        if trainer.engine_place == "server":
            servers = RemoteEngine(trainer)
            self.engine, self.writer = servers, RemoteWriter(trainer, servers, self.adapter)
        elif trainer.engine_place == "folders":
            folders = FolderEngine(trainer)
            self.engine, self.writer = folders, FolderWriter(trainer, folders, self.adapter)
        elif mode == "adapter":
            engine = self.engine = EngineHandle(trainer.vllm_engine)
            direct = Settings.from_environment().writer == "direct"
            self.writer = AdapterModeWriter(trainer, engine, self.adapter, direct)
        else:
            engine = self.engine = EngineHandle(trainer.vllm_engine)
            self.writer = FusedModeWriter(trainer, engine, self.adapter, merging.bind(trainer.model, self.adapter.name))
        self.examiner.bind(self.engine, self.writer)
        if self.examiner.says_once("kernels"):
            asked.check(self.writer.mode, self.engine)

    def _bind_again(self) -> None:
        """Needed when parameters or the engine were replaced: ZeRO-3 and FSDP2 shard after ``begin``, FSDP2 into new
        parameters; a new engine holds nothing yet."""
        keeps_base = self.writer.keeps_base and self.engine.is_of(self.trainer)
        self._bind(self.mode)
        self.served_step = None
        if not (keeps_base and self.phase is not Phase.UNBOUND):
            self.phase, self.base = Phase.UNBOUND, None
        if self.syncs:
            info("the trainer's LoRA parameters or its engine are new objects: bound again.")

    def _lose(self, phase: Phase) -> None:
        self.phase, self.served_step = phase, None
        if phase is Phase.UNBOUND:
            self.base = None
        self.trainer.sync_again()

    def _can_be_compared(self) -> bool:
        """Whether, after a sleep, the engine's memory alone shows if it still holds what was written."""
        slots, weights = self.writer.slots, self.writer.weights
        return (slots is not None and slots.expected is not None) or (weights is not None and weights.is_audited)

    def _write_what_sleep_lost(self) -> None:
        """Write the adapter again if its slots lost it in a sleep. The audit compares fused weights."""
        slots, self._slept = self.writer.slots, False
        if slots is None or slots.expected is None or slots.read_back() == slots.expected:
            return
        if self.examiner.says_once("lost slots"):
            info("the engine's LoRA slots did not survive its sleep: the adapter is written again before rollouts.")
        self.writer.begin_validation()
        self.writer.validate()
        self.last_write = self.writer.write()

    def forget_origin(self) -> None:
        """Training begins from a checkpoint: at the next sync the adapter is compared with its file."""
        self.origin = None
        self.examiner.forget_custody()

    def _find_origin(self) -> str:
        """Find the adapter's origin, check it against its file, and return the digest that the engine must get."""
        trainer = self.trainer
        held = adapters.read_to_host(self.adapter, trainer.device)
        self.origin = origin.determine(trainer.model, self.adapter, held, trainer.resume_from, trainer.step)
        info(str(self.origin))
        return self.writer.digest_of(held)

    def _choose_mode(self) -> None:
        """``SWIFT_LORA_FIX_MODE=auto``. The engine is awake, the model on its device, nothing is written yet."""
        assert self.auto is not None
        bound = Settings.from_environment().lost_share
        mode = self.auto.choose(self.trainer, self.writer, self.examiner.all_ranks, bound)
        if self.auto.is_settled:
            self.auto = None
        if mode is not None and mode != self.mode:
            self.change_mode(mode)
            self.writer.begin_validation()
            self.writer.validate()
        elif self.mode == "adapter" and mode is not None:
            self.phase = Phase.UNBOUND  # the measurement overwrote the engine's base

    # ---- acting ------------------------------------------------------------------------------------------------------

    def _act(self, finding: Finding, settings: Settings, repairs: bool, so_far: str) -> bool:
        """Raise, or log a warning. Returns whether the caller must repair."""
        message = f"The engine does not serve the trainer's policy of step {self.served_step}: {finding}"
        if settings.on_mismatch == "warn":
            warning(message)
            return False
        if not repairs:
            raise PolicyMismatchError(f"{message} {so_far}", finding)
        warning(f"{message} Repairing: base and adapter go through the reference path.")
        return True

    def _finish_look(self, finding: Finding | None) -> None:
        if finding is None:
            self.examiner.say_custody(self.origin, self.last_write.digest)
        metrics.record(self.trainer, self)

    # ---- ranks -------------------------------------------------------------------------------------------------------

    def _shared_pending(self) -> Pending | None:
        """With rollout servers only the main rank probed; all ranks judge, because they all-gather shards."""
        if not (self.engine.is_shared and self.trainer.ranks > 1):
            return self.pending
        told: list[Pending | None] = [self.pending]
        torch.distributed.broadcast_object_list(told, src=0, device=self.trainer.device)
        return told[0]


_sessions: weakref.WeakKeyDictionary[Any, Session] = weakref.WeakKeyDictionary()
_seen: weakref.WeakSet[Any] = weakref.WeakSet()  # trainers that ``begin`` has seen


def begin(trainer: Any, port: TrainerPort) -> Session | None:
    """Called after the framework prepared its engine: take over the sync, or step aside and log why. trainer: the
    framework's own object, which the session does not keep alive. port: this package's view of it."""
    decision = scope.decide(port)
    _seen.add(trainer)
    info(decision.reason)
    if not decision.ours:
        return None
    session = _sessions[trainer] = Session(port, decision.mode, decision.is_open)
    if decision.mode == "fused":
        port.attach_adapter(False)
    port.prepare()
    return session


def is_known(trainer: Any) -> bool:
    """Whether ``begin`` has seen this trainer. If its engine was prepared before the patches went in, ``begin`` runs
    at its first sync."""
    return trainer in _seen


def session_of(trainer: Any) -> Session | None:
    """The session of a trainer that we sync, else None."""
    return _sessions.get(trainer)


def forget() -> None:
    """The patches were removed, so we no longer see what happens to the engines."""
    _sessions.clear()
    _seen.clear()


def latest() -> Session | None:
    """The session of the trainer that began last in this process."""
    return list(_sessions.values())[-1] if _sessions else None
