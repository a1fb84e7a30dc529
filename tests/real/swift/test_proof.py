"""Faults in a real run, each caught and named, and a long clean stretch without a false alarm.

The stretch is as long as SLF_CLEAN_SECONDS allow. All of it, however long that takes:

    SLF_CLEAN_SECONDS=inf scripts/test tests/real/swift/test_proof.py
"""

from __future__ import annotations

import json
import re

import pytest

from swift_lora_fix.proof.verdict import ALLOWED
from tests.support.driver import Run
from tests.support.faults import CLEAN_MINIMUM, CLEAN_SYNCS, FAULTS, messages, named, records, verdicts

from .conftest import Runs

pytestmark = [pytest.mark.e2e, pytest.mark.needs("faults", "train_fixed")]


def test_every_fault_was_made(run: Run) -> None:
    made = [record["fault"] for record in records(run) if record["fault"] in FAULTS]
    assert made == list(FAULTS) and run.returncode == 0, run.log[-3000:]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_and_named(run: Run, fault: str) -> None:
    assert named(run, fault) == ([FAULTS[fault]] if FAULTS[fault] else [])


def test_the_evidence_names_modules_and_numbers(run: Run) -> None:
    evidence = {cause: text for _, cause, text in messages(run)}
    assert "holds base_model" in evidence["misplaced"] and "mlp.down_proj" in evidence["misplaced"]
    assert "1 of the engine's" in evidence["base-changed"] and "down_proj" in evidence["base-changed"]
    assert "2 -> 3" in evidence["scaling"]
    assert "agreement gate" in evidence["stale-cache"] and "noise" in evidence["stale-cache"]
    assert "read-back audit of the adapter" in evidence["stale"]


def test_each_fault_is_repaired(run: Run) -> None:
    assert run.log.count("repaired: the engine serves the trainer's policy again") == len(list(messages(run)))


def test_many_clean_syncs_raise_no_alarm(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.returncode == 0, "the first false alarm would have ended the run"
    with capsys.disabled():
        print(f"\n{len(verdicts(run))} of {CLEAN_SYNCS} clean syncs, each with a policy of its own, each examined")
    assert len(verdicts(run)) >= CLEAN_MINIMUM
    for *_, ratio, is_distinguishable in verdicts(run):
        assert ratio < ALLOWED and is_distinguishable, "each match is one that could have failed"


def test_the_policy_decides_what_follows(run: Run) -> None:
    found = {record["policy"]: record for record in records(run) if record["fault"] == "policy"}
    assert found["warn"]["answers"] == 1 and found["repair"]["answers"] == 1
    assert found["raise"]["cause"] == "not-applied" and "Nothing was generated" in found["raise"]["error"]
    assert "Keep other adapters" in found["raise"]["error"], "what to do is said"


def test_rollouts_carry_their_policy(run: Run) -> None:
    tags = [(record["step"], record["tags"][0]) for record in records(run) if record.get("tags")]
    assert [step for step, _ in tags] == [tag["policy_step"] for _, tag in tags] == list(range(len(FAULTS) + 2))
    digests = [tag["policy_digest"] for _, tag in tags]
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in digests)
    # a changed scaling is a changed policy; the last tag is of the step after it
    assert len(set(digests)) == len(digests)


def test_metrics_are_in_the_log_that_users_read(run: Run) -> None:
    lines = [json.loads(line) for line in (run.output / "logging.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lora_sync/seconds" in line]
    assert len(steps) == len(FAULTS) + 1
    names = {"seconds", "seconds_audit", "seconds_write", "bytes", "policy_step", "mismatch_mean", "mismatch_max"}
    names |= {
        "mismatch_kl",
        "noise",
        "ratio",
        "agrees",
        "slope",
        "against_base",
        "noise_floor",
        "control_base",
        "control_double",
        "distinguishable",
        "seconds_gate",
    }
    for step, line in enumerate(steps):
        assert names <= {key.split("/", 1)[1] for key in line if key.startswith("lora_sync/")}
        assert line["lora_sync/policy_step"] == step and line["lora_sync/ratio"] < ALLOWED


def test_the_chain_of_custody_starts_at_the_file(run: Run, runs: Runs) -> None:
    import hashlib

    digest = hashlib.sha256((runs.checkpoint / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert f"chain of custody: file (SHA-256 {digest}) = trainer = engine's LoRA slots, policy digest" in run.log


@pytest.mark.needs("offloaded")
def test_a_trainer_that_is_away_is_asked_afterwards(runs: Runs) -> None:
    """With --offload_model and --offload_optimizer the proof was off: now it comes later, before the batch counts."""
    run = runs.get("offloaded")
    assert run.returncode == 0, run.log[-3000:]
    assert [line["lora_sync/policy_step"] for line in run.metrics()] == [0, 1, 2, 3]
    for line in run.metrics():
        assert (
            line["lora_sync/ratio"] < ALLOWED and line["lora_sync/distinguishable"] and line["lora_sync/agrees"] == 1
        ), line
        assert line["lora_sync/long_ratio"] < ALLOWED, "beyond 512 tokens, too"
        assert line["lora_sync/batch_mean"] < 4 * line["lora_sync/noise"], "the rollouts, too"
        assert line["lora_sync/batch_tokens"] > 0
    assert [(step, cause) for step, cause, _ in messages(run)] == [(2, "not-applied")], "as the answers tell"
    assert run.log.count("repaired: the engine serves the trainer's policy again") == 1
    assert run.log.count("engine and trainer agree at step 2") == 1, "the rollouts that are trained on"
