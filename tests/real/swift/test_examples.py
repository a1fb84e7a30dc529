"""The first of ``examples/``, run: what it starts resumes, and the engine serves the checkpoint's adapter."""

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
