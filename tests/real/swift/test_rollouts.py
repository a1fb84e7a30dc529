"""The engine serves exactly the trainer's policy: real ms-swift, real vLLM, from the first rollout to the last."""

from __future__ import annotations

import pytest

from tests.support import bounds, premises
from tests.support.driver import Run

from .conftest import CHECKPOINT_STEP, DOUBLE_COUNTS, DOWNCASTS, FIRST_BATCH_BASE, LAST_STEP, Runs

pytestmark = pytest.mark.e2e

double_count_only = pytest.mark.skipif(not DOUBLE_COUNTS, reason="the defect of ms-swift up to 4.0.1")
downcast_only = pytest.mark.skipif(not DOWNCASTS, reason="the defect of ms-swift 4.3.0 and later")
first_batch_only = pytest.mark.skipif(not FIRST_BATCH_BASE, reason="the defect of ms-swift 3.10 and 3.11")


def assert_agrees(run: Run, floor: dict) -> None:
    assert run.probes()
    for probe in run.probes():
        assert probe["step"] >= LAST_STEP or bounds.agrees(probe, floor), probe


def assert_trainer_only_read(run: Run) -> None:
    assert run.probes()
    for probe in run.probes():
        assert bounds.only_read(probe), probe


@pytest.fixture
def floor(runs: Runs) -> dict:
    first = runs.get("train_fixed").probes()[0]
    premises.plain_base(first)
    assert bounds.is_floor(first), "bf16 noise of this tiny model"
    return first


@pytest.mark.needs("train_fixed")
def test_from_scratch(run: Run, floor: dict) -> None:
    steps = [probe["step"] for probe in run.probes()]
    assert steps == [0, 1, 2], "killed as it began the rollout of step 3"
    premises.large_lora(run.probes()[1:], floor["mean"])
    assert_agrees(run, floor)
    assert_trainer_only_read(run)
    assert "LoRA weights from scratch" in run.log and "every lora_B is zero" in run.log
    assert "visits all blocks of its pool" not in run.log, "vLLM keeps its prefix cache as prefix_cache.py knows it"


@pytest.mark.needs("resume_fixed", "train_fixed")
def test_resume_serves_the_checkpoint_at_every_batch(run: Run, floor: dict) -> None:
    probes = run.probes()
    assert [probe["step"] for probe in probes] == list(range(CHECKPOINT_STEP, LAST_STEP))
    premises.large_lora(probes, floor["mean"])
    for probe in probes[1:]:
        assert probe["tokens"] == probes[0]["tokens"], "greedy generations at learning rate 0 never change"
    assert_agrees(run, floor)
    assert_trainer_only_read(run)


@pytest.mark.needs("resume_fixed", "train_fixed")
def test_resume_says_where_the_adapter_came_from(run: Run, runs: Runs) -> None:
    import hashlib

    digest = hashlib.sha256((runs.checkpoint / "adapter_model.safetensors").read_bytes()).hexdigest()
    line = next(line for line in run.log.splitlines() if "LoRA weights from" in line)
    assert f"--resume_from_checkpoint {runs.checkpoint} at step {CHECKPOINT_STEP}" in line
    assert digest in line and "the trainer's tensors equal the file's" in line and "lora_B is not zero" in line
    assert f"reference adapter {runs.checkpoint}" in line
    assert run.log.index("LoRA weights from") < run.log.index("{'loss'"), "said before the first batch is trained on"


@pytest.mark.needs("resume_fixed")
def test_rollout_fails_closed_when_the_adapter_is_lost(run: Run) -> None:
    assert run.returncode not in (0, None)
    assert "EngineStateError" in run.log and "adapter 111 (swift_lora) is not loaded" in run.log


@double_count_only
@pytest.mark.needs("resume_stock", "train_fixed")
def test_stock_counts_the_adapter_twice_after_a_resume(run: Run, floor: dict) -> None:
    first, *later = run.probes()
    premises.large_lora([first], floor["mean"])
    assert bounds.agrees(first, floor), "the first batch is right: merged weights"
    for probe in later[: LAST_STEP - CHECKPOINT_STEP - 1]:
        assert bounds.double_counted(probe, floor) and probe["tokens"] != first["tokens"]
        assert probe["base_changed"] > bounds.DRIFT_SHARE


@double_count_only
@pytest.mark.needs("resume_stock")
def test_stock_goes_on_without_its_adapter(run: Run) -> None:
    assert run.returncode == 0 and run.probes()[-1]["step"] == LAST_STEP


@downcast_only
@pytest.mark.needs("resume_stock")
def test_stock_crashes_on_resume(run: Run) -> None:
    assert run.returncode != 0
    assert "expected scalar type" in run.log
    assert "torch.bfloat16" in run.probes()[0]["lora_dtypes"], "the first sync cast the fp32 LoRA"


@pytest.mark.needs("adapters_fixed", "train_fixed")
def test_adapters_start_in_batches(run: Run, runs: Runs, floor: dict) -> None:
    assert run.returncode == 0
    assert [probe["step"] for probe in run.probes()] == [0, 1, 2]
    premises.large_lora(run.probes(), floor["mean"])
    assert_agrees(run, floor)
    assert_trainer_only_read(run)
    assert f"LoRA weights from --adapters {runs.checkpoint}" in run.log


@first_batch_only
@pytest.mark.needs("adapters_stock", "train_fixed")
def test_stock_serves_the_first_batch_from_the_base(run: Run, floor: dict) -> None:
    first, second, _ = run.probes()
    premises.large_lora([first], floor["mean"])
    assert bounds.double_counted(first, floor), "the plain base is as far from the policy as its LoRA is large"
    assert bounds.agrees(second, floor)


@downcast_only
@pytest.mark.needs("ddp_fixed")
def test_two_ranks_agree(run: Run) -> None:
    assert run.returncode == 0
    ranks = run.probes(0), run.probes(1)
    premises.premise(ranks[0][1]["gradients"] > 0, "the first step had no gradient")
    assert [probe["step"] for probe in ranks[0]] == [probe["step"] for probe in ranks[1]] == [0, 1, 2]
    for first, second in zip(*ranks):
        assert first["gradients"] == second["gradients"]
        assert first["lora_sum"] == second["lora_sum"]
    assert_trainer_only_read(run)
    for line in run.metrics():
        floor, lengths = line["lora_sync/noise_floor"], line["completions/mean_length"]
        assert line["lora_sync/batch_mean"] < 4 * floor
        assert line["lora_sync/batch_tokens"] == 4 * lengths, "of both ranks"


@downcast_only
@pytest.mark.needs("ddp_stock")
def test_two_stock_ranks_do_not(run: Run) -> None:
    ranks = run.probes(0), run.probes(1)
    assert any(a["gradients"] != b["gradients"] for a, b in zip(*ranks))
    assert any(a["lora_sum"] != b["lora_sum"] for a, b in zip(*ranks))
