"""Real ``swift rlhf --vllm_mode server`` against two real ``swift rollout`` on loopback, on the CPU, without NCCL."""

from __future__ import annotations

import math
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.real.server.conftest import newest, older
from tests.support.driver import PLUGINS, Run
from tests.support.rollout_server import RolloutServer, running
from tests.support.server_runs import assert_serves_the_trainer, killing, trainer

pytestmark = pytest.mark.e2e

TRANSPORT = {"SWIFT_LORA_FIX_TRANSPORT": "reload"}
SAVED, KILLED = 2, 3  # steps: a checkpoint; the rollout before which one server is killed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def servers(model: Path, folder: Path) -> Iterator[list[RolloutServer]]:
    with running([RolloutServer(model, folder / name, environment=TRANSPORT) for name in ("one", "two")]) as servers:
        yield servers


@pytest.fixture(scope="module")
def trained(model: Path, folder: Path, servers: list[RolloutServer]) -> Run:
    """Four steps; before the rollout of step KILLED the second server is killed, and started again."""
    return killing(trainer("train", model, folder, servers, TRANSPORT), servers[1], KILLED)


@pytest.fixture(scope="module")
def resumed(model: Path, folder: Path, servers: list[RolloutServer], trained: Run) -> Run:
    checkpoint = trained.output / f"checkpoint-{SAVED}"
    run = trainer("resumed", model, folder, servers, TRANSPORT, resume_from_checkpoint=checkpoint)
    return run.start()


def test_both_servers_serve_the_trainers_policy_at_every_step(trained: Run) -> None:
    assert_serves_the_trainer(trained)
    assert [probe["step"] for probe in trained.probes()] == [0, 1, 2, 3]
    assert "armed, server mode" in trained.log and trained.log.count("engine and trainer agree at step") == 4
    assert "chain of custody" in trained.log and "2 rollout servers" in trained.log


def test_a_killed_server_that_comes_back_gets_the_policy_again(trained: Run, servers: list[RolloutServer]) -> None:
    assert f"rollout server {servers[1].url} does not serve the policy of step {KILLED}" in trained.log
    assert f"sent the policy of step {KILLED} again to the rollout servers" in trained.log


def test_no_nccl_is_opened(trained: Run, resumed: Run, servers: list[RolloutServer]) -> None:
    for run in (trained, resumed):
        assert "NCCL" not in run.log.replace("VLLM_DISABLE_PYNCCL", "")
    for server in servers:
        assert "POST /update_" not in server.log and "GET /get_world_size/" in server.log, (
            "and was told of nobody there"
        )


def test_a_resumed_run_is_served_from_its_first_rollout(resumed: Run, trained: Run) -> None:
    assert_serves_the_trainer(resumed)
    first, before = resumed.probes()[0], trained.probes()[SAVED]
    assert first["step"] == SAVED and first["policies"] == before["policies"], "the very policy, digest and all"
    assert first["tokens"] == before["tokens"]


@newest
def test_rollouts_in_the_background(model: Path, folder: Path, servers: list[RolloutServer], resumed: Run) -> None:
    """--async_generate: the policy waits for the rollouts under way, and the first sync for none."""
    run = trainer("background", model, folder, servers, TRANSPORT, async_generate="true", max_steps=3)
    run.probe = False  # it would compare with a trainer that has gone on meanwhile
    run.start()
    assert run.returncode == 0, run.log[-4000:]
    synced = run.metrics()
    assert len(synced) >= 2 and "does not serve" not in run.log
    status = requests.get(f"{servers[0].url}/swift_lora_fix/status/", timeout=120).json()
    assert status["policy"]["run"] not in str(resumed.probes()) and status["policy"]["step"] >= 2


@older
def test_rollouts_in_the_background_that_fail_end_the_run(
    model: Path, folder: Path, servers: list[RolloutServer]
) -> None:
    """Up to 4.5.3 ms-swift only logs the error, and the trainer waits for ever for what it asked for."""
    run = trainer("failing", model, folder, servers, TRANSPORT, async_generate="true", max_steps=3)
    run.probe, run.plugins = False, (PLUGINS / "slf_failing_rollout.py",)
    run.start()
    assert run.returncode not in (0, None, -signal.SIGKILL)
    assert "RuntimeError: the rollouts in the background failed" in run.log


@newest
def test_a_server_that_hangs_ends_the_run_with_its_name(
    model: Path, folder: Path, servers: list[RolloutServer], resumed: Run
) -> None:
    """And the other one keeps the policy that it has."""
    run = trainer("hanging", model, folder, servers, TRANSPORT)
    deadline = max(5, math.ceil(20 * max(line["lora_sync/seconds"] for line in resumed.metrics())))
    run.environment["SWIFT_LORA_FIX_SERVER_DEADLINE"] = str(deadline)  # far from what this machine takes
    flag, stopped = folder / "hang", folder / "stopped"
    waits = f"until [ -e {shlex.quote(str(stopped))} ]; do sleep 0.05; done"
    run.environment["SLF_RUN_AT_STEP"] = f"1:touch {shlex.quote(str(flag))}; {waits}"

    def hang() -> None:
        while not flag.exists():
            time.sleep(0.05)
        servers[1].signal(signal.SIGSTOP)
        stopped.touch()

    threading.Thread(target=hang, daemon=True).start()
    try:
        run.start()
    finally:
        servers[1].signal(signal.SIGCONT)
    assert run.returncode not in (0, None, -signal.SIGKILL)
    assert f"{servers[1].url}" in run.log and f"within {deadline} s" in run.log
    served = requests.get(f"{servers[0].url}/swift_lora_fix/status/", timeout=120).json()["policy"]
    assert served["step"] == 1 and served["digest"] not in str(run.probes()), "its rollout was never made"
