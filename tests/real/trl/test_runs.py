"""TRL's GRPO and RLOO, colocated: what the engine serves, what is left of the trainer, and what a resume repeats."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from tests.support.environments import swift_lora_fix
from tests.support.trl_driver import CHECKPOINT_STEP, Run

from .conftest import STEPS, TRAINERS, Runs

pytestmark = pytest.mark.e2e

SERVED = ("uninterrupted", "resumed", "adapter_resumed", "sleeping", "adapter_sleeping", "auto", "example")
OTHERS = ("rloo", *TRAINERS)
ALL = [pytest.param(name, marks=pytest.mark.needs(name)) for name in (*SERVED, *OTHERS)]
served = pytest.mark.parametrize("name", ALL)


@pytest.mark.needs("stock")
def test_stock_trl_serves_the_policy_and_changes_the_trainer(run: Run) -> None:
    assert run.returncode == 0, run.log[-3000:]
    probes = run.probes()
    changed = [probe["base_changed"] for probe in probes]
    assert [probe["merges"] for probe in probes] == [1, 2, 3, 4, 5]
    assert changed[0] == 0 < changed[1] < changed[2] < changed[3] < changed[4], "lora_B was zero at the first sync"
    assert all(probe["mean"] < 0.03 for probe in probes)


@served
def test_engine_and_trainer_agree_at_every_sync(run: Run, name: str) -> None:
    assert run.returncode == 0, run.log[-3000:]
    probes, metrics = run.probes(), run.metrics()
    first = CHECKPOINT_STEP if "resumed" in name else 0
    last = 3 if name in ("example", *OTHERS) or "sleeping" in name else STEPS
    assert [probe["step"] for probe in probes] == list(range(first, last))
    for probe, line in zip(probes, metrics, strict=True):
        noise = line["lora_sync/noise"]
        assert probe["mean"] < 2.5 * noise and line["lora_sync/mismatch_mean"] < 2.5 * noise, (probe, line)
        assert 0 < noise < 0.05, "as quiet as bf16 rounding is"
        assert line["lora_sync/agrees"] == 1 and line["lora_sync/policy_step"] == probe["step"]
        assert f"engine and trainer agree at step {probe['step']}" in run.log
        if name in OTHERS:
            assert "lora_sync/batch_mean" not in line, "only GRPO keeps the logprobs of its engine"
        else:
            theirs = line["sampling/sampling_logp_difference/mean"]
            assert line["lora_sync/batch_mean"] == pytest.approx(theirs, rel=1e-3) and 0 < theirs < 2.5 * noise
            assert line["lora_sync/batch_tokens"] > 1
    late = [probe for probe in probes if probe["step"]]
    assert all(probe["effect"] > 20 * line["lora_sync/noise"] for probe, line in zip(late, metrics[-len(late) :]))
    assert metrics[-1]["lora_sync/distinguishable"] == 1, "a missing or doubled adapter would be noticed"


@pytest.mark.needs("adapter_rollout_func")
def test_what_a_rollout_func_asks_itself_is_answered_by_the_policy(run: Run) -> None:
    """By ``LLM.chat`` at even steps and ``LLM.generate`` at odd ones. TRL compares the logprobs with the trainer's."""
    assert run.returncode == 0, run.log[-3000:]
    lines = run.metrics()[:STEPS]
    for step, line in enumerate(lines):
        assert line["sampling/sampling_logp_difference/mean"] < 2.5 * line["lora_sync/noise"], (step, line)
        assert f"engine and trainer agree at step {step}" in run.log
    assert lines[-1]["lora_sync/distinguishable"] == 1 and run.probes()[-1]["effect"] > 0.5


@served
def test_the_trainer_is_only_read(run: Run, name: str) -> None:
    for probe in run.probes():
        assert not any(probe[what] for what in ("base_changed", "lora_changed", "merges")), probe
        of_lm_head = ["torch.bfloat16"] if name == "rloo" else []
        assert probe["lora_dtypes"] == [*of_lm_head, "torch.float32"]


@pytest.mark.needs("uninterrupted", "resumed", "killed")
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(runs: Runs) -> None:
    killed = runs.get("killed")
    assert killed.returncode == -9 and killed.checkpoint().is_dir() and not killed.checkpoint(STEPS).exists()
    whole, again = runs.get("uninterrupted").probes(), runs.get("resumed").probes()
    for before, probe in zip(whole[CHECKPOINT_STEP:], again, strict=True):
        assert all(before[what] == probe[what] for what in ("step", "completions", "tokens", "mean", "lora_sum"))


@pytest.mark.parametrize(
    "name, place",
    [
        pytest.param("resumed", "engine's weights, folded in", marks=pytest.mark.needs("resumed")),
        pytest.param("adapter_resumed", "engine's LoRA slots", marks=pytest.mark.needs("adapter_resumed")),
    ],
)
@pytest.mark.needs("killed")
def test_a_resume_is_compared_with_its_file(runs: Runs, name: str, place: str) -> None:
    run, file = runs.get(name), runs.get("killed").checkpoint() / "adapter_model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    where = f"{file.parent} at step {CHECKPOINT_STEP}"
    assert f"{where}, SHA-256 {digest}, the trainer's tensors equal the file's" in run.log
    assert f"chain of custody: file (SHA-256 {digest}) = trainer = {place}" in run.log


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.needs(name)) for name in ("sleeping", "adapter_sleeping")]
)
def test_a_base_that_the_sleeping_engine_lost_goes_straight_to_its_places(run: Run, name: str) -> None:
    assert run.log.count("the base goes straight to where vLLM's loader had put it before") == 1


@pytest.mark.needs("auto")
def test_auto_measures_both_modes_on_the_runs_own_rollouts(run: Run) -> None:
    assert "The mode is measured soon." in run.log and "auto mode, measured on this run" in run.log
    assert re.search(r"chosen: (adapter|fused)\.", run.log), run.log[-3000:]


@pytest.mark.needs("uninterrupted")
def test_the_report_reads_what_trl_saved(run: Run, tmp_path: Path) -> None:
    done = swift_lora_fix("report", run.folder / "run", "--out", tmp_path / "chart.png")
    said = " ".join(done.stdout.split())
    assert done.returncode == 0 and "The engine served the trainer's policy at every step" in said


@pytest.mark.needs("adapter_resumed")
def test_the_adapter_goes_straight_into_the_slots(run: Run) -> None:
    assert "the adapter goes straight into vLLM's LoRA slots: 28 copies, proved against vLLM's own loader" in run.log
