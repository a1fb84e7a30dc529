"""The numbers of a sync, where users look: in ms-swift's own metrics, so in ``logging.jsonl`` and any ``--report_to``.

All begin with ``lora_sync/``. At each sync: ``seconds`` and its parts ``seconds_validate``, ``_write``, ``_caches`` and
``_wait``; beside it ``seconds_audit``; ``bytes``; ``policy_step``. At syncs that pass the gate: ``seconds_base_audit``,
``seconds_gate``; ``mismatch_mean``, ``mismatch_max`` (|logprob engine - trainer|, nats a token), ``mismatch_kl`` (k3),
``noise_floor``, ``control_base``, ``control_double`` (nats a token), ``distinguishable`` (0 or 1). In fused mode also
``mismatch_rounding`` (nats a token: what the rounding of the merged weights moves the trainer by) and ``lost_share``.

Each time that the trainer has scored rollouts: ``batch_mean``, ``batch_max`` (|logprob engine - trainer|, nats a
token), ``batch_kl`` (k3) and ``batch_tokens``, over the rollouts themselves and all ranks. With dropout in training
only at syncs that pass the gate, where they are scored once more without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .proof.batch import Batch
from .trainer import TrainerPort

if TYPE_CHECKING:
    from .session import Session


_LATEST = ("policy_step", "noise_floor", "distinguishable")  # not averaged over a logging interval
_LARGEST = ("mismatch_max", "batch_max")


def of(session: Session) -> dict[str, float]:
    """The numbers of the last sync, by name without ``lora_sync/``."""
    write, seen = session.last_write, session.examination
    numbers: dict[str, float] = {
        "seconds": session.last_seconds,
        "bytes": float(write.bytes_written),
        "policy_step": float(session.served_step or 0),
        "seconds_audit": seen.audit_seconds,
    }
    for stage in ("validate", "write", "caches", "wait"):
        numbers[f"seconds_{stage}"] = write.seconds.get(stage, 0.0)
    verdict = seen.verdict
    if verdict is not None:
        numbers.update(
            seconds_gate=seen.gate_seconds,
            seconds_base_audit=seen.base_audit_seconds,
            mismatch_mean=verdict.distance.mean,
            mismatch_max=verdict.distance.max,
            mismatch_kl=verdict.distance.kl,
            noise_floor=verdict.floor.mean,
            control_base=verdict.control_base,
            control_double=verdict.control_double,
            distinguishable=float(verdict.is_distinguishable),
        )
        if session.mode == "fused":
            numbers["mismatch_rounding"] = verdict.rounding
    if seen.rounding is not None and seen.rounding.lost_share is not None:
        numbers["lost_share"] = seen.rounding.lost_share
    return numbers


def record(trainer: TrainerPort, session: Session) -> None:
    """Add them to what the trainer logs next, which averages each list over a logging interval."""
    _add(trainer, of(session))


def record_batch(trainer: TrainerPort, batch: Batch) -> None:
    """The same for the rollouts of one call."""
    distance = batch.distance
    numbers = {"batch_mean": distance.mean, "batch_max": distance.max, "batch_kl": distance.kl}
    _add(trainer, {**numbers, "batch_tokens": float(batch.tokens)})


def _add(trainer: TrainerPort, numbers: Mapping[str, float]) -> None:
    lists = trainer.metrics()
    if lists is None:
        return
    for name, value in numbers.items():
        key = f"lora_sync/{name}"
        before = lists.get(key, [])
        if name in _LATEST:
            lists[key] = [value]
        elif name in _LARGEST:
            lists[key] = [max([value, *before])]
        else:
            lists[key] = [*before, value]
