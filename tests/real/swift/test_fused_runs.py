"""Fused mode in real runs, with adapters that vLLM's LoRA kernels cannot serve, and each of them resumed."""

from __future__ import annotations

import hashlib

import pytest

from tests.support import premises
from tests.support.driver import Run

from .conftest import CHECKPOINT_STEP, DOUBLE_COUNTS, Runs

pytestmark = pytest.mark.e2e


# each costs two runs; either says the same of each release
older = pytest.mark.skipif(not DOUBLE_COUNTS, reason="shown with the older release")
newer = pytest.mark.skipif(DOUBLE_COUNTS, reason="shown with the newer release")


def fused(suffix: str):  # type: ignore[no-untyped-def]
    names = {f"fused_dora{suffix}": older, f"fused_pissa{suffix}": newer}
    runs = [pytest.param(name, marks=[pytest.mark.needs(name), where]) for name, where in names.items()]
    return pytest.mark.parametrize("name", runs)


@fused("")
def test_the_engine_agrees_at_every_step(run: Run, name: str) -> None:
    assert run.returncode == 0, run.log[-3000:]
    assert "armed, fused mode" in run.log and "trainer = engine's weights, folded in at 15 proved places" in run.log
    assert [probe["step"] for probe in run.probes()] == [0, 1, 2]
    for probe, line in zip(run.probes(), run.metrics(), strict=True):
        noise = line["lora_sync/noise_floor"] + line["lora_sync/mismatch_rounding"]
        assert probe["mean"] < 2 * noise and line["lora_sync/mismatch_mean"] < 2 * noise, (probe, line)
        assert noise < 0.05 and line["lora_sync/mismatch_rounding"] > 0, "as quiet as bf16 rounding is"
        assert f"engine and trainer agree at step {probe['step']}" in run.log
    noise = max(line["lora_sync/noise_floor"] for line in run.metrics())
    premises.large_lora(run.probes()[1:], noise)  # a missing adapter would be noticed
    assert run.metrics()[2]["lora_sync/distinguishable"] == 1
    assert run.metrics()[2]["lora_sync/lost_share"] < 0.01, "the update arrives"


@fused("")
def test_the_trainer_is_only_read(run: Run, name: str) -> None:
    for probe in run.probes():
        changed = ("base_changed", "lora_changed_by_sync", "merge_calls", "new_parameter_objects", "shared_storage")
        assert not any(probe[what] for what in changed), probe
        assert probe["loader_calls"] == 0


@fused("_resume")
def test_a_resume_serves_the_checkpoint(run: Run, runs: Runs, name: str) -> None:
    trained = runs.get(name.removesuffix("_resume"))
    source = trained.probes()[CHECKPOINT_STEP]
    probes = run.probes()
    assert [probe["step"] for probe in probes] == [CHECKPOINT_STEP, CHECKPOINT_STEP + 1], run.log[-3000:]
    for probe in probes:  # at learning rate 0
        assert all(probe[what] == source[what] for what in ("tokens", "mean", "lora_sum")), "bit for bit"
    file = trained.output / f"checkpoint-{CHECKPOINT_STEP}" / "adapter_model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert f"SHA-256 {digest}, the trainer's tensors equal the file's" in run.log
    assert f"chain of custody: file (SHA-256 {digest}) = trainer = engine's weights, folded in" in run.log


@fused("_resume")
def test_a_plain_base_in_the_engine_is_noticed(run: Run, name: str) -> None:
    assert run.returncode not in (0, None)
    assert "PolicyMismatchError" in run.log and "[not-applied]" in run.log
    assert "read-back audit of the merged weights" in run.log and "Nothing was generated" in run.log


@newer
@pytest.mark.needs("fused_auto")
def test_auto_measures_takes_the_fused_mode_and_gives_it_up_again(run: Run) -> None:
    assert run.returncode == 0, run.log[-3000:]
    table = run.log.index("auto mode, measured on this run (rounding would lose")
    back = run.log.index("auto mode: rounding now loses")
    assert table < back and "back to the adapter mode, which is exact" in run.log
    rows = [line.split() for line in run.log[table:].splitlines()[1:4]]
    assert [row[0] for row in rows] == ["mode", "adapter", "fused"] and all("tok/s" in row for row in rows[1:])
    rates = [float(row[3].replace(",", "")) for row in rows[1:]]
    premises.premise(rates[0] < rates[1], f"slf_slow_lora.py did not make the LoRA layers slow: {rates} tok/s")
    assert run.log[table:].splitlines()[4] == "chosen: fused."
    places = ["engine's LoRA slots", "engine's weights, folded in", "engine's LoRA slots"]
    said = [line for line in run.log.splitlines() if "chain of custody" in line]
    assert len(said) == 3 and all(place in line for place, line in zip(places, said))
    for probe, line in zip(run.probes(), run.metrics(), strict=True):
        assert probe["mean"] < 3 * line["lora_sync/noise_floor"], probe
        assert probe["base_changed"] == probe["lora_changed_by_sync"] == probe["merge_calls"] == 0
