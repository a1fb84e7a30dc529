"""The numbers of a sync, where users look: in ms-swift's own metrics, so in ``logging.jsonl`` and any ``--report_to``.

All begin with ``lora_sync/``. At each sync: ``seconds`` and its parts ``seconds_validate``, ``_write``, ``_caches`` and
``_wait``; beside it ``seconds_audit``; ``bytes``; ``policy_step``. At syncs that pass the gate: ``seconds_base_audit``,
``seconds_gate``; ``mismatch_mean``, ``mismatch_max`` (|logprob engine - trainer|, nats a token), ``mismatch_kl`` (k3),
``noise_floor``, ``control_base``, ``control_double`` (nats a token), ``distinguishable`` (0 or 1). In fused mode also
``mismatch_rounding`` (nats a token: what the rounding of the merged weights moves the trainer by) and ``lost_share``.
"""

from __future__ import annotations

from typing import Any

from .state import SyncState

_LATEST = ("policy_step", "noise_floor", "distinguishable")  # not averaged over a logging interval


def of(state: SyncState) -> dict[str, float]:
    """The numbers of the last sync, by name without ``lora_sync/``."""
    write, proof = state.last_write, state.proof
    numbers: dict[str, float] = {
        "seconds": state.last_seconds,
        "bytes": float(write.bytes_written),
        "policy_step": float(state.served_step or 0),
        "seconds_audit": proof.audit_seconds,
    }
    for stage in ("validate", "write", "caches", "wait"):
        numbers[f"seconds_{stage}"] = write.seconds.get(stage, 0.0)
    verdict = proof.verdict
    if verdict is not None:
        numbers.update(
            seconds_gate=proof.gate_seconds,
            seconds_base_audit=proof.base_audit_seconds,
            mismatch_mean=verdict.distance.mean,
            mismatch_max=verdict.distance.max,
            mismatch_kl=verdict.distance.kl,
            noise_floor=verdict.floor.mean,
            control_base=verdict.control_base,
            control_double=verdict.control_double,
            distinguishable=float(verdict.is_distinguishable),
        )
        if state.mode == "fused":
            numbers["mismatch_rounding"] = verdict.rounding
    if proof.rounding is not None and proof.rounding.lost_share is not None:
        numbers["lost_share"] = proof.rounding.lost_share
    return numbers


def record(trainer: Any, state: SyncState) -> None:
    """Add them to what the trainer logs next: ms-swift then averages each list of ``trainer._metrics[mode]``."""
    metrics = getattr(trainer, "_metrics", None)
    if not isinstance(metrics, dict) or "train" not in metrics:
        return
    lists = metrics["train" if trainer.model.training else "eval"]
    for name, value in of(state).items():
        key = f"lora_sync/{name}"
        if name in _LATEST:
            lists[key] = [value]
        elif name == "mismatch_max":
            lists[key] = [max([value, *lists[key]])]
        else:
            lists[key].append(value)
