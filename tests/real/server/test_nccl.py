"""Server mode over ms-swift's own connections, as it is by default; the wire alone is a stand-in (nccl_over_store)."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.real.server.conftest import newest, older
from tests.support.driver import PLUGINS, REPOSITORY, Run
from tests.support.rollout_server import RolloutServer, running
from tests.support.server_runs import assert_serves_the_trainer, killing, trainer

pytestmark = pytest.mark.e2e

WIRE = {
    "SWIFT_LORA_FIX_TRANSPORT": "",
    "PYTHONPATH": os.pathsep.join(
        [str(REPOSITORY / "tests/support/nccl_over_store"), os.environ.get("PYTHONPATH", "")]
    ),
}
SAVED, KILLED = 2, 3  # steps: a checkpoint; the rollout before which a server, or the trainer, is killed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nccl")


@pytest.fixture(scope="module")
def servers(model: Path, folder: Path) -> Iterator[list[RolloutServer]]:
    """The second one with vLLM's asynchronous engine. The first one's vLLM can be sent a base, which on the CPU takes a
    shim that reaches into its processes. (Tensor parallelism: test_turns.py; over NCCL itself: tests/real/gpu.)"""
    shims = {"SLF_EVERYWHERE": str(PLUGINS / "slf_cpu_shims.py")}
    environment = {**WIRE, "SLF_SPOIL": str(folder / "spoil")}
    made = [
        RolloutServer(model, folder / "one", {}, {**environment, **shims}),
        RolloutServer(model, folder / "two", {"vllm_use_async_engine": "true"}, environment),
    ]
    with running(made) as servers:
        yield servers


@pytest.fixture(scope="module")
def trained(model: Path, folder: Path, servers: list[RolloutServer]) -> Run:
    """Four steps; before the rollout of step KILLED the second server is killed, and started again."""
    return killing(trainer("train", model, folder, servers, WIRE), servers[1], KILLED)


@pytest.fixture(scope="module")
def killed(model: Path, folder: Path, servers: list[RolloutServer], trained: Run) -> Run:
    """It is gone without a good-bye."""
    run = trainer("killed", model, folder, servers, WIRE)
    run.environment["SLF_KILL_AT_STEP"] = str(KILLED)
    assert run.start().returncode == -signal.SIGKILL, run.log[-4000:]
    return run


@pytest.fixture(scope="module")
def resumed(model: Path, folder: Path, servers: list[RolloutServer], killed: Run) -> Run:
    """By the same ports."""
    arguments = {
        "resume_from_checkpoint": killed.output / f"checkpoint-{SAVED}",
        "vllm_server_group_port": killed.arguments["vllm_server_group_port"],
    }
    return trainer("resumed", model, folder, servers, WIRE, **arguments).start()


def status(server: RolloutServer) -> dict[str, object]:
    return dict(requests.get(f"{server.url}/swift_lora_fix/status/", timeout=120).json())


def test_the_servers_serve_the_trainers_policy_at_every_step(trained: Run, servers: list[RolloutServer]) -> None:
    assert_serves_the_trainer(trained)
    assert [probe["step"] for probe in trained.probes()] == [0, 1, 2, 3]
    assert trained.log.count("engine and trainer agree at step") == 4
    for server in servers:
        assert "goes straight into vLLM's LoRA slots" in server.log
        assert "POST /update_" not in server.log, "nor was the base sent, which they have"


def test_a_server_that_comes_back_is_connected_again(trained: Run, servers: list[RolloutServer]) -> None:
    assert f"NCCL to rollout server {servers[1].url} is open again" in trained.log
    assert f"sent the policy of step {KILLED} again to the rollout servers" in trained.log


@newest
def test_after_a_killed_run_the_resumed_one_is_served_from_its_first_rollout(resumed: Run, killed: Run) -> None:
    assert_serves_the_trainer(resumed)
    first, before = resumed.probes()[0], killed.probes()[SAVED]
    assert first["step"] == SAVED and first["policies"] == before["policies"], "the very policy, digest and all"
    assert first["tokens"] == before["tokens"]


@newest
def test_what_arrives_otherwise_is_served_nowhere(
    model: Path, folder: Path, servers: list[RolloutServer], resumed: Run
) -> None:
    run = trainer("spoilt", model, folder, servers, WIRE)
    run.environment["SLF_RUN_AT_STEP"] = f"1:{shlex.join(['touch', str(folder / 'spoil')])}"
    run.start()
    (folder / "spoil").unlink()
    assert run.returncode not in (0, None)
    assert "What arrived has digest" in run.log and servers[0].url in run.log
    assert "agree at step 0" in run.log and "agree at step 2" not in run.log
    served = [status(server)["policy"] for server in servers]
    assert served[0] == served[1] and served[0] is not None, "the last one that both could take"


@older
def test_a_base_of_the_trainers_own_is_sent(
    model: Path, folder: Path, servers: list[RolloutServer], trained: Run
) -> None:
    """PiSSA takes the adapter's beginning out of the base. (One that does not arrive: test_routes.py, where
    what ms-swift's server only logs is told.)"""
    assert not status(servers[0])["epoch"]
    run = trainer("pissa", model, folder, servers[:1], WIRE, init_weights="pissa", max_steps=2)
    run.probe = False
    run.start()
    assert run.returncode == 0, run.log[-4000:]
    assert "the base is sent over NCCL, unmerged" in run.log
    assert run.log.count("engine and trainer agree at step") == 2
    assert status(servers[0])["epoch"] and "/update_adapter" not in servers[0].log
    assert all(line["lora_sync/noise_floor"] < 0.05 for line in run.metrics())
