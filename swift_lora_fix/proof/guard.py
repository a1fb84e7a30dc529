"""Before each rollout: audit what the engine holds, now and then probe what it answers, and act on what is found."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from .. import choice, metrics, sync
from ..common.log import info, warning
from ..common.settings import Settings
from ..engine.vllm.slots.writer import ranks_agree
from ..engine.vllm.weights.fused import FusedWriter
from ..errors import EngineStateError, PolicyMismatchError
from ..policy import adapter as adapters
from ..server.trainer.remote import RemoteEngine
from ..server.trainer.writer import RemoteWriter
from ..state import SyncState
from . import audit
from .findings import Finding
from .gate import Gate, Infer
from .serving import Apart, Fused, Served

PARTS = 16  # in fused mode each sync's audit looks at every 16th module, in turn; that before the gate at all of them


def before_rollout(trainer: Any, state: SyncState, infer: Infer, requests: Sequence[Any], config: Any) -> None:
    """Audit before the first rollout after each sync and pass the gate when it is due; later rollouts cost nothing.

    Raises EngineStateError when the engine does not hold the adapter at all; PolicyMismatchError when it does not serve
    the trainer's policy (setting ``on_mismatch``: ``raise``), or still does not after a repair (``repair``); ``warn``
    only says so.
    """
    missing = sync.what_is_missing(state)
    if state.proof.examined and missing is None and state.writer.is_current():
        return
    settings = Settings.from_environment()
    examination = _Examination(trainer, state, infer, requests, config, settings)
    # all ranks repair together; of rollout servers only the main one is here
    repairs = settings.on_mismatch == "repair" and not examination.trainer_is_away and examination.all_are_here
    if missing is not None and not (repairs and state.served_step is not None):
        raise EngineStateError(
            f"The rollout would not use the trainer's LoRA adapter: {missing}. Nothing was generated. "
            "Sync first (trainer._move_model_to_vllm()), and keep other adapters out of this engine."
        )
    finding = examination.run(missing)
    if finding is not None:
        message = f"The engine does not serve the trainer's policy of step {state.served_step}: {finding}"
        if settings.on_mismatch == "warn":
            warning(message)
        elif not repairs:
            raise PolicyMismatchError(f"{message} Nothing was generated.", finding)
        else:
            warning(f"{message} Repairing: base and adapter go through the reference path.")
            state = examination.state = sync.restore(trainer, state)
            finding = examination.run(None)
            if finding is not None:
                raise PolicyMismatchError(
                    f"After a repair it still does not: {finding} Nothing was generated.", finding
                )
            info("repaired: the engine serves the trainer's policy again.")
    if state.proof.examined:
        return
    state.proof.examined = True
    metrics.record(trainer, state)
    if state.auto and state.proof.verdict is not None and examination.is_together:
        if choice.consider(trainer, state, examination.everywhere, infer, requests, config, settings.lost_share):
            changed = sync.state_of(trainer)
            assert changed is not None
            before_rollout(trainer, changed, infer, requests, config)


class _Examination:
    """One look at the engine. All ranks come to the same decision."""

    def __init__(
        self, trainer: Any, state: SyncState, infer: Infer, requests: Sequence[Any], config: Any, settings: Settings
    ) -> None:
        self.trainer, self.state, self.settings = trainer, state, settings
        self.infer, self.requests, self.config = infer, requests, config
        # with --async_generate true rollouts are made in another thread, while the trainer takes its next step
        in_background = threading.current_thread() is not threading.main_thread()
        # with --offload_model true the trainer's model is on the CPU while rollouts are made
        self.trainer_is_away = in_background or bool(getattr(trainer, "enable_offload", False))
        ranks = trainer.accelerator.num_processes
        # only the main rank asks rollout servers
        self.is_alone = ranks == 1 or state.engine.is_remote
        # after a sync all ranks come here; later rollouts of a step may be some ranks' alone
        first = not state.proof.examined or self.is_alone
        # alone, it could not gather what is sharded
        self.is_together = first and not in_background and (ranks == 1 or not self._would_wait())
        self.all_are_here = self.is_together and (ranks == 1 or not self.is_alone)

    def _would_wait(self) -> bool:
        return self.is_alone and self.state.adapter.sharding != "none"

    def run(self, missing: str | None) -> Finding | None:
        """The finding of this rank, or that another rank has one."""
        proof, here = self.state.proof, not self.trainer_is_away
        due = self._gate_is_due()
        started = time.perf_counter()
        finding = Finding("not-loaded", "check before the rollout", missing) if missing else self._audit(due)
        audited = time.perf_counter()
        if due and finding is None and self.state.base_record is not None:
            finding = audit.base(self.state.base_record, self.state.writer.adapted_parameters(), here)
        proof.audit_seconds, proof.base_audit_seconds = audited - started, time.perf_counter() - audited
        due = due and here and self.everywhere(self._can_probe(missing, finding))
        if due:
            finding = self._pass_gate(finding)
            proof.gates_due = max(0, proof.gates_due - 1)
        if not self.everywhere(finding is None) and finding is None:
            finding = Finding("unknown", "other ranks", "another rank of this run found a mismatch; its log says which")
        if finding is None and not self.state.custody_is_said:
            self._say_custody()
        return finding

    def _audit(self, due: bool) -> Finding | None:
        changed = adapters.changed_scalings(self.state.adapter)
        if changed:
            return Finding("scaling", "scaling check", f"{len(changed)} modules: {', '.join(changed[:3])}")
        writer = self.state.writer
        if isinstance(writer, RemoteWriter):
            if self._would_wait() and not self.state.audit_is_said:
                self.state.audit_is_said = True
                info("rollout servers and a sharded trainer: no agreement gate, which all ranks would have to make.")
            return None  # each server has compared what it was sent, and says which policy made each rollout
        if isinstance(writer, FusedWriter):
            finding = self._audit_merged(writer, due)
        else:
            finding = audit.adapter(writer, not self.trainer_is_away, self.is_together)
        if finding is None:
            writer.accept()
        return finding

    def _audit_merged(self, writer: FusedWriter, due: bool) -> Finding | None:
        if self.trainer_is_away:
            if not self.state.audit_is_said:
                self.state.audit_is_said = True
                info("fused mode: with the trainer's model offloaded or in another thread, weights are not audited.")
            return None
        if not (self.is_together or writer.adapter.sharding == "none"):
            return None
        part, parts = (0, 1) if due else (self.state.syncs % PARTS, PARTS)
        finding, rounding = audit.merged(writer, part, parts)
        if rounding is not None:
            self.state.proof.rounding = rounding
            self._mind(rounding)
        return finding

    def _mind(self, rounding: audit.Rounding) -> None:
        bound, share = self.settings.lost_share, rounding.lost_share
        # of a first sync the update may be no more than rounding itself (DoRA's magnitudes, an adapter just begun)
        begun = self.state.syncs > 1
        if share is not None and share > bound and begun and not (self.state.lost_share_is_said or self.state.auto):
            self.state.lost_share_is_said = True
            warning(
                f"fused mode: rounding the merged weights loses {share:.0%} of the adapter's update (norms), above the "
                f"bound of {bound:.1%} (SWIFT_LORA_FIX_LOST_SHARE): the engine's policy lags behind the trainer's. "
                "With --vllm_enable_lora true vLLM serves an adapter that it can serve exactly, apart."
            )

    def _gate_is_due(self) -> bool:
        every = self.settings.gate_every
        if every == 0 or not self.is_together:
            return False
        return self.state.proof.gates_due > 0 or self.state.syncs % every == 0

    def _can_probe(self, missing: str | None, audited: Finding | None) -> bool:
        """The first probe measures the noise floor, for which the engine must hold the trainer's base; and NaN in the
        slots would stay behind in the memory of the KV cache, where attention meets it again (seen on the CPU)."""
        gate = self.state.proof.gate
        has_floor = gate is not None and gate.adapter is self.state.adapter and gate.floor is not None
        is_safe = audited is None or (has_floor and audited.cause != "not-finite")
        return missing is None and bool(self.requests) and is_safe

    def _pass_gate(self, audited: Finding | None) -> Finding | None:
        """Probe. What an audit has found is told more fully with what the engine answers."""
        proof = self.state.proof
        if proof.gate is None or proof.gate.adapter is not self.state.adapter:
            writer, engine = self.state.writer, self.state.engine
            serving: Apart | Fused
            if isinstance(engine, RemoteEngine):
                serving = Served(engine, self.state.adapter)
            elif isinstance(writer, FusedWriter):
                serving = Fused(engine, writer)
            else:
                serving = Apart(engine, self.state.adapter)
            proof.gate = Gate(self.trainer, self.state.adapter, self.everywhere, serving)
        started = time.perf_counter()
        verdict, found = proof.gate.check(self.infer, self.requests, self.config)
        self.state.engine.reset_caches()  # the rollout finds the cache empty, as if there had been no probe
        proof.gate_seconds, proof.verdict = time.perf_counter() - started, verdict
        if found is None:
            info(f"engine and trainer agree at step {self.state.served_step}{verdict.reservation}: {verdict}.")
        if found is None or audited is None:
            return audited or found
        return Finding(audited.cause, f"{audited.test} and the {found.test}", f"{audited.evidence}; {found.evidence}")

    def everywhere(self, fine: bool) -> bool:
        """Whether it is fine on all ranks that are here together."""
        if self.is_alone or not self.is_together:
            return fine
        return ranks_agree(fine, self.trainer.accelerator.device)

    def _say_custody(self) -> None:
        """Once: the adapter's way from its file into the slots, each step of it checked."""
        state = self.state
        state.custody_is_said = True
        origin = state.origin
        parts = []
        if origin is not None and origin.sha256 and origin.compared:
            parts.append(f"file (SHA-256 {origin.sha256})")
        parts += ["trainer", state.writer.place]
        info(f"chain of custody: {' = '.join(parts)}, policy digest {state.last_write.digest}.")


def tag(state: SyncState, outputs: Any) -> Any:
    """Write the policy that made them into ``rollout_infos`` of ms-swift's ``RolloutOutput``: step and digest."""
    for output in outputs if isinstance(outputs, list) else ():
        infos = getattr(output, "rollout_infos", None)
        if isinstance(infos, dict):
            infos["policy_step"], infos["policy_digest"] = state.served_step, state.last_write.digest
    return outputs
