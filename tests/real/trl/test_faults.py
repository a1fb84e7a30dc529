"""Somebody breaks what the engine serves, one fault a step: each is found before its rollout, named and repaired."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

from tests.support.trl_driver import Run

from .conftest import FAULTS, FUSED_FAULTS

pytestmark = pytest.mark.e2e

MESSAGE = re.compile(r"does not serve the trainer's policy of step (\d+): .*? \[([a-z-]+)\]\..* Repairing")


def named(run: Run) -> dict[int, list[str]]:
    """By step, the causes that were named."""
    found = defaultdict(list)
    for step, cause in MESSAGE.findall(run.log):
        found[int(step)].append(cause)
    return found


@pytest.mark.parametrize(
    "name, faults",
    [
        pytest.param("adapter_faults", FAULTS, marks=pytest.mark.needs("adapter_faults")),
        pytest.param("faults", FUSED_FAULTS, marks=pytest.mark.needs("faults")),
    ],
)
def test_each_fault_is_named_and_repaired(run: Run, name: str, faults: dict[str, str]) -> None:
    assert run.returncode == 0, run.log[-3000:]
    causes = named(run)
    expected = {step: [cause] for step, cause in enumerate(faults.values(), 1) if cause}
    assert causes == expected
    assert (
        "LoRA weights from a PeftModel loaded from" in run.log and "the trainer's tensors equal the file's" in run.log
    )
    for probe in run.probes():
        assert probe["mean"] < 0.03, probe
