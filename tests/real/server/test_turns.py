"""Rollouts of several turns, as ms-swift's multi-turn schedulers make them: each turn by the trainer's policy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.real.server.conftest import newest, older
from tests.support import bounds, premises
from tests.support.driver import PLUGINS, Run, this_python
from tests.support.rollout_server import RolloutServer, running
from tests.support.server_runs import assert_serves_the_trainer, trainer

pytestmark = pytest.mark.e2e

SCHEDULER = PLUGINS / "slf_turns.py"
TURNS = {"multi_turn_scheduler": "slf_turns", "max_turns": 2}
TRANSPORT = {"SWIFT_LORA_FIX_TRANSPORT": "reload"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("turns")


def assert_took_turns(run: Run) -> None:
    """The gate's own requests took none: they are no tasks of the scheduler's."""
    assert [line["num_turns"] for line in run.metrics()] == [2.0] * 3
    assert run.log.count("engine and trainer agree at step") == 3


@older
def test_in_a_rollout_server(model: Path, folder: Path) -> None:
    """Which the asynchronous engine makes; stock ms-swift before 4.5.0 makes them without the adapter (9855). Here with
    two tensor-parallel workers, each of which reads and proves the adapter."""
    turns = folder / "turns.txt"
    arguments = {"vllm_use_async_engine": "true", "vllm_tensor_parallel_size": 2, **TURNS}
    awake = {"VLLM_SLEEP_WHEN_IDLE": "1"}  # such workers spin while they wait
    environment = {**TRANSPORT, **awake, "SLF_TURNS_FILE": str(turns)}
    made = RolloutServer(model, folder / "one", arguments, environment, plugins=(SCHEDULER,))
    with running([made]) as servers:
        run = trainer("train", model, folder, servers, TRANSPORT, max_steps=3).start()
    assert_serves_the_trainer(run)
    assert_took_turns(run)
    assert servers[0].log.count("goes straight into vLLM's LoRA slots") == 2
    assert "Consider the following list" not in turns.read_text()


@newest
def test_in_the_trainers_own_engine(model: Path, folder: Path) -> None:
    run = Run("colocated", this_python(), model, folder / "colocated", True, {**TURNS, "max_steps": 3})
    run.plugins = (SCHEDULER,)
    run.environment = {"SWIFT_LORA_FIX_GATE_EVERY": "1"}
    run.start()
    assert run.returncode == 0, run.log[-4000:]
    assert_took_turns(run)
    floor = run.metrics()[0]["lora_sync/noise_floor"]
    assert len(run.probes()) == 2 * 3, "each turn by itself"
    premises.large_lora(run.probes()[2:], floor)
    for probe in run.probes():
        assert probe["mean"] < bounds.MEAN_BOUND * floor, (probe, floor)
        assert probe["base_changed"] == 0.0 and probe["lora_changed_by_sync"] == 0 and probe["merge_calls"] == 0
