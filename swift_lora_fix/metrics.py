"""The numbers of a sync, where users look: in ms-swift's own metrics, so in ``logging.jsonl`` and any ``--report_to``.

All begin with ``lora_sync/``. At each sync: ``seconds`` and its parts ``seconds_validate``, ``_base``, ``_write``,
``_caches`` and ``_wait``; beside it ``seconds_audit``; ``bytes``; ``policy_step``; ``probes_failed`` where a probe
could not be made.

At syncs that the gate examines: ``seconds_base_audit``, ``seconds_gate``; ``mismatch_mean``, ``mismatch_max`` (|logprob
engine - trainer|, nats a token), ``mismatch_kl`` (k3); ``noise`` (nats a token: what this policy's own numerics
explain), ``ratio`` (the mismatch in units of that, robust; sound up to ``verdict.ALLOWED``), ``noise_floor`` (of the
plain base), ``engine_noise`` (in units of the trainer's own); ``control_base``, ``control_double`` (nats a token, to
the plain base and to twice the adapter), ``against_base``, ``against_double`` (nats of evidence that the engine does
not serve those), ``slope`` (where it stands from the plain base, 0, to this policy, 1); ``agrees`` (1, 0, or 0.5 where
it was left open), ``distinguishable`` (0 or 1), ``probes``. Of other kinds of prompts: ``long_mismatch_mean``,
``long_ratio``, ``media_...``.
In fused mode ``mismatch_rounding``, too (nats a token: what rounding the merged weights moves the trainer by), and
``lost_share``.

Each time that the trainer has scored rollouts: ``batch_mean``, ``batch_max`` (|logprob engine - trainer|, nats a
token), ``batch_kl`` (k3) and ``batch_tokens``, over the rollouts themselves and all ranks. With dropout in training
only at syncs that pass the gate, where they are scored once more without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .proof import probe
from .proof.batch import Batch
from .proof.verdict import Verdict
from .trainer import TrainerPort

if TYPE_CHECKING:
    from .session import Session


_LATEST = ("policy_step", "noise_floor", "distinguishable")  # not averaged over a logging interval
_WORST = {"mismatch_max": max, "batch_max": max, "agrees": min}


def of(session: Session) -> dict[str, float]:
    """The numbers of the last sync, by name without ``lora_sync/``."""
    write, seen = session.last_write, session.examination
    numbers: dict[str, float] = {
        "seconds": session.last_seconds,
        "bytes": float(write.bytes_written),
        "policy_step": float(session.served_step or 0),
        "seconds_audit": seen.audit_seconds,
    }
    for stage in ("validate", "base", "write", "caches", "wait"):
        numbers[f"seconds_{stage}"] = write.seconds.get(stage, 0.0)
    if seen.probes_failed:
        numbers["probes_failed"] = float(seen.probes_failed)
    if seen.verdict is not None:
        numbers.update(seconds_gate=seen.gate_seconds, seconds_base_audit=seen.base_audit_seconds)
    for kind, verdict in seen.verdicts.items():
        of = _of_verdict(verdict)
        if kind == probe.SHORT:
            numbers.update(of)
        else:
            numbers.update({f"{kind}_{name}": of[name] for name in ("mismatch_mean", "ratio")})
    if seen.verdict is not None and session.mode == "fused":
        numbers["mismatch_rounding"] = seen.verdict.rounding
    if seen.rounding is not None and seen.rounding.lost_share is not None:
        numbers["lost_share"] = seen.rounding.lost_share
    return numbers


def _of_verdict(verdict: Verdict) -> dict[str, float]:
    found = {
        "mismatch_mean": verdict.distance.mean,
        "mismatch_max": verdict.distance.max,
        "mismatch_kl": verdict.distance.kl,
        "noise": verdict.noise,
        "ratio": verdict.ratio,
        "noise_floor": verdict.floor.mean,
        "engine_noise": verdict.engine_noise,
        "control_base": verdict.control_base,
        "control_double": verdict.control_double,
        "agrees": 1.0 if verdict.agrees else 0.5 if verdict.is_open else 0.0,
        "distinguishable": float(verdict.is_distinguishable),
        "probes": float(verdict.probes),
    }
    for hypothesis in verdict.hypotheses:
        if hypothesis.cause == "not-applied":
            found["against_base"] = hypothesis.weight
            if math.isfinite(hypothesis.slope):  # there is no way between two policies that are one
                found["slope"] = 1 - hypothesis.slope
        elif hypothesis.cause == "double-count":
            found["against_double"] = hypothesis.weight
    return found


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
        elif name in _WORST:
            lists[key] = [_WORST[name]([value, *before])]
        else:
            lists[key] = [*before, value]
