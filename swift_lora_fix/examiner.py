"""Looks at what the engine holds and answers, for one session: audits, the gate, and what is said of both.

It reads engine and trainer, and changes the session's state nowhere. When a whole look is due its schedule knows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import metrics
from .common.log import info, warning
from .common.ranks import ranks_agree
from .common.settings import Settings
from .engine.port import BasePort, EnginePort, WriterPort
from .install import releases
from .looks import Examination, Pending, Schedule, custody
from .policy import adapter as adapters
from .policy.origin import AdapterOrigin
from .proof import audit, batch, probe
from .proof.causes import Finding
from .proof.gate import Asked, Gate
from .proof.verdict import FLOOR_ALLOWED, Verdict
from .trainer import BatchPort, RolloutPort, TrainerPort

BASE_AUDIT_EVERY = 50  # after the first syncs every so many are looked at whole, where the gate is off
PARTS = 16  # in fused mode each sync's audit looks at every 16th module, in turn; a whole look at all of them
CHANGED = ("slots-changed", "weights-changed")  # causes of audits that only say so
BATCH_FAR = 5.0  # times the distance that the gate's own questions explain, of the rollouts themselves: a warning
SMALL_LOOKS = 5  # after so many in which the adapter is too small to tell, that is said


@dataclass(frozen=True)
class Served:
    """What is looked at: the policy of ``step``, sent by the run's sync number ``sync``, on ``base`` as it was sent
    (None: the engine compares it itself). mode_is_settled: whether no other mode may be chosen any more."""

    step: int | None
    sync: int
    base: BasePort | None
    mode_is_settled: bool = True


class Examiner:
    """Of one trainer. ``bind`` comes before all else, and again for a new engine, writer or adapter."""

    engine: EnginePort
    writer: WriterPort

    def __init__(self, trainer: TrainerPort) -> None:
        self.trainer = trainer
        self.schedule, self.examination = Schedule(), Examination()
        self.gate: Gate | None = None
        self._small_looks = 0
        self._said: set[str] = set()  # what the log says once a run

    def bind(self, engine: EnginePort, writer: WriterPort) -> None:
        self.engine, self.writer, self.gate = engine, writer, None
        self._is_altered: bool | None = None  # on any rank, by logits processors; None: not asked yet

    def begin(self) -> None:
        """A sync begins: nothing is known of it."""
        self.examination = Examination()

    # ---- who is here, and when ---------------------------------------------------------------------------------------

    @property
    def looks_later(self) -> bool:
        """Whether the trainer's model cannot score while rollouts are made: it is on the host (offloaded), the
        memory is the KV cache's (a sleep level), or not all ranks are there (rollout servers)."""
        trainer = self.trainer
        shared = self.engine.is_shared and trainer.ranks > 1
        return trainer.offloads_model or trainer.sleep_level > 0 or shared

    def are_together(self, first: bool) -> bool:
        """Whether all ranks are here: after a sync they all come; later rollouts of a step may be some ranks' alone. Of
        rollout servers only the main rank makes rollouts."""
        in_background = threading.current_thread() is not threading.main_thread()
        return first and not in_background and not (self.engine.is_shared and self.trainer.ranks > 1)

    def all_ranks(self, fine: bool) -> bool:
        """Whether it is fine on all ranks. All of them ask."""
        return fine if self.trainer.ranks == 1 else ranks_agree(fine, self.trainer.device)

    def of_all_ranks(self, finding: Finding | None) -> Finding | None:
        if not self.all_ranks(finding is None) and finding is None:
            return Finding("unknown", "other ranks", "another rank of this run found a mismatch; its log says which")
        return finding

    # ---- looking -----------------------------------------------------------------------------------------------------

    def look(
        self, served: Served, rollout: RolloutPort, missing: str | None, first: bool
    ) -> tuple[Finding | None, Pending | None]:
        """The finding of this rank, or that another rank has one; and what is left to judge with the trainer's model.

        Args:
            missing: why the engine cannot serve the policy at all, if so.
            first: whether this is the first look after a sync.
        """
        settings = Settings.from_environment()
        together, later, seen = self.are_together(first), self.looks_later, self.examination
        whole = (together or (first and later)) and self._is_due(served, settings)
        started = time.perf_counter()
        finding = Finding("not-loaded", "check before the rollout", missing) if missing else None
        finding = finding or self._audit(served, whole and not later, together)
        seen.audit_seconds += time.perf_counter() - started
        started = time.perf_counter()
        if whole and finding is None and served.base is not None:
            finding = audit.base(served.base, self.writer.adapted_parameters(), trainer_is_here=not later)
            seen.looked_at.append(f"the base's bits{' in the engine' if later else ' on both sides'}")
        seen.base_audit_seconds += time.perf_counter() - started
        if whole:
            self.schedule.note_look()
        asks = whole and settings.gate_every > 0 and self._may_ask(rollout, missing, finding)
        asks = asks and self._are_its_own(self.engine.logits_processors)
        pending = None
        if self.all_ranks(asks) if together else asks:
            started = time.perf_counter()
            asked = self._gate().ask(rollout, self.all_ranks if together else bool, ahead=later)
            if later:
                pending = Pending(asked, finding)
            else:
                finding = self.judge(served, asked, finding, rollout)
            seen.gate_seconds += time.perf_counter() - started
        return (self.of_all_ranks(finding) if together else finding), pending

    def audit_weights_now(self, served: Served) -> Finding | None:
        """Fused mode, where the trainer's model is away when rollouts are made: engine and trainer are both here now.
        What is found is acted on before the rollout."""
        weights = self.writer.weights
        assert weights is not None
        started = time.perf_counter()
        finding = self._audit_weights(served, self._is_due(served, Settings.from_environment()))
        if weights.is_known:
            weights.note_audited()
        self.examination.audit_seconds += time.perf_counter() - started
        return finding

    def _is_due(self, served: Served, settings: Settings) -> bool:
        return self.schedule.is_due(served.sync, settings.gate_every or BASE_AUDIT_EVERY)

    def _audit(self, served: Served, whole: bool, together: bool) -> Finding | None:
        adapter, slots, weights = self.writer.adapter, self.writer.slots, self.writer.weights
        changed = adapters.changed_scalings(adapter)
        if changed:
            return Finding("scaling", "scaling check", f"{len(changed)} modules: {', '.join(changed[:3])}")
        if slots is not None:
            finding = audit.adapter(slots, not self.trainer.offloads_model, together)
            if finding is not None:
                return finding
            slots.accept()
            self.examination.looked_at.append("the LoRA slots' values")
        elif weights is not None and self.looks_later:
            if weights.engine_changed():
                return Finding("weights-changed", audit.MERGED, "the engine's weights differ from those after the sync")
            weights.accept()
            self.examination.looked_at.append("that the weights are still those of the sync")
        elif weights is not None and (together or adapter.sharding == "none"):
            return self._audit_weights(served, whole)
        return None

    def _audit_weights(self, served: Served, whole: bool) -> Finding | None:
        assert self.writer.weights is not None
        part, parts = (0, 1) if whole else (served.sync % PARTS, PARTS)
        finding, rounding = audit.merged(self.writer.weights, part, parts)
        if rounding is not None:
            self.examination.rounding = rounding
            self._mind(rounding, served)
        if finding is None:
            self.writer.weights.accept()
            part_of = "the merged weights" if whole else f"a {PARTS}th of the merged weights"
            self.examination.looked_at.append(f"{part_of} against the trainer's")
        return finding

    def _may_ask(self, rollout: RolloutPort, missing: str | None, audited: Finding | None) -> bool:
        """The first probe measures the noise floor, for which the engine must hold the trainer's base; and NaN in the
        slots would stay behind in the memory of the KV cache, where attention meets it again (seen on the CPU)."""
        has_floor = self.gate is not None and probe.SHORT in self.gate.floors
        is_safe = audited is None or (has_floor and audited.cause != "not-finite")
        return missing is None and rollout.has_requests and is_safe

    def _are_its_own(self, processors: Sequence[str]) -> bool:
        """Whether what the engine says is its model's own. If not, one line says so."""
        if processors and self.says_once("logits processors"):
            warning(
                f"logits processors change what the engine's model says ({', '.join(processors)}), and the trainer has "
                "none: the engine is not asked. Its values alone are compared with the trainer's."
            )
        return not processors

    # ---- the gate ----------------------------------------------------------------------------------------------------

    def _gate(self) -> Gate:
        if self.gate is None:
            block, writer = self.engine.cache_block, self.writer
            self.gate = Gate(self.trainer, writer.adapter, writer.serving, block, self.all_ranks)
        return self.gate

    def judge(
        self, served: Served, asked: Sequence[Asked], audited: Finding | None, rollout: RolloutPort | None = None
    ) -> Finding | None:
        """What an audit has found is told more fully with what the engine answers."""
        started, seen = time.perf_counter(), self.examination
        judged = self._gate().judge(asked, rollout)
        if rollout is None:  # else whoever calls counts the asking, too
            seen.gate_seconds += time.perf_counter() - started
        seen.verdicts, found = judged.verdicts, judged.finding
        if judged.noisy:
            warning(
                f"without the adapter, engine and trainer are further apart than the trainer's own numerics explain "
                f"({', '.join(judged.noisy)}; up to {FLOOR_ALLOWED:g} is usual): a KV cache or weights of fewer bits, "
                "kernels of another accuracy, or a small fault that is always there. It counts as this engine's noise."
            )
        seen.probes_failed += len(judged.failed)
        for kind, why in judged.failed.items():
            if self.says_once(f"failed {kind}"):
                warning(f"the probe with {kind} prompts failed, so what the engine answers to them is not known: {why}")
        for kind, verdict in judged.verdicts.items():
            self._say_verdict(kind, verdict, served)
        if judged.verdicts:
            self.schedule.note_told(served.sync, any(verdict.is_open for verdict in judged.verdicts.values()))
        if found is not None and found.cause == "engine-not-finite":
            known = "; ".join(self._known_faults())
            found = Finding(found.cause, found.test, f"{found.evidence}{known and f'; known: {known}'}")
        if found is None or audited is None:
            return audited or found
        # without the trainer's values an audit knows that something was changed, and the answers tell what is served
        cause = found.cause if audited.cause in CHANGED and found.cause != "unknown" else audited.cause
        return Finding(cause, f"{audited.test} and the {found.test}", f"{audited.evidence}; {found.evidence}")

    def note_batch(self, served: Served, scored: BatchPort) -> None:
        """How far the rollouts' own logprobs are from the trainer's, as metrics. All ranks together. Where that is not
        like with like, one line says why."""
        trainer, seen = self.trainer, self.examination
        reason = scored.why_not
        if self._is_altered is None:  # of servers only the main rank knows
            self._is_altered = not self.all_ranks(not self.engine.logits_processors)
        if not reason and self._is_altered:
            reason = "logits processors have changed them"
        if not reason and (trainer.is_asynchronous or served.step != trainer.step):
            reason = "they were made by an earlier policy"
        anew = not reason and batch.drops_out(trainer.model)
        if anew and not self.all_ranks(seen.verdict is not None and seen.batch is None):
            return  # the trainer's own dropout is in what it scored; without it they are scored where the gate asks
        kind = reason or "rows"  # whose numbers differ from step to step
        if not reason:
            found, reason = batch.compare(scored.scored(anew), trainer.ranks, trainer.device)
            if found is not None:
                seen.batch = found
                metrics.record_batch(trainer, found)
                self._weigh_batch(served, found, scored.temperature)
        if reason and self.says_once(f"batch: {kind}"):
            info(f"the rollouts' own logprobs are not compared with the trainer's: {reason}.")

    def _weigh_batch(self, served: Served, found: batch.Batch, temperature: float) -> None:
        """The run's own prompts as evidence, beside a verdict that found the engine sound.

        They have what the gate's have not: images, tools, other lengths. They have no hypotheses of their own, so this
        is a warning, and names no cause.
        """
        verdict = self.examination.verdict
        if verdict is None or not verdict.agrees:
            return
        explained = (max(verdict.noise, verdict.distance.mean) + verdict.rounding) / min(1.0, temperature)
        if found.distance.mean <= BATCH_FAR * explained:  # not for NaN
            return
        if self.says_once(f"batch: far at step {served.step}"):
            warning(
                f"step {served.step}: the gate found the engine sound, but the rollouts are farther from the trainer "
                f"than its questions explain ({explained:.3g}): {found}. Something that only your prompts have (images,"
                " tools, their length) may be computed in another way. Watch lora_sync/batch_mean."
            )

    def _known_faults(self) -> tuple[str, ...]:
        device = self.trainer.device
        capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None
        return releases.kernel_faults(releases.installed_vllm(), capability)

    # ---- saying ------------------------------------------------------------------------------------------------------

    def says_once(self, what: str) -> bool:
        new = what not in self._said
        self._said.add(what)
        return new

    def forget_custody(self) -> None:
        """The way ends at another place now: it is said again."""
        self._said.discard("custody")

    def say_custody(self, origin: AdapterOrigin | None, digest: str) -> None:
        """Once: the adapter's way from its file into the engine, and which links of it were looked at."""
        if self.says_once("custody"):
            file = f"file (SHA-256 {origin.sha256})" if origin and origin.sha256 and origin.compared else ""
            every = Settings.from_environment().gate_every
            info(custody(file, self.writer.place, digest, self.examination, every))

    def _say_verdict(self, kind: str, verdict: Verdict, served: Served) -> None:
        of = "" if kind == probe.SHORT else f" on {kind} prompts"
        if verdict.agrees:
            info(f"engine and trainer agree{of} at step {served.step}{verdict.reservation}: {verdict}.")
        elif verdict.is_open and self.says_once(f"undecided {kind}"):
            again = "it is asked again after 1, 2, 4, ... more syncs, until that is told"
            warning(f"the probe left open{of} which policy the engine serves; {again}: {verdict}.")
        if kind != probe.SHORT or not verdict.agrees:
            return
        self._small_looks = 0 if verdict.is_distinguishable else self._small_looks + 1
        verify = self.trainer.words.verify
        if self._small_looks == SMALL_LOOKS:
            warning(
                f"after {served.sync} syncs the adapter still does less than the noise of computing it"
                f"{verdict.reservation}: that the engine serves it is known from the audits of its values alone. A "
                f"larger learning rate or a later checkpoint would tell{verify and f': {verify}'}."
            )

    def _mind(self, rounding: audit.Rounding, served: Served) -> None:
        """What the rounding of the fused mode loses, where it is more than the user allows."""
        bound, share = Settings.from_environment().lost_share, rounding.lost_share
        # of a first sync the update may be no more than rounding itself (DoRA's magnitudes, an adapter just begun)
        begun = served.sync > 1
        if share is not None and share > bound and begun and served.mode_is_settled and self.says_once("lost share"):
            warning(
                f"fused mode: rounding the merged weights loses {share:.0%} of the adapter's update, above the "
                f"bound of {bound:.1%} (SWIFT_LORA_FIX_LOST_SHARE): the engine's policy lags behind the trainer's. "
                f"With {self.trainer.words.with_lora} vLLM serves an adapter that it can serve exactly, apart."
            )
