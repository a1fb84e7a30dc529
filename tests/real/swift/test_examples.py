"""Two of ``examples/``, run: what they start agrees at every sync, and the first one resumes."""

from __future__ import annotations

import pytest

from tests.support import bounds, premises
from tests.support.driver import REPOSITORY, Run

from .conftest import CHECKPOINT_STEP, Runs

pytestmark = pytest.mark.e2e


@pytest.mark.needs("example_resume", "train_fixed")
def test_the_resume_of_the_examples(run: Run, runs: Runs) -> None:
    assert run.returncode == 0, run.log[-3000:]
    assert run.command()[:2] == ["bash", str(REPOSITORY / "examples" / "grpo_resume.sh")]
    floor = runs.get("train_fixed").probes()[0]
    probes = run.probes()
    assert [probe["step"] for probe in probes] == [CHECKPOINT_STEP, CHECKPOINT_STEP + 1]
    premises.large_lora(probes, floor["mean"])
    for probe in probes:
        assert bounds.agrees(probe, floor), probe
        assert bounds.only_read(probe), probe
    assert f"from --resume_from_checkpoint {runs.checkpoint}" in run.log and "engine and trainer agree" in run.log


@pytest.mark.needs("example_fused")
def test_the_fused_and_offloaded_one_of_the_examples(run: Run) -> None:
    assert run.returncode == 0, run.log[-3000:]
    assert run.command()[:2] == ["bash", str(REPOSITORY / "examples" / "grpo_fused_offload.sh")]
    lines = [line for line in run.metrics() if "lora_sync/agrees" in line]
    assert len(lines) == 3 and all(line["lora_sync/agrees"] == 1 for line in lines)
    assert lines[-1]["lora_sync/distinguishable"] == 1, "the adapter is large enough to be missed"
    assert "armed, fused mode" in run.log and run.log.count("engine and trainer agree at step") == 3
