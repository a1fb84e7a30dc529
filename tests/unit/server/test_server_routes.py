"""The routes of a rollout server, all workers or none: real memory and a real stager, no processes, no vLLM engine."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient

from swift_lora_fix import errors
from swift_lora_fix.engine.port import WriteReport
from swift_lora_fix.engine.vllm.handle import ADAPTER_ID
from swift_lora_fix.server import hosts
from swift_lora_fix.server import wire as protocol
from swift_lora_fix.server.rollout import checks, installing, receiver, routes, worker
from swift_lora_fix.server.wire import (
    BYTES,
    EXTENSION,
    METHOD,
    POLICY_HEADER,
    PREFIX,
    RPC,
    Holder,
    Layout,
    Policy,
)
from tests.support import light_server
from tests.support.parcels import Sent, staged, write

MODULE = "model.layers.0.self_attn.q_proj"
CONFIGURATION = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "peft_type": "LORA", "bias": "none"}
A, B = (f"base_model.model.{MODULE}.lora_{side}.weight" for side in "AB")
KEY = {"Authorization": "Bearer sesame"}
SWIFTS = "swift.pipelines.infer.rollout.WeightSyncWorkerExtension"
RUN = "ab"


class Slots(light_server.Slots):
    """``loads`` of its worker: the adapters that it served, by what their A begins with."""

    def __init__(self, engine: Any, adapter: Any, *_: Any) -> None:
        super().__init__(engine, adapter)
        self.engine = engine

    def write(self) -> WriteReport:
        report = super().write()
        self.engine.worker.loads.append(self.held[A][0, 0].item())
        return report

    write_by_reference = write


@pytest.fixture(autouse=True)
def slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "AdapterWriter", Slots)
    monkeypatch.setattr(receiver, "_request_class", lambda worker: None)


class FakeLLM:
    """What a switch asks of vLLM, with a real `Receiver` in its worker. ``rpcs``: what that was asked; ``fail`` is
    raised by the next ones."""

    def __init__(self, model: Path) -> None:
        self.vllm_config = SimpleNamespace(
            lora_config=SimpleNamespace(max_lora_rank=4, lora_dtype=torch.bfloat16),
            model_config=SimpleNamespace(model=str(model)),
        )
        self.loads: list[float] = []
        manager = SimpleNamespace(_load_adapter=lambda request: request)
        runner = SimpleNamespace(device=torch.device("cpu"), lora_manager=manager)
        self.worker = SimpleNamespace(
            model_runner=runner, vllm_config=self.vllm_config, communicator=None, client_rank=1, loads=self.loads
        )
        self.receiver = receiver.Receiver(self.worker)
        self.rpcs: list[tuple[str, dict[str, Any]]] = []
        self.unfinished = False
        self.output_processor = SimpleNamespace(has_unfinished_requests=lambda: self.unfinished)
        self.fail: list[Exception] = []
        self.resets = True

    def reset_prefix_cache(self) -> bool:
        return self.resets

    def collective_rpc(self, method: str, args: Any = (), kwargs: Any = None) -> list[None]:
        assert method == RPC
        arguments = dict(kwargs)
        command = arguments.pop("command")
        self.rpcs.append((command, arguments))
        if self.fail:
            raise self.fail.pop(0)
        try:
            getattr(self.receiver, command)(**arguments)
        except Exception as error:
            raise broken(error) from error
        return [None]


class FakeAsyncLLM(FakeLLM):
    async def reset_prefix_cache(self) -> bool:  # type: ignore[override]
        return super().reset_prefix_cache()

    async def collective_rpc(self, method: str, args: Any = (), kwargs: Any = None) -> list[None]:  # type: ignore[override]
        return super().collective_rpc(method, args, kwargs)


class FakeConnection:
    """A worker in this process: what ``llm_worker`` does with an order. ``sending``, ``answering``: set while it takes
    orders, and while it answers them."""

    def __init__(self, model: Path) -> None:
        self.engine = SimpleNamespace(engine=FakeLLM(model), enable_lora=True)
        build = SimpleNamespace(vllm_use_async_engine=False)
        worker.build_engine(lambda arguments: self.engine, build)
        self.answers: list[Any] = []
        self.orders: list[str] = []
        self.is_gone = self.is_mute = False
        self.sending, self.answering = threading.Event(), threading.Event()
        self.sending.set()
        self.answering.set()

    @property
    def llm(self) -> FakeLLM:
        return self.engine.engine  # type: ignore[no-any-return]

    @property
    def switch(self) -> worker.Switch:
        found: worker.Switch = vars(self.engine)[worker._SWITCH]
        return found

    def send(self, order: dict[str, Any]) -> None:
        if self.is_gone:
            raise BrokenPipeError
        self.sending.wait()
        assert order["type"] == "call" and not self.answers
        self.orders.append((order["kwargs"].get("rpc") or {}).get("command", ""))
        method = getattr(self.engine, order["method"])
        self.answers.append(None if self.is_mute else method(*order["args"], **order["kwargs"]))

    def recv(self) -> Any:
        self.answering.wait()
        return self.answers.pop()


class Server:
    """What the routes see of ms-swift's ``SwiftRolloutDeploy``; ``folder`` has a model of one layer."""

    def __init__(self, folder: Path, workers: int = 2, **arguments: Any) -> None:
        safetensors.torch.save_file({f"{MODULE}.weight": torch.zeros(6, 8)}, str(folder / "model.safetensors"))
        defaults = dict(
            api_key="sesame",
            vllm_enable_lora=True,
            vllm_max_lora_rank=4,
            model="a-model",
            model_dir=str(folder),
            torch_dtype=torch.bfloat16,
            host="127.0.0.1",
            port=8000,
        )
        self.args = SimpleNamespace(**{**defaults, **arguments})
        self.num_connections = workers
        self.connections = [FakeConnection(folder) for _ in range(workers)]
        self.app = FastAPI()
        for path in ("infer", "update_named_param", "update_adapter_param", "init_communicator", "health"):
            self.app.post(f"/{path}/")(self.infer)

    async def infer(self) -> str:
        return "rollouts"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("SWIFT_LORA_FIX_MAX_MIB", "1")
    monkeypatch.setenv("SWIFT_LORA_FIX_TRANSPORT", "reload")
    made = Server(tmp_path)
    installing.install(made)
    return made


def leased(app: FastAPI) -> Iterator[TestClient]:
    """For the run ``RUN`` of this process."""
    with TestClient(app, headers=KEY) as made:
        assert lease(made).status_code == 200
        yield made


@pytest.fixture
def client(server: Server) -> Iterator[TestClient]:
    yield from leased(server.app)


def adapter(value: float, digest: str | None = None, config: Any = None, **tensors: Any) -> Sent:
    """Its A begins with ``value``."""
    content = {A: torch.full((2, 8), value), B: torch.ones(6, 2), **tensors}
    return staged({n: t.bfloat16() for n, t in content.items() if t is not None}, config or CONFIGURATION, digest)


def policy(version: int, sent: Sent | None = None) -> Policy:
    return Policy(version=version, step=10 * version, digest=sent.digest if sent else f"digest-{version}", run=RUN)


def to(client: TestClient, **changes: Any) -> dict[str, Any]:
    told = status(client)
    return {"boot": told["boot"], "epoch": told["epoch"], "run": RUN, **changes}


def order(client: TestClient, route: str, content: dict[str, Any], **changes: Any) -> Any:
    return client.post(f"{PREFIX}/{route}/", json={"to": to(client, **changes), **content})


def lease(client: TestClient, run: str = RUN, **changes: Any) -> Any:
    holder = hosts.this_process(run).model_copy(update=changes)
    return client.post(f"{PREFIX}/lease/", json={"holder": holder.as_dict()})


def prepare(client: TestClient, sent: Sent) -> Any:
    return order(client, "prepare", {"layout": sent.layout.as_dict()})


def announce(client: TestClient, version: int, sent: Sent, nccl: bool = False) -> Any:
    """After the server has made room for it; and written into its memory."""
    answer = prepare(client, sent)
    if answer.status_code == 200:
        answer = order(client, "stage", {"policy": policy(version, sent).as_dict(), "nccl": nccl})
        if answer.status_code == 200 and not nccl:
            write(answer.json()["memory"], sent)
    return answer


def receive(client: TestClient, version: int, sent: Sent, written: bool = True) -> Any:
    return order(client, "receive", {"policy": policy(version, sent).as_dict(), "written": written})


def send_body(client: TestClient, version: int, sent: Sent, content: Any = None) -> Any:
    about = {"to": to(client), "policy": policy(version, sent).as_dict()}
    headers = {"Content-Type": BYTES, POLICY_HEADER: json.dumps(about)}
    return client.post(f"{PREFIX}/receive/", content=sent.body if content is None else content, headers=headers)


def stage(client: TestClient, version: int, sent: Sent) -> Any:
    """Announced, and received from the server's memory."""
    answer = announce(client, version, sent)
    return receive(client, version, sent) if answer.status_code == 200 else answer


def commit(client: TestClient, version: int, sent: Sent, **more: Any) -> Any:
    return order(client, "commit", {"policy": policy(version, sent).as_dict(), **more})


def status(client: TestClient) -> dict[str, Any]:
    return dict(client.get(f"{PREFIX}/status/", headers=KEY).json())


def served_by(client: TestClient) -> Any:
    return status(client)["policy"]


def refused(response: Any, code: int, kind: str, *phrases: str) -> None:
    assert (response.status_code, response.json()["error"]) == (code, kind), response.text
    assert all(phrase in response.json()["message"] for phrase in phrases), response.text


def rpcs(server: Server) -> list[list[str]]:
    """What vLLM's workers were asked, but for room: that they make once for a layout."""
    return [[name for name, _ in connection.llm.rpcs if name != "prepare"] for connection in server.connections]


def broken(error: Exception) -> RuntimeError:
    """As vLLM passes on what a worker raised."""
    return RuntimeError(f"Call to collective_rpc method failed: {receiver._tell(error)}")


@pytest.fixture
def served(server: Server, client: TestClient) -> Sent:
    """Version 1, whose A begins with 1, is what both workers serve."""
    sent = adapter(1.0)
    assert stage(client, 1, sent).status_code == 200
    assert commit(client, 1, sent).status_code == 200
    return sent


# ---- the way it goes -----------------------------------------------------------------------------------------------


def test_all_workers_serve_what_was_received(server: Server, client: TestClient, served: Sent) -> None:
    assert [c.llm.loads for c in server.connections] == [[1.0], [1.0]]
    assert served_by(client) == policy(1, served).as_dict() and status(client)["workers"] == 2
    second = adapter(2.0)
    assert stage(client, 2, second).status_code == 200
    assert [c.llm.loads for c in server.connections] == [[1.0], [1.0]], "staging touches no engine"
    assert served_by(client) == policy(1, served).as_dict()
    assert commit(client, 2, second).status_code == commit(client, 2, second).status_code == 200
    assert [c.llm.loads for c in server.connections] == [[1.0, 2.0]] * 2, "the second commit loads nothing"
    infos = [c.switch.served().infos() for c in server.connections]
    assert [(i["policy_version"], i["server_boot"], i["server_epoch"]) for i in infos] == [
        (2, status(client)["boot"], 0)
    ] * 2
    assert rpcs(server) == [["receive", "serve"] * 2] * 2


def test_what_is_repeated_is_done_once(server: Server, client: TestClient) -> None:
    """The trainer did not hear the answer."""
    sent = adapter(1.0)
    assert [announce(client, 1, sent).status_code for _ in range(2)] == [200] * 2
    assert [receive(client, 1, sent).status_code for _ in range(2)] == [200] * 2
    assert [commit(client, 1, sent).status_code for _ in range(2)] == [200] * 2
    assert rpcs(server)[0] == ["receive", "serve"]
    assert stage(client, 1, sent).status_code == commit(client, 1, sent).status_code == 200


def test_the_layout_is_told_once_for_each_lease(server: Server, client: TestClient, served: Sent) -> None:
    named = {"policy": policy(2, served).as_dict(), "nccl": False}
    room = [c.llm.receiver.received for c in server.connections]
    assert order(client, "stage", named).status_code == prepare(client, served).status_code == 200
    assert lease(client).status_code == 200
    refused(order(client, "stage", named), 409, "StagingError", "has made no room", "its layout first")
    assert prepare(client, served).status_code == order(client, "stage", named).status_code == 200
    assert room == [c.llm.receiver.received for c in server.connections], "the same buffer"


def test_bytes_in_the_body(server: Server, client: TestClient) -> None:
    sent = adapter(3.0)
    assert announce(client, 1, sent).status_code == 200
    refused(send_body(client, 1, sent, sent.body[:-4]), 422, "StagingError", "has 60 bytes where 64 were announced")
    assert [c.orders[-1] for c in server.connections] == ["prepare"] * 2, "what is cut is not shown to the workers"
    assert send_body(client, 1, sent).status_code == commit(client, 1, sent).status_code == 200
    assert [c.llm.loads for c in server.connections] == [[3.0], [3.0]]


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large(client: TestClient, announced: bool) -> None:
    sent = adapter(1.0)
    assert announce(client, 1, sent).status_code == 200
    content: Any = sent.body * 2 if announced else iter([sent.body, sent.body])
    refused(send_body(client, 1, sent, content), 413, "StagingError", "128 bytes or more where 64")
    config = {**CONFIGURATION, "target_modules": ["q_proj"] * (17 << 18)}
    refused(
        announce(client, 1, replace(sent, layout=sent.layout.model_copy(update={"config": config}))),
        413,
        "StagingError",
    )


def test_an_adapter_that_is_too_large(server: Server, client: TestClient) -> None:
    refused(announce(client, 1, adapter(1.0, **{A: torch.ones(2, 1 << 19)})), 413, "StagingError", "MAX_MIB (now 1)")
    assert not any(c.llm.rpcs for c in server.connections)


def test_one_memory_for_all_policies_of_a_layout(server: Server, client: TestClient) -> None:
    """Written by the trainer or as bodies; another layout or another trainer gets another."""
    sent, other = adapter(1.0), adapter(2.0)
    memory = announce(client, 1, sent).json()["memory"]
    assert memory["size"] == len(sent.body)
    assert send_body(client, 1, sent).status_code == commit(client, 1, sent).status_code == 200
    again = order(client, "stage", {"policy": policy(2, other).as_dict(), "nccl": False}).json()["memory"]
    assert again == memory
    refused(receive(client, 2, other), 422, "StagingError", f"has digest {sent.digest}, {other.digest} was announced")
    assert served_by(client)["version"] == 1, "the one that it has"
    for renewed in (partial(prepare, client, sent), partial(lease, client)):
        assert policies_of(server).memory is not None
        assert renewed().status_code == 200 and policies_of(server).memory is None
        assert stage(client, 2, other).status_code == 200


def test_a_body_that_was_to_come_over_nccl(open_server: Server, nccl: TestClient) -> None:
    sent = adapter(1.0)
    wired(open_server, sent)
    assert announce(nccl, 1, sent, nccl=True).json().get("memory") is None
    refused(send_body(nccl, 1, sent), 409, "StagingError", "announced to come over NCCL, and came as a body")


def test_by_reference(server: Server, client: TestClient) -> None:
    sent = adapter(1.0)
    assert stage(client, 1, sent).status_code == 200
    refused(commit(client, 1, sent, by_reference="yes"), 400, "ProtocolError", "by_reference is 'yes'")
    assert commit(client, 1, sent, by_reference=True).status_code == 200
    assert server.connections[0].llm.rpcs[-1][1]["by_reference"] is True


# ---- which process, and which base ---------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"boot": "0" * 16}, {"epoch": 1}])
def test_orders_for_another_process_or_base_are_refused(server: Server, client: TestClient, changes: Any) -> None:
    sent = adapter(1.0)
    named = policy(1, sent).as_dict()
    orders: list[tuple[str, dict[str, Any]]] = [
        ("prepare", {"layout": sent.layout.as_dict()}),
        ("stage", {"policy": named, "nccl": False}),
        ("receive", {"policy": named, "written": True}),
        ("commit", {"policy": named}),
        ("serve", {"plain": True}),
        ("push", {"ends": False}),
    ]
    for route, content in orders:
        refused(order(client, route, content, **changes), 412, "StagingError", "it restarted, or its base was written")
        if route != "push":
            answer = order(client, route, content)
            assert answer.status_code == 200
            if route == "stage":
                write(answer.json()["memory"], sent)


def test_a_base_that_is_written_over_ends_the_policy(open_server: Server, nccl: TestClient) -> None:
    """By its own trainer, which says so before and after."""
    sent = adapter(1.0)
    assert stage(nccl, 1, sent).status_code == commit(nccl, 1, sent).status_code == 200
    refused(nccl.post("/update_named_param/"), 409, "StagingError", "is alive")
    assert order(nccl, "push", {"ends": False}).json()["epoch"] == 1
    assert served_by(nccl) is None
    refused(nccl.post("/infer/"), 503, "EngineStateError")
    refused(announce(nccl, 2, sent), 409, "StagingError", "begun to be sent to this server and not ended")
    assert nccl.post("/update_named_param/").status_code == 200
    assert order(nccl, "push", {"ends": True}).json()["epoch"] == 1
    assert stage(nccl, 2, sent).status_code == commit(nccl, 2, sent).status_code == 200


def test_what_ms_swift_only_logs_is_told(open_server: Server, nccl: TestClient) -> None:
    """Each time that it is asked: the answer may have been lost."""
    assert order(nccl, "push", {"ends": False}).status_code == 200
    open_server.connections[1].llm.receiver.failures.append("RuntimeError: no such parameter")
    for _ in range(2):
        refused(order(nccl, "push", {"ends": True}), 500, "EngineStateError", "1 updates over NCCL failed", "no such")
    refused(announce(nccl, 2, adapter(1.0)), 409, "StagingError", "not ended")
    assert order(nccl, "push", {"ends": False}).status_code == order(nccl, "push", {"ends": True}).status_code == 200


# ---- whose server it is --------------------------------------------------------------------------------------------


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


def policies_of(server: Server) -> routes.Policies:
    found: routes.Policies = server.app.user_middleware[0].kwargs["policies"]
    return found


def test_nccl_of_a_living_trainer_is_not_taken(open_server: Server, nccl: TestClient, other: Holder) -> None:
    refused(nccl.post("/init_communicator/"), 409, "StagingError", "/init_communicator/ is refused", "is alive")
    refused(nccl.post("/update_adapter_param/"), 409, "StagingError", "is alive")
    policies_of(open_server).holder = hosts.this_process(RUN).model_copy(update={"start": 1})
    assert nccl.post("/init_communicator/").status_code == 200
    assert status(nccl)["holder"] is None


# ---- one of the workers fails --------------------------------------------------------------------------------------


def test_one_worker_that_cannot_stage(server: Server, client: TestClient, served: Sent) -> None:
    server.connections[1].llm.vllm_config.lora_config.max_lora_rank = 1
    sent = adapter(2.0, config={**CONFIGURATION, "target_modules": ["k_proj"]})  # another layout: it is looked at
    refused(stage(client, 2, sent), 422, "StagingError", "has rank 2, this server has room for 1")
    refused(receive(client, 2, sent), 409, "StagingError", "was not announced")
    refused(commit(client, 2, sent), 409, "StagingError", "nothing is staged")
    assert served_by(client) == policy(1, served).as_dict()


def test_one_worker_that_does_not_get_it(server: Server, client: TestClient, served: Sent) -> None:
    sent = adapter(2.0)
    assert announce(client, 2, sent).status_code == 200
    server.connections[1].llm.fail = [broken(errors.StagingError("What arrived has digest x."))]
    refused(receive(client, 2, sent), 422, "StagingError", "What arrived has digest x.")
    refused(commit(client, 2, sent), 409, "StagingError", "nothing is staged")
    assert served_by(client) == policy(1, served).as_dict(), "which goes on"
    assert client.post("/infer/", headers={POLICY_HEADER: json.dumps(served_by(client))}).status_code == 200


@pytest.mark.parametrize("failing", [0, 1])
def test_one_worker_that_cannot_commit(server: Server, client: TestClient, served: Sent, failing: int) -> None:
    """None serves anything until it is told again."""
    sent = adapter(2.0)
    assert stage(client, 2, sent).status_code == 200
    server.connections[failing].llm.fail = [errors.UnsupportedAdapterError("vLLM says no.")]
    refused(commit(client, 2, sent), 500, "UnsupportedAdapterError", "vLLM says no.", "serves nothing until another")
    assert served_by(client) is None
    refused(client.post("/infer/"), 503, "EngineStateError")
    for connection in server.connections:
        with pytest.raises(errors.EngineStateError, match="No policy was committed"):
            connection.switch.served()
    third = adapter(3.0)
    assert stage(client, 3, third).status_code == commit(client, 3, third).status_code == 200
    assert [c.llm.loads[-1] for c in server.connections] == [3.0, 3.0]


def test_a_cache_that_is_not_reset(server: Server, client: TestClient, served: Sent) -> None:
    sent = adapter(2.0)
    assert stage(client, 2, sent).status_code == 200
    server.connections[1].llm.resets = False
    refused(commit(client, 2, sent), 500, "CacheResetError", "reset_prefix_cache()", "serves nothing")


def test_requests_that_are_not_finished(server: Server, client: TestClient, served: Sent) -> None:
    sent = adapter(2.0)
    assert stage(client, 2, sent).status_code == 200
    server.connections[0].llm.unfinished = True
    refused(order(client, "serve", {"plain": True}), 500, "EngineStateError", "unfinished requests")
    assert status(client)["plain"] is False and [c.engine.enable_lora for c in server.connections] == [True, True]
    assert served_by(client) is None
    assert stage(client, 3, sent).status_code == 200
    refused(commit(client, 3, sent), 500, "EngineStateError", "unfinished requests", "serves nothing")


def test_workers_that_ended_or_do_not_know_us(server: Server, client: TestClient, served: Sent) -> None:
    sent = adapter(2.0)
    server.connections[0].is_mute = True
    refused(stage(client, 2, sent), 500, "EngineStateError", "Worker 0", "its log says why")
    server.connections[0].is_mute = False
    assert stage(client, 2, sent).status_code == 200
    server.connections[1].is_gone = True
    refused(commit(client, 2, sent), 500, "EngineStateError", "Worker 1 of this rollout server has ended", "nothing")
    assert served_by(client) is None


@pytest.mark.parametrize("what", ["sending", "answering"])
def test_a_worker_that_hangs(server: Server, client: TestClient, served: Sent, what: str) -> None:
    """Its pipe takes no order, or brings no answer: the next answer would be to something else, ms-swift's rollouts
    too. Meanwhile the server answers what needs no worker."""
    policies_of(server).workers._seconds = 1
    sent = adapter(2.0)
    assert announce(client, 2, sent).status_code == 200
    hangs = getattr(server.connections[0], what)
    hangs.clear()
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(receive(client, 2, sent)))
    thread.start()
    started = time.monotonic()
    assert client.post("/health/").status_code == 200 and time.monotonic() - started < 0.5
    thread.join()
    refused(answers[0], 500, "EngineStateError", "Worker 0", "restart the server")
    hangs.set()
    refused(announce(client, 3, sent), 500, "EngineStateError", "Worker 0")
    refused(client.post("/infer/"), 500, "EngineStateError", "Worker 0")
    refused(client.post("/infer/", headers={POLICY_HEADER: json.dumps(served_by(client))}), 500, "EngineStateError")


# ---- over NCCL -----------------------------------------------------------------------------------------------------


@pytest.fixture
def open_server(tmp_path: Path) -> Server:
    """Where no transport is asked for by name."""
    made = Server(tmp_path)
    installing.install(made)
    return made


@pytest.fixture
def nccl(open_server: Server) -> Iterator[TestClient]:
    yield from leased(open_server.app)


def test_an_adapter_comes_over_nccl(open_server: Server, nccl: TestClient) -> None:
    sent = adapter(1.0)
    wired(open_server, sent)
    assert announce(nccl, 1, sent, nccl=True).status_code == 200
    refused(commit(nccl, 1, sent), 409, "StagingError", "nothing is staged")
    refused(receive(nccl, 2, sent, False), 409, "StagingError", "was not announced")
    assert receive(nccl, 1, sent, False).status_code == commit(nccl, 1, sent).status_code == 200
    assert rpcs(open_server) == [["check_nccl", "receive", "serve"]] * 2
    assert [c.llm.loads for c in open_server.connections] == [[1.0], [1.0]]
    request = open_server.connections[0].switch.served().request
    assert (request.lora_int_id, request.load_inplace) == (ADAPTER_ID, False)


def wired(server: Server, sent: Sent) -> None:
    """NCCL is open to both workers, and brings this adapter."""
    for connection in server.connections:
        connection.llm.worker.communicator = SimpleNamespace(
            device="cpu", broadcast=lambda content, src, stream: content.copy_(sent.memory.tensor)
        )


def test_a_server_without_nccl_says_so_and_takes_it_otherwise(
    open_server: Server, nccl: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = adapter(1.0)
    refused(announce(nccl, 1, sent, nccl=True), 501, "StagingError", "no NCCL connection")
    assert stage(nccl, 1, sent).status_code == commit(nccl, 1, sent).status_code == 200
    wired(open_server, sent)
    assert announce(nccl, 2, sent, nccl=True).status_code == 200
    open_server.connections[1].llm.worker.communicator.device = "cuda:0"
    refused(announce(nccl, 2, sent, nccl=True), 501, "StagingError", "no room for the adapter on their devices")


IN_A = f"base_model.model.{MODULE.replace('q_proj', 'in_A_proj')}"


@pytest.mark.parametrize(
    "tensors, changes, status_code, phrase",
    [
        ({B: torch.ones(6, 3)}, {}, 422, "A has rank 2 and B 3"),
        ({B: torch.ones(7, 2)}, {}, 422, "are for (7, 8)"),
        ({B: None}, {}, 422, "has only lora_A"),
        ({A: None, B: None, "a.b": torch.ones(2, 2)}, {}, 422, "no LoRA matrix"),
        ({f"{IN_A}.lora_A.weight": torch.ones(2, 8), f"{IN_A}.lora_B.weight": torch.ones(5, 2)}, {}, 422, "in_A_proj"),
        ({}, {"dtype": "int8"}, 422, "in bfloat16, not in int8"),
        ({}, {"dtype": "float32"}, 422, "in bfloat16, not in float32"),
        ({}, {"config": {**CONFIGURATION, "use_dora": True}}, 422, "DoRA"),
        ({}, {"entries": ()}, 422, "has no tensors"),
        ({}, {"config": {**CONFIGURATION, "r": 1, "lora_alpha": 1}}, 422, "rank 2"),
        ({}, {"config": {**CONFIGURATION, "lora_alpha": 4}}, 400, "r=2 and lora_alpha=4: the scaling is in B"),
    ],
)
def test_what_is_announced_is_checked_before_any_byte(
    tmp_path: Path, open_server: Server, nccl: TestClient, tensors: Any, changes: Any, status_code: int, phrase: str
) -> None:
    weights = {f"{m}.weight": torch.zeros(6, 8) for m in (MODULE, MODULE.replace("q_proj", "in_A_proj"))}
    safetensors.torch.save_file(weights, str(tmp_path / "model.safetensors"))
    sent = adapter(1.0, **tensors)
    answer = announce(nccl, 1, replace(sent, layout=sent.layout.model_copy(update=changes)), nccl=True)
    assert answer.status_code == status_code and phrase in answer.json()["message"], answer.text
    assert rpcs(open_server) == [[], []]
    assert receive(nccl, 1, sent, False).status_code == 409


def test_a_layout_that_is_none(nccl: TestClient) -> None:
    sent = adapter(1.0)
    for layout in (None, [], {"dtype": "bfloat16"}, {**sent.layout.as_dict(), "more": 1}):
        refused(order(nccl, "prepare", {"layout": layout}), 400, "ProtocolError", "layout")
    shape = {**sent.layout.as_dict(), "entries": [[A, [0, 8]]]}
    refused(order(nccl, "prepare", {"layout": shape}), 400, "ProtocolError", "entries.0.1.0 is '0'", "greater than 0")


# ---- who may ask, and for what -------------------------------------------------------------------------------------


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


# ---- in the worker -------------------------------------------------------------------------------------------------


async def _turns(infer_requests: list[Any]) -> list[Any]:
    return [SimpleNamespace(rollout_infos={"num_turns": 2}) for _ in infer_requests]


async def _answers(infer_requests: list[Any]) -> list[Any]:
    return [SimpleNamespace(rollout_infos={}) for _ in infer_requests]


def test_an_asynchronous_engine_and_its_scheduler(server: Server) -> None:
    import asyncio

    engine = SimpleNamespace(engine=FakeAsyncLLM(server.args.model_dir), enable_lora=True)
    engine.async_infer = _answers
    worker.build_engine(lambda arguments: engine, SimpleNamespace(vllm_use_async_engine=True))
    scheduler = SimpleNamespace(infer_engine=engine, async_infer=_turns)
    worker.tag_scheduler(scheduler)
    sent, command = adapter(4.0), getattr(engine, METHOD)
    rpcs: list[dict[str, Any]] = [
        {"command": "prepare", "layout": sent.layout.as_dict()},
        {"command": "receive", "digest": sent.digest, "memory": sent.memory.address.as_dict()},
        {"command": "serve", "digest": sent.digest},
    ]
    serves = {"boot": "b00", "epoch": 3, "plain": False, "policy": policy(1, sent).as_dict()}
    sample, probe = SimpleNamespace(uuid="f00"), {"uuid": f"{protocol.PROBE}0"}
    nobody = SimpleNamespace(uuid=None, messages=[{"role": "user", "content": "<placeholder>"}])

    async def everything() -> list[Any]:
        with pytest.raises(errors.EngineStateError):
            await scheduler.async_infer([sample])
        for rpc in rpcs:
            answer = await command(serves=serves, ours=True, switches=rpc["command"] == "serve", rpc=rpc)
            assert "error" not in answer, answer
        return [output for asked in (sample, probe, nobody) for output in await scheduler.async_infer([asked])]

    output, answer, none = asyncio.run(everything())
    assert answer.rollout_infos == none.rollout_infos == {}, "the gate asks the engine, not the scheduler"
    assert engine.engine.loads == [4.0]
    by = {"server_boot": "b00", "server_epoch": 3}
    named = {f"policy_{k}": v for k, v in policy(1, sent).as_dict().items()}
    assert output.rollout_infos == {"num_turns": 2, **named, **by}


@pytest.mark.parametrize(
    "kwargs, load_format, inner",
    [
        ({"load_format": "dummy", "engine_kwargs": {"a": 1}}, "auto", {"a": 1}),
        ({"engine_kwargs": {"load_format": "dummy"}}, "auto", {}),  # 3.10
        ({"load_format": "safetensors"}, "safetensors", {}),
        ({"engine_kwargs": {"worker_extension_cls": SWIFTS}}, "auto", {"worker_extension_cls": EXTENSION}),
        ({"engine_kwargs": {"worker_extension_cls": "a.B"}}, "auto", {"worker_extension_cls": "a.B"}),
        ({}, "auto", {}),
    ],
)
def test_the_base_comes_from_the_files(kwargs: dict[str, Any], load_format: str, inner: dict[str, Any]) -> None:
    assert worker.engine_arguments(kwargs) is kwargs, "only where a server is built"
    token = worker._building.set(True)
    try:
        assert worker.engine_arguments(kwargs) == {"load_format": load_format, "engine_kwargs": inner}
    finally:
        worker._building.reset(token)


def test_modules_of_smaller_rank() -> None:
    """The scaling is in B, so nothing depends on a module's rank."""
    lora = SimpleNamespace(max_lora_rank=4, lora_dtype=torch.bfloat16)
    shapes = {
        ("a.q_proj", "A"): (4, 8),
        ("a.q_proj", "B"): (6, 4),
        ("a.k_proj", "A"): (2, 8),
        ("a.k_proj", "B"): (6, 2),
    }
    entries = tuple((f"base_model.model.{m}.lora_{side}.weight", shape) for (m, side), shape in shapes.items())
    config = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    checks.check(Layout(dtype="bfloat16", entries=entries, config=config), lora, {})
    for changes in ({"lora_alpha": 8}, {"use_rslora": True}, {"rank_pattern": {"k_proj": 2}}, {"r": None}):
        with pytest.raises(errors.ProtocolError, match="the scaling is in B"):
            checks.check(Layout(dtype="bfloat16", entries=entries, config={**config, **changes}), lora, {})
    with pytest.raises(errors.StagingError, match="has rank 4, the config says 2"):
        checks.check(Layout(dtype="bfloat16", entries=entries, config={**config, "r": 2, "lora_alpha": 2}), lora, {})


def test_modules_that_the_files_do_not_name_are_left_to_vllm() -> None:
    base = {"model.layers.0.self_attn.q_proj.weight": _header(6, 8)}
    pair = {"A": (2, 8), "B": (6, 2)}
    checks._check_fits({"language_model.layers.0.self_attn.q_proj": pair}, base)  # named otherwise altogether
    checks._check_fits({MODULE: pair, "model.layers.0.mlp.experts.base_layer": pair}, base)
    for unknown in ("model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.nope"):
        with pytest.raises(errors.StagingError, match=f"no module '{unknown}'"):
            checks._check_fits({MODULE: pair, unknown: pair}, base)


def _header(*shape: int) -> Any:
    from swift_lora_fix.policy.files import TensorHeader

    return TensorHeader(shape, "BF16")


def listening() -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as asyncio and uvicorn do
    made.bind(("127.0.0.1", 0))
    made.listen()
    return made


def test_a_server_that_restarts_keeps_its_port(caplog: pytest.LogCaptureFixture) -> None:
    """A connection of the server before lingers: ms-swift then takes the next port, uvicorn would not have to."""
    with listening() as before:
        port = before.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), before.accept()[0]:
            pass  # the side that closes first waits a minute (TIME_WAIT)
        args = SimpleNamespace(host="127.0.0.1", port=port + 1)
        installing._keep_port(args, ["rollout.py", "--port", str(port)])
        assert args.port == port + 1 and f"port {port} is taken" in caplog.text, "somebody listens"
    installing._keep_port(args, ["rollout.py", "--port", str(port)])
    assert args.port == port
    for command in (["--port", "0"], [], ["--host", "8000"], ["--port=8001"]):
        args.port = 8001
        installing._keep_port(args, ["rollout.py", *command])
        assert args.port == 8001, command
    installing._keep_port(args, ["rollout.py", f"--port={port}"])
    assert args.port == port
