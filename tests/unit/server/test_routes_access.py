"""Who may ask a rollout server for what, and what is refused by name."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from swift_lora_fix import errors
from swift_lora_fix.server import hosts
from swift_lora_fix.server.rollout import installing, worker
from swift_lora_fix.server.wire import BYTES, POLICY_HEADER, PREFIX, Holder
from tests.support.parcels import Sent
from tests.support.rollout_routes import (
    KEY,
    MODULE,
    RUN,
    Server,
    adapter,
    announce,
    commit,
    lease,
    leased,
    order,
    policies_of,
    policy,
    refused,
    served_by,
    stage,
    status,
    to,
)


@pytest.fixture
def other() -> Iterator[Holder]:
    """A living process that is another run's trainer."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield hosts.this_process("cd").model_copy(update={"pid": process.pid, "start": hosts._started(process.pid)})
        process.kill()


def test_a_second_trainer_is_refused(server: Server, client: TestClient, served: Sent, other: Holder) -> None:
    refused(lease(client, **other.as_dict()), 409, "StagingError", f"run {RUN} (process {os.getpid()} on", "is alive")
    refused(order(client, "serve", {"plain": True}, run="cd"), 409, "StagingError", "is not run cd's but run ab")
    assert served_by(client) == policy(1, served).as_dict()
    assert lease(client).json()["before"] is None, "its own again"
    refused(client.post("/update_adapter_param/"), 409, "ProtocolError")


def test_a_dead_trainers_server_is_anybodys(open_server: Server, other: Holder) -> None:
    for client in leased(open_server.app):
        sent = adapter(1.0)
        assert stage(client, 1, sent).status_code == commit(client, 1, sent).status_code == 200
        for gone in (
            hosts.this_process(RUN).model_copy(update={"pid": 1 << 21}),  # there is no such process
            hosts.this_process(RUN).model_copy(update={"start": 1}),  # it has another one's number now
            hosts.this_process(RUN).model_copy(update={"host": "another", "name": "elsewhere"}),  # who knows
        ):
            policies_of(open_server).holder = gone
            answer = lease(client, **other.as_dict())
            assert answer.json()["before"] == str(gone), answer.text
            assert served_by(client) is None, "what the other one committed is not its"
            refused(order(client, "serve", {"plain": True}), 409, "StagingError", "is not run ab's but run cd")


def test_nccl_of_a_living_trainer_is_not_taken(open_server: Server, nccl: TestClient, other: Holder) -> None:
    refused(nccl.post("/init_communicator/"), 409, "StagingError", "/init_communicator/ is refused", "is alive")
    refused(nccl.post("/update_adapter_param/"), 409, "StagingError", "is alive")
    policies_of(open_server).holder = hosts.this_process(RUN).model_copy(update={"start": 1})
    assert nccl.post("/init_communicator/").status_code == 200
    assert status(nccl)["holder"] is None


@pytest.mark.parametrize("header", [{}, {"Authorization": "sesame"}, {"Authorization": "Bearer sesam"}])
def test_the_key(server: Server, header: dict[str, str]) -> None:
    with TestClient(server.app, headers=header) as client:
        for verb in ("lease", "push", "prepare", "stage", "receive", "commit", "serve"):
            refused(client.post(f"{PREFIX}/{verb}/", json={}), 401, "AccessError", "SWIFT_LORA_FIX_API_KEY")
        for verb in ("status", "base"):
            refused(client.get(f"{PREFIX}/{verb}/"), 401, "AccessError", "Bearer")


def test_a_body_is_not_read_before_the_key(server: Server) -> None:
    with TestClient(server.app) as client:
        asked: list[int] = []

        def content() -> Iterator[bytes]:
            for index in range(300):
                asked.append(index)
                yield bytes(1 << 20)

        refused(client.post(f"{PREFIX}/stage/", content=content()), 401, "AccessError")


@pytest.mark.parametrize(
    "changes, phrase",
    [
        ({"version": -1}, "policy.version is '-1'"),
        ({"version": "3"}, "policy.version is '3'"),
        ({"version": True}, "policy.version is 'True'"),
        ({"version": 1 << 63}, "policy.version is"),
        ({"step": 1.5}, "policy.step is '1.5'"),
        ({"digest": ""}, "policy.digest is ''"),
        ({"digest": "a b"}, "policy.digest is 'a b'"),
        ({"digest": "x" * 129}, "policy.digest is"),
        ({"run": "0AF1"}, "policy.run is '0AF1'"),
        ({"run": "../x"}, "policy.run is '../x'"),
        ({"run": None}, "policy.run is 'None'"),
        ({"more": 1}, "policy.more is '1'"),
    ],
)
def test_what_is_no_policy_is_named(client: TestClient, changes: Any, phrase: str) -> None:
    named = {**policy(1).as_dict(), **changes}
    refused(order(client, "commit", {"policy": named}), 400, "ProtocolError", phrase)
    answer = client.post("/infer/", headers={POLICY_HEADER: json.dumps(named)})
    assert answer.status_code in (400, 503)


def test_what_is_no_json(client: TestClient, served: Sent) -> None:
    headers = {"Content-Type": "application/json"}
    for body in (b"", b"\xff", b"[]", b"[" * 50_000):
        answer = client.post(f"{PREFIX}/commit/", content=body, headers=headers)
        assert answer.status_code == 400 and answer.json()["error"] == "ProtocolError", answer.text
    for header in ("nonsense", "[" * 50_000, "{}"):
        refused(client.post("/infer/", headers={POLICY_HEADER: header}), 400, "ProtocolError", POLICY_HEADER)
        headers = {"Content-Type": BYTES, POLICY_HEADER: header}
        refused(client.post(f"{PREFIX}/receive/", content=b"", headers=headers), 400, "ProtocolError", POLICY_HEADER)


def test_the_base(server: Server, client: TestClient) -> None:
    first = client.get(f"{PREFIX}/base/").json()
    assert first == {"sums": {f"{MODULE}.weight": ["bfloat16", [6, 8], 0]}, "boot": to(client)["boot"], "epoch": 0}
    Path(server.args.model_dir, "model.safetensors").unlink()
    assert client.get(f"{PREFIX}/base/").json() == first, "computed once"


def test_plain(server: Server, client: TestClient, served: Sent) -> None:
    expected = {POLICY_HEADER: json.dumps(policy(1, served).as_dict())}
    assert order(client, "serve", {"plain": True}).status_code == 200
    assert [c.engine.enable_lora for c in server.connections] == [False, False]
    assert [c.switch.served().request for c in server.connections] == [None, None]
    assert client.post("/infer/").status_code == 200
    refused(client.post("/infer/", headers=expected), 409, "PolicyMismatchError", "the plain base")
    assert commit(client, 1, served).status_code == 200, "repeated"
    assert [c.engine.enable_lora for c in server.connections] == [True, True]
    assert client.post("/infer/", headers=expected).status_code == 200
    other = {POLICY_HEADER: json.dumps(policy(2).as_dict())}
    refused(client.post("/infer/", headers=other), 409, "PolicyMismatchError", "version 2 ", "version 1 ")


def test_old_versions(client: TestClient, served: Sent) -> None:
    assert stage(client, 2, served).status_code == commit(client, 2, served).status_code == 200
    for version, sent in ((1, served), (2, adapter(5.0))):
        refused(announce(client, version, sent), 409, "StagingError", "is not newer")


def test_nccl_routes_are_refused(client: TestClient) -> None:
    refused(client.post("/update_named_param/"), 409, "ProtocolError", "SWIFT_LORA_FIX_TRANSPORT=reload")


def test_a_server_without_lora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(tmp_path, vllm_enable_lora=False)
    logging.getLogger("swift").propagate = True
    with caplog.at_level(logging.WARNING, "swift.lora_fix"):
        installing.install(server)
    assert "stepping aside" in caplog.text and "--vllm_enable_lora true" in caplog.text
    assert TestClient(server.app).get(f"{PREFIX}/status/").status_code == 404
    monkeypatch.setenv("SWIFT_LORA_FIX_TRANSPORT", "reload")
    with pytest.raises(errors.SettingsError, match="--vllm_enable_lora true"):
        installing.install(server)


@pytest.mark.parametrize(
    "arguments, phrase",
    [
        ({"host": "0.0.0.0", "api_key": None}, "without --api_key"),
        ({"host": "::", "api_key": None}, "without --api_key"),
        ({"host": "127.0.0.1", "api_key": None}, ""),
        ({"host": "0.0.0.0"}, "ignores it for its own"),
    ],
)
def test_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture, arguments: Any, phrase: str) -> None:
    logging.getLogger("swift").propagate = True
    with caplog.at_level(logging.WARNING, "swift.lora_fix"):
        installing.install(Server(tmp_path, **arguments))
    assert phrase in caplog.text if phrase else not caplog.text


def test_a_trainer_without_us_is_served_as_before(open_server: Server) -> None:
    with TestClient(open_server.app, headers=KEY) as nccl:
        assert nccl.post("/infer/").status_code == 200, "there may be no policy"
        assert worker.switch_of(open_server.connections[0].engine) is None
        assert nccl.post("/update_named_param/").status_code == 200
        assert status(nccl)["epoch"] == 1
        gone = hosts.this_process(RUN).model_copy(update={"pid": 1 << 21})
        assert lease(nccl, **gone.as_dict()).status_code == 200
        sent = adapter(1.0)
        refused(nccl.post("/infer/"), 503, "EngineStateError", "No policy was committed")
        assert stage(nccl, 1, sent).status_code == commit(nccl, 1, sent).status_code == 200
        assert nccl.post("/update_named_param/").status_code == 200
        assert status(nccl)["epoch"] == 2 and served_by(nccl) is None, "on another base"
        assert stage(nccl, 2, sent).status_code == commit(nccl, 2, sent).status_code == 200
        assert nccl.post("/update_adapter_param/").status_code == 200, "now another trainer's"
        assert served_by(nccl) is None and status(nccl)["holder"] is None
        assert nccl.post("/infer/").status_code == 200
        assert worker.switch_of(open_server.connections[0].engine) is None


def test_a_trainer_with_another_key_changes_nothing(open_server: Server) -> None:
    with TestClient(open_server.app, headers=KEY) as nccl:
        assert lease(nccl, pid=1 << 21).status_code == 200
        sent = adapter(1.0)
        assert stage(nccl, 1, sent).status_code == commit(nccl, 1, sent).status_code == 200
        open_server._require_api_key = None  # type: ignore[attr-defined]  # from 4.6.0 on
        for path in ("/update_adapter_param/", "/update_named_param/"):
            nccl.get(path)
            nccl.post(path, headers={"Authorization": "Bearer other"})
        assert served_by(nccl) == policy(1, sent).as_dict() and status(nccl)["epoch"] == 0
