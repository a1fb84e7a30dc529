"""Two data-parallel ranks, each with an engine of its own in its process: with a whole model, and with half of one."""

from __future__ import annotations

import pytest

from tests.support.trl_driver import Run

from .conftest import RANKS

pytestmark = pytest.mark.e2e
ranks = pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.needs(name)) for name in RANKS])


@ranks
def test_both_engines_serve_the_one_policy(run: Run, name: str) -> None:
    assert run.returncode == 0, run.log[-3000:]
    first, second = run.probes(0), run.probes(1)
    assert [probe["step"] for probe in first] == [probe["step"] for probe in second] == [0, 1, 2]
    for probe, other, line in zip(first, second, run.metrics(), strict=True):
        noise = line["lora_sync/noise"]
        assert probe["mean"] < 2.5 * noise and line["lora_sync/agrees"] == 1, (probe, line)
        assert probe["tokens"] == other["tokens"] and probe["mean"] == other["mean"], "one policy"
        assert probe["lora_sum"] == other["lora_sum"], "gradients are those of both"
    assert first[0]["completions"] != second[0]["completions"], "but each makes rollouts of its own"
    assert probe["effect"] > 20 * noise and line["lora_sync/distinguishable"] == 1


@ranks
def test_both_trainers_are_only_read(run: Run, name: str) -> None:
    for probe in (*run.probes(0), *run.probes(1)):
        assert not any(probe[what] for what in ("base_changed", "lora_changed", "merges")), probe
