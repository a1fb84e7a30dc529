"""TRL's GRPO with a plain ``vllm serve`` in a process of its own: each policy goes to it as a folder."""

from __future__ import annotations

import pytest

from tests.support.trl_driver import Run
from tests.support.vllm_serve import VllmServer, running

from .conftest import Runs

pytestmark = pytest.mark.e2e
STEPS = 3


@pytest.fixture(scope="module")
def server(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> VllmServer:
    with running(VllmServer(runs.model, runs.folder / "server")) as found:
        yield found


def run_with(runs: Runs, server: VllmServer, name: str, **options: object) -> Run:
    arguments = {"max_steps": STEPS, "save_steps": 100}
    made = {"model": str(runs.model), "fixed": True, "server": server.url, "arguments": arguments, **options}
    return Run(runs.folder / name, made, {"SWIFT_LORA_FIX_GATE_EVERY": "1"}).start()


def test_each_rollout_comes_from_the_policy_of_its_step(runs: Runs, server: VllmServer) -> None:
    run = run_with(runs, server, "served")
    assert run.returncode == 0, run.log[-3000:]
    assert "armed, server mode: vLLM loads each policy from a folder" in run.log
    names = []
    for probe, line in zip(run.probes(), run.metrics(), strict=True):
        step, noise = probe["step"], line["lora_sync/noise"]
        base, name = probe["held"]
        assert base == str(runs.model) and probe["asked"][-1] == name, "rollouts ask for the one policy that is held"
        assert probe["mean"] < 2.5 * noise and line["lora_sync/mismatch_mean"] < 2.5 * noise, (probe, line)
        assert line["lora_sync/agrees"] == 1 and line["lora_sync/policy_step"] == step
        theirs = line["sampling/sampling_logp_difference/mean"]
        assert line["lora_sync/batch_mean"] == pytest.approx(theirs, rel=1e-3) and 0 < theirs < 2.5 * noise
        assert not any(probe[what] for what in ("base_changed", "lora_changed", "merges")), probe
        names.append(name)
    assert len(set(names)) == STEPS and line["lora_sync/distinguishable"] == 1
    assert probe["effect"] > 20 * noise, "the base, or twice the adapter, would be noticed"


def test_a_server_that_lost_the_policy_makes_no_rollouts(runs: Runs, server: VllmServer) -> None:
    run = run_with(runs, server, "unloaded", faults=["unload"])
    assert run.returncode not in (0, None) and len(run.probes()) == 1
    assert "EngineStateError: The rollout would not use the trainer's LoRA adapter: the vLLM server" in run.log
    assert "Nothing was generated" in run.log


def test_a_server_without_room_for_the_rank_is_said(runs: Runs, server: VllmServer) -> None:
    adapter = {"r": 16, "lora_alpha": 32}
    run = run_with(runs, server, "too_large", lora=adapter)
    said = f"stepping aside: the vLLM server {server.url} has no room for rank 16: start it with --max-lora-rank 16"
    assert run.log.count(said) == 1 and run.returncode not in (0, None), "TRL's own way needs a GPU"
