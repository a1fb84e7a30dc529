"""The trainer's side: a policy goes to all rollout servers, or none switches; scripted servers over HTTP."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_lora_fix import errors
from swift_lora_fix.policy import adapter
from swift_lora_fix.server.shared import Memory, Opened
from swift_lora_fix.server.wire import POLICY_HEADER, Address
from tests.support.scripted_servers import (
    FIRST,
    SENT,
    Scripted,
    change,
    send,
    writer_for,
)


def test_every_server_has_it_before_any_switches(model: Any, scripts: list[Scripted]) -> None:
    trainer, writer = writer_for(model, scripts)
    trainer.state.global_step = 7
    digest = send(writer)
    for script in scripts:
        assert script.routes() == FIRST
        assert script.policy == {"version": 1, "step": 7, "digest": digest, "run": script.policy["run"]}
        assert script.digest() == digest and script.calls[2][1]["written"]
    assert writer.is_current()
    assert [json.loads(s.headers[POLICY_HEADER])["version"] for s in trainer.vllm_client.sessions] == [1, 1]
    assert digest == writer.digest_of(adapter.read_to_host(writer.adapter, torch.device("cpu")))
    assert writer._parcel is not None and writer._parcel.host is None, "no memory of the trainer's was needed"
    change(model)
    assert send(writer) != digest and scripts[0].policy["version"] == 2
    assert scripts[0].digest() == scripts[0].policy["digest"]
    assert scripts[0].routes() == [*FIRST, *SENT], "the layout is told once"


def test_a_server_that_cannot_receive_leaves_all_with_the_previous_policy(model: Any, scripts: list[Scripted]) -> None:
    _, writer = writer_for(model, scripts)
    first = send(writer)
    change(model)
    scripts[1].faults["receive"] = [(422, {"error": "StagingError", "message": "worker 0: NaN in q_proj"}, {})]
    with pytest.raises(errors.RolloutServerError, match=f"{scripts[1].url}.*422: worker 0: NaN in q_proj"):
        send(writer)
    assert [script.policy["digest"] for script in scripts] == [first, first] and writer.is_current()


def test_where_one_server_fails_to_switch_nothing_is_generated(model: Any, scripts: list[Scripted]) -> None:
    _, writer = writer_for(model, scripts)
    send(writer)
    change(model)
    scripts[0].faults["commit"] = [(500, {"message": "out of memory"}, {})]
    with pytest.raises(errors.RolloutServerError, match="out of memory"):
        send(writer)
    with pytest.raises(errors.EngineStateError, match="may serve different policies"):
        writer.engine.generate(list)
    digest = send(writer)
    assert [script.policy["digest"] for script in scripts] == [digest] * 2 and writer.is_current()


@pytest.mark.parametrize("host", ["another", ""])
def test_a_server_of_another_host_gets_a_body(model: Any, scripts: list[Scripted], host: str) -> None:
    scripts[1].host = host
    _, writer = writer_for(model, scripts)
    digest = send(writer)
    sizes = [[content.get("size") for route, content in script.calls if route == "receive"] for script in scripts]
    assert sizes[0] == [None] and sizes[1] == [len(scripts[0].content)]
    assert [script.digest() for script in scripts] == [digest] * 2


@pytest.mark.parametrize("elsewhere", [{"pid": 1 << 21}, {"descriptor": 1 << 20}])
def test_where_a_servers_memory_cannot_be_opened_it_goes_as_a_body(
    model: Any, scripts: list[Scripted], elsewhere: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    """It is in another container, or another user's."""
    _, writer = writer_for(model, scripts)
    scripts[1].elsewhere = elsewhere
    logging.getLogger("swift").propagate = True
    caplog.set_level(logging.INFO)
    digest = send(writer)
    assert [script.digest() for script in scripts] == [digest] * 2
    assert scripts[1].calls[-2][1]["size"] == len(scripts[0].content)
    assert f"{scripts[1].url} gets the adapter as a body: The adapter's shared memory /proc/" in caplog.text


def test_nothing_is_left_of_a_server_that_is_killed(tmp_path: Path) -> None:
    """Neither a name nor, once its trainer has another one's open, memory."""
    code = (
        "import os, signal, sys; from swift_lora_fix.server.shared import Memory; "
        "made = Memory(1 << 26); print(made.address.model_dump_json(), flush=True); sys.stdin.read()"
    )
    for number in (signal.SIGTERM, signal.SIGKILL):
        names, before = set(os.listdir("/dev/shm")), shmem()
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            address = Address.model_validate_json(process.stdout.readline())
            opened = Opened()
            assert opened.at(address, pins=False).numel() == 1 << 26 and shmem() - before > 50 << 10
            assert set(os.listdir("/dev/shm")) <= names
            process.send_signal(number)
            process.wait()
        with pytest.raises(errors.StagingError, match="cannot be opened here"):
            opened.at(address, pins=False)
        another = Memory(8)
        opened.at(another.address, pins=False)
        deadline = time.monotonic() + 10
        while shmem() - before > 32 << 10 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert shmem() - before < 32 << 10 and set(os.listdir("/dev/shm")) <= names


def shmem() -> int:
    """Shared memory of this host, in KiB."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("Shmem:"))
    return int(line.split()[1])


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says(model: Any, scripts: list[Scripted], status: int) -> None:
    _, writer = writer_for(model, scripts)
    scripts[0].faults["stage"] = [(status, {"detail": "starting"}, {"Retry-After": "1"})]
    started = time.monotonic()
    send(writer)
    assert time.monotonic() - started >= 1 and writer.is_current()


def test_a_server_that_hangs_is_named_within_the_deadline(model: Any, scripts: list[Scripted]) -> None:
    _, writer = writer_for(model, scripts)
    scripts[1].faults["stage"] = [lambda: time.sleep(4)]
    started = time.monotonic()
    with pytest.raises(errors.RolloutServerError, match=f"{scripts[1].url}.*within 3 s.*SERVER_DEADLINE.*ReadTimeout"):
        send(writer)
    assert time.monotonic() - started < 10 and all(script.policy is None for script in scripts)


def test_values_that_are_not_finite_are_not_sent(model: Any, scripts: list[Scripted]) -> None:
    _, writer = writer_for(model, scripts)
    with torch.no_grad():
        writer.adapter.parameters[0][0, 0] = float("nan")
    with pytest.raises(errors.NonFiniteAdapterError):
        send(writer)
    assert scripts[0].routes() == []
