"""A fork starts with the adapter that it was made from: in the trainer and in the engine, from the first rollout on."""

from __future__ import annotations

import json

import pytest

from tests.support import bounds, premises
from tests.support.driver import Run

from .conftest import CHECKPOINT_STEP, DOUBLE_COUNTS, Runs

pytestmark = pytest.mark.e2e

# either costs a run; both say the same of each release
double_count_only = pytest.mark.skipif(not DOUBLE_COUNTS, reason="shown with the older release")
newer_only = pytest.mark.skipif(DOUBLE_COUNTS, reason="shown with the newer release")


@pytest.mark.needs("fork_fixed", "resume_fixed", "train_fixed")
def test_a_fork_serves_its_source_from_the_first_rollout(run: Run, runs: Runs) -> None:
    assert run.returncode == 0, "it trains, whatever the dtypes"
    source = runs.get("resume_fixed").probes()[0]  # A at the step of the fork: resumed, learning rate 0
    floor = runs.get("train_fixed").probes()[0]
    first = CHECKPOINT_STEP if DOUBLE_COUNTS else 0  # with the trainer's state the step count goes on
    assert [probe["step"] for probe in run.probes()] == [first, first + 1]
    premises.large_lora([source, *run.probes()], floor["mean"])
    for probe in run.probes():
        assert bounds.say_the_same(source, probe, floor)
        if (
            not DOUBLE_COUNTS
        ):  # the engine rounds to bf16 itself, so nothing is lost there; over fp16 it is rounded twice
            assert probe["slots"] == source["slots"] and probe["tokens"] == source["tokens"], "bit for bit"
        assert bounds.agrees(probe, floor), probe
        assert bounds.only_read(probe), probe


@pytest.mark.needs("fork_fixed")
def test_a_fork_says_in_its_log_what_it_is(run: Run, runs: Runs) -> None:
    target = runs.folder / "forks" / "fork_fixed"
    made = json.loads((target / "fork_provenance.json").read_text())
    line = next(line for line in run.log.splitlines() if "LoRA weights from" in line)
    start = "--resume_from_checkpoint" if DOUBLE_COUNTS else "--adapters"
    source = runs.folder / "forks" / "fp16" if DOUBLE_COUNTS else runs.checkpoint
    assert f"{start} {target}" in line and f"a fork of {source} at step {CHECKPOINT_STEP}" in line
    assert made["sha256"] in line and "the trainer's tensors equal the file's" in line
    assert made["dtype"] == ["bfloat16"] and made["source_dtype"] == ["float16" if DOUBLE_COUNTS else "float32"]
    assert run.log.index("LoRA weights from") < run.log.index("{'loss'"), "said before the first batch is trained on"


@newer_only
@pytest.mark.needs("fork_emptied_fixed")
def test_an_emptied_fork_stops_before_any_rollout(run: Run, runs: Runs) -> None:
    made = json.loads((runs.folder / "forks" / "fork_emptied_fixed" / "fork_provenance.json").read_text())
    assert run.returncode not in (0, None)
    assert "AdapterFileError" in run.log and f"the fork was made with {made['sha256']}" in run.log
    assert not run.probes(), "nothing was generated"


@double_count_only
@pytest.mark.needs("fork_emptied_stock")
def test_stock_goes_on_with_an_emptied_fork(run: Run) -> None:
    assert run.returncode == 0
    assert run.probes()[0]["lora_effect"] == 0.0, "the first rollout came from the plain base"
