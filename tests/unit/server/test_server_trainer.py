"""The trainer's side of server mode, with scripted servers over HTTP; real ones are in tests/real/server."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch

from swift_lora_fix import errors
from swift_lora_fix.common.digest import checksum
from swift_lora_fix.engine.vllm.weights import base
from swift_lora_fix.frameworks.swift.port import SwiftTrainer
from swift_lora_fix.policy import adapter, model_files
from swift_lora_fix.server.hosts import this_host
from swift_lora_fix.server.rollout.receiver import Received
from swift_lora_fix.server.shared import Memory, Opened
from swift_lora_fix.server.trainer import remote
from swift_lora_fix.server.trainer.client import Servers
from swift_lora_fix.server.trainer.writer import RemoteWriter
from swift_lora_fix.server.wire import POLICY_HEADER, PREFIX, PROTOCOL, Address, Layout
from tests.support.peft_models import peft_model


class Scripted:
    """One server: keeps what it is told, and answers ``faults[route]`` (status, body, headers) once each, first."""

    all: list[Scripted] = []  # those of this test

    def __init__(self, sums: dict[str, Any]) -> None:
        self.policy: Any = None
        self.staged: Any = None
        self.plain, self.boot, self.epoch, self.sums = False, "first", 0, sums
        self.host = this_host()
        self.lora_dtype = "bfloat16"
        self.before: Any = None
        self.layout: Any = None
        self.memory: Any = None
        self.elsewhere: dict[str, int] = {}  # what it says of its memory, of which that is not true
        self.content = b""  # of the policy that was received last
        self.calls: list[tuple[str, Any]] = []
        self.faults: dict[str, list[Any]] = {}
        self.headers: list[dict[str, str]] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                route = self.path.removeprefix(PREFIX).strip("/")
                inline = self.headers.get("Content-Type") == "application/octet-stream"
                content = json.loads(self.headers[POLICY_HEADER] if inline else body or b"{}")
                script.headers.append(dict(self.headers))
                status, answer, more = script.answer(route, content, body if inline else None)
                text = json.dumps(answer).encode() if not isinstance(answer, bytes) else answer
                self.send_response(status)
                for name, value in {**more, "Content-Length": str(len(text))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = _answer  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def restart(self, changed: int = 0) -> None:
        """As another process. changed: added to the checksums of its base."""
        self.policy, self.boot, self.epoch, self.plain, self.layout = None, f"{self.boot}+", 0, False, None
        self.sums = {name: [dtype, shape, value + changed] for name, (dtype, shape, value) in self.sums.items()}

    def answer(self, route: str, content: Any, body: bytes | None) -> tuple[int, Any, dict[str, str]]:
        self.calls.append((route, content if body is None else {**content, "size": len(body)}))
        if self.faults.get(route):
            fault = self.faults[route].pop(0)
            if callable(fault):
                fault = fault()
            if fault is not None:
                return fault
        to = content.get("to", {})
        if to and (to["boot"], to["epoch"]) != (self.boot, self.epoch):
            return 412, {"message": "another process or base"}, {}
        if route == "prepare":
            self.layout = Layout.model_validate(content["layout"])
            self.memory = Memory(Received.size_of(self.layout))
        elif route == "stage" and self.layout is None:
            return 409, {"message": "no layout"}, {}
        elif route == "receive":
            self.staged = content["policy"]
            if body is not None:
                self.content = body
            elif content.get("written"):
                self.content = bytes(self.memory.view)
        elif route == "commit":
            if self.staged != content["policy"]:
                return 409, {"message": "not staged"}, {}
            self.policy = self.staged
        elif route == "serve":
            self.plain = content["plain"]
        elif route == "push" and not content["ends"]:
            self.epoch, self.policy = self.epoch + 1, None
        elif route == "base":
            return 200, {"sums": self.sums, "boot": self.boot, "epoch": self.epoch}, {}
        about = {"protocol": PROTOCOL, "enable_lora": True, "max_lora_rank": 16, "lora_dtype": self.lora_dtype}
        about.update(boot=self.boot, epoch=self.epoch, host=self.host, before=self.before)
        if route == "stage" and not content["nccl"]:
            about["memory"] = {**self.memory.address.as_dict(), **self.elsewhere}
        return 200, {**about, "policy": self.policy, "plain": self.plain}, {}

    def digest(self) -> str:
        """As a server's vLLM workers prove it, of the bytes that came."""
        received = Received(self.layout, torch.device("cpu"))
        received.fill(torch.frombuffer(bytearray(self.content), dtype=torch.uint8))
        return received.staging.digest()

    def routes(self) -> list[str]:
        return [route for route, _ in self.calls if route not in ("status", "lease")]


@pytest.fixture
def model() -> Any:
    return peft_model()


@pytest.fixture
def scripts(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Scripted]]:
    monkeypatch.setenv("SWIFT_LORA_FIX_SERVER_DEADLINE", "3")
    monkeypatch.setenv("SWIFT_LORA_FIX_TRANSPORT", "reload")
    frozen = adapter.frozen_parameters(model)
    sums = {name: ["float32", list(p.shape), int(checksum(p.detach()))] for name, p in frozen}
    Scripted.all = made = [Scripted(sums), Scripted(sums)]
    yield made
    for script in made:
        script.http.shutdown()
        script.http.server_close()


class Client(SimpleNamespace):
    """``connect`` stands for what ms-swift's does to one server's connection."""

    def init_communicator(self, device: Any) -> None:
        self.pynccl_comms = [self.connect(self)]


class Trainer(SimpleNamespace):
    """A namespace that can be referred to weakly."""


def trainer_for(model: Any, scripts: list[Scripted]) -> Any:
    sessions = [SimpleNamespace(headers={}, auth=None, mount=lambda *_: None) for _ in scripts]
    return Trainer(
        model=model,
        vllm_client=Client(
            base_urls=[script.url for script in scripts],
            sessions=sessions,
            num_servers=len(scripts),
            close_communicator=lambda: None,
            pynccl_comms=[],
        ),
        accelerator=SimpleNamespace(
            is_main_process=True, num_processes=1, device=torch.device("cpu"), unwrap_model=lambda m: m
        ),
        state=SimpleNamespace(global_step=0),
        vllm_mode="server",
    )


def writer_for(model: Any, scripts: list[Scripted]) -> tuple[Any, RemoteWriter]:
    trainer = trainer_for(model, scripts)
    return trainer, remote_writer(trainer, model)


def remote_writer(trainer: Any, model: Any) -> RemoteWriter:
    port = SwiftTrainer(trainer)
    return RemoteWriter(port, remote.RemoteEngine(port), adapter.bind(model))


SENT = ["stage", "receive", "commit"]
FIRST = ["prepare", *SENT]


def send(writer: RemoteWriter) -> str:
    if not writer._sums:
        writer.send_base()
        for script in Scripted.all:
            script.calls.clear()
    writer.begin_validation()
    writer.validate()
    return writer.write().digest


def change(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.5)


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


def test_a_restarted_server_gets_the_policy_again_and_is_asked_once_more(model: Any, scripts: list[Scripted]) -> None:
    _, writer = writer_for(model, scripts)
    digest = send(writer)
    engine = writer.engine
    by = {"server_boot": "first", "server_epoch": 0}
    answers = [SimpleNamespace(rollout_infos={"policy_digest": digest, "policy_step": 0, **by})]
    tries: list[int] = []

    def infer() -> Any:
        tries.append(1)
        if len(tries) == 1:
            scripts[1].restart()
            raise RuntimeError("Multiple errors: [ConnectionError()]")
        return answers

    assert engine.generate(infer) is answers and len(tries) == 2
    assert scripts[1].policy == scripts[0].policy and scripts[1].routes() == [*FIRST, "base", *FIRST]
    assert scripts[0].routes() == scripts[1].routes(), "all of them get it again"
    with pytest.raises(RuntimeError, match="out of memory"):  # nobody lost anything: it is not ours to repeat
        engine.generate(lambda: exec("raise RuntimeError('out of memory')"))


def test_a_server_that_restarted_between_two_steps_is_looked_after(model: Any, scripts: list[Scripted]) -> None:
    """ms-swift syncs first: nobody asked for a rollout in between."""
    _, writer = writer_for(model, scripts)
    writer.send_base()
    send(writer)
    scripts[1].restart()
    scripts[1].calls.clear()
    change(model)
    send(writer)
    assert scripts[1].routes() == ["stage", "base", *FIRST], "the base is compared with this one's"
    assert scripts[0].policy == scripts[1].policy
    assert writer.engine.make_ready() and not writer.engine.make_ready(), "and the gate is due, once"
    scripts[1].restart(changed=1)
    with pytest.raises(errors.BaseMismatchError):
        send(writer)


@pytest.mark.parametrize("route", ["stage", "receive", "commit"])
def test_a_server_that_restarts_within_a_switch_is_not_served_without_its_base(
    model: Any, scripts: list[Scripted], route: str
) -> None:
    """It is back before the retry, and has another base than the one that was compared."""
    _, writer = writer_for(model, scripts)
    writer.send_base()
    send(writer)
    change(model)

    def restart() -> Any:
        scripts[1].restart(changed=1)
        return 503, {"detail": "starting"}, {}

    scripts[1].faults[route] = [restart]
    with pytest.raises(errors.BaseMismatchError, match=scripts[1].url):
        send(writer)
    assert scripts[1].policy is None


def test_a_rollout_of_another_policy_is_refused(model: Any, scripts: list[Scripted]) -> None:
    _, writer = writer_for(model, scripts)
    digest = send(writer)
    by = {"server_boot": "first", "server_epoch": 0}
    good = SimpleNamespace(rollout_infos={"policy_digest": digest, **by})
    for infos in ({}, {"policy_digest": "other", "policy_step": 3, **by}):
        with pytest.raises(errors.PolicyMismatchError, match=f"policy {infos.get('policy_digest')}.*asked for was"):
            writer.engine.generate(lambda infos=infos: [good, SimpleNamespace(rollout_infos=infos)])
    for wrong in ({"server_boot": "second"}, {"server_epoch": 1}):
        infos = {**good.rollout_infos, **wrong}
        with pytest.raises(errors.PolicyMismatchError, match="that nobody proved"):
            writer.engine.generate(lambda infos=infos: [good, SimpleNamespace(rollout_infos=infos)])


def test_a_server_that_cannot_be_given_the_policy_again_stays_lost(model: Any, scripts: list[Scripted]) -> None:
    _, writer = kept = writer_for(model, scripts)
    send(writer)
    scripts[1].restart()
    scripts[1].faults["stage"] = [(422, {"message": "no memory"}, {})]
    with pytest.raises(errors.RolloutServerError, match="no memory"):
        writer.engine.make_ready()
    assert not writer.is_current() and writer.engine.make_ready() and writer.is_current()
    assert not writer.engine.make_ready() and kept


def test_a_server_that_comes_back_with_another_base_is_refused(model: Any, scripts: list[Scripted]) -> None:
    _, writer = kept = writer_for(model, scripts)
    writer.send_base()
    send(writer)
    scripts[1].restart(changed=1)
    with pytest.raises(errors.BaseMismatchError, match=scripts[1].url):
        writer.engine.make_ready()
    assert scripts[1].policy is None and kept


def test_nothing_is_generated_while_servers_may_differ(model: Any, scripts: list[Scripted]) -> None:
    _, writer = kept = writer_for(model, scripts)
    with pytest.raises(errors.EngineStateError, match="may serve different policies"):
        writer.engine.generate(list)
    assert kept


def test_the_plain_base_is_asked_for_and_given_back(model: Any, scripts: list[Scripted]) -> None:
    trainer, writer = writer_for(model, scripts)
    send(writer)
    with pytest.raises(ZeroDivisionError), writer.engine.plain():
        assert all(script.plain for script in scripts)
        assert POLICY_HEADER not in trainer.vllm_client.sessions[0].headers
        by = {"server_boot": "first", "server_epoch": 0}
        plain = [SimpleNamespace(rollout_infos={"policy_plain": True, **by})]
        assert writer.engine.generate(lambda: plain) is plain
        with pytest.raises(errors.PolicyMismatchError, match="while the base was asked for"):
            writer.engine.generate(lambda: [SimpleNamespace(rollout_infos={"policy_digest": "x"})])
        raise ZeroDivisionError
    assert not any(script.plain for script in scripts) and writer.is_current()
    scripts[0].faults["serve"] = [None, (500, {"message": "worker 0 ended"}, {})]
    with pytest.raises(errors.RolloutServerError, match="worker 0 ended"), writer.engine.plain():
        pass
    assert POLICY_HEADER in trainer.vllm_client.sessions[0].headers, "the server refuses what it was not asked for"


def test_a_base_that_is_not_the_servers_is_refused(model: Any, scripts: list[Scripted]) -> None:
    _, writer = writer_for(model, scripts)
    writer.send_base()
    with torch.no_grad():
        model.base_model.model.first.base_layer.weight[0, 0] += 1e-3
    with pytest.raises(errors.BaseMismatchError, match=f"{scripts[0].url} in 1 of .*first.base_layer.weight.*PiSSA"):
        writer.send_base()


def test_servers_that_do_not_fit_together(model: Any, scripts: list[Scripted]) -> None:
    scripts[1].lora_dtype = "float16"
    with pytest.raises(errors.RolloutServerError, match="'bfloat16', 'float16'.*the same --torch_dtype"):
        writer_for(model, scripts)


def test_a_second_trainer_is_refused_before_it_begins(model: Any, scripts: list[Scripted]) -> None:
    scripts[1].faults["lease"] = [(409, {"message": "is run ab's, which is alive"}, {})]
    with pytest.raises(errors.RolloutServerError, match=f"{scripts[1].url}.*which is alive"):
        writer_for(model, scripts)


def test_a_server_of_another_kind_is_told_so(model: Any, scripts: list[Scripted]) -> None:
    scripts[1].answer = lambda *_: (200, {"boot": "", "protocol": PROTOCOL, "enable_lora": False}, {})  # type: ignore[method-assign]
    with pytest.raises(errors.RolloutServerError, match=f"{scripts[1].url} has no LoRA layers.*--vllm_enable_lora"):
        writer_for(model, scripts)
    scripts[1].answer = lambda *_: (404, b"Not Found", {})  # type: ignore[method-assign]
    with pytest.raises(errors.RolloutServerError, match="404: Not Found"):
        writer_for(model, scripts)


def test_the_key_goes_with_every_call(model: Any, scripts: list[Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_LORA_FIX_API_KEY", "secret")
    trainer, writer = writer_for(model, scripts)
    monkeypatch.setenv("SWIFT_LORA_FIX_TRANSPORT", "reload")
    trainer.vllm_client.sessions = [requests.Session() for _ in scripts]
    remote.prepare_client(trainer.vllm_client)
    send(writer)
    assert {headers["Authorization"] for script in scripts for headers in script.headers} == {"Bearer secret"}
    assert trainer.vllm_client.sessions[0].auth.key == "secret"


def test_a_server_that_hangs_in_a_rollout_is_given_up(scripts: list[Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    """ms-swift's client names no timeout."""
    monkeypatch.setenv("SWIFT_LORA_FIX_TRANSPORT", "reload")
    monkeypatch.setenv("SWIFT_LORA_FIX_ROLLOUT_DEADLINE", "1")
    client = SimpleNamespace(sessions=[requests.Session()])
    remote.prepare_client(client)
    scripts[0].faults["infer"] = [lambda: time.sleep(3)]
    with pytest.raises(requests.ReadTimeout, match="read timeout=1"):
        client.sessions[0].post(f"{scripts[0].url}/infer/", json={})


class Impatient(BaseHTTPRequestHandler):
    """Answers the first request of a connection, and closes it as the second one comes."""

    protocol_version = "HTTP/1.1"
    has_answered = False

    def do_POST(self) -> None:  # noqa: N802
        if self.has_answered:
            self.close_connection = True
            return
        self.has_answered = True
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_a_connection_that_was_idle_is_not_used_again() -> None:
    """ms-swift's client would, and ends the run where the server closes it at that moment."""
    client = SimpleNamespace(sessions=[requests.Session()])
    with ThreadingHTTPServer(("127.0.0.1", 0), Impatient) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        client.sessions[0].post(url)
        remote.prepare_client(client)
        assert [client.sessions[0].post(url).status_code for _ in range(3)] == [200] * 3
        client.sessions[0].close()
        server.shutdown()


def test_an_unreachable_server_is_named(tmp_path: Path) -> None:
    servers = Servers(["http://127.0.0.1:9"], deadline=1)
    with pytest.raises(errors.RolloutServerError, match="127.0.0.1:9/.*within 1 s.*ConnectError"):
        servers.get(0, "status")


# ---- over NCCL -----------------------------------------------------------------------------------------------------


class Wire:
    """In place of vLLM's ``PyNcclCommunicator``."""

    def __init__(self, world_size: int = 2) -> None:
        self.world_size, self.rank, self.device = world_size, world_size - 1, torch.device("cpu")
        self.disabled, self.group = False, SimpleNamespace()
        self.sent: list[bytes] = []
        self.works: Any = lambda: None

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        self.works()
        self.sent.append(bytes(tensor.numpy().tobytes()))


@pytest.fixture
def wired(model: Any, scripts: list[Scripted], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trainer, writer and wires where no transport is asked for by name."""
    monkeypatch.delenv("SWIFT_LORA_FIX_TRANSPORT")
    trainer = trainer_for(model, scripts)
    wires = trainer.vllm_client.pynccl_comms = [Wire() for _ in scripts]
    trainer.vllm_client.hosts, trainer.vllm_client.group_ports = ["127.0.0.1"] * 2, [1, 2]
    return trainer, remote_writer(trainer, model), wires


def test_both_sides_of_nccl(model: Any, scripts: list[Scripted], wired: Any) -> None:
    _, writer, wires = wired
    digest = send(writer)
    for script, wire in zip(scripts, wires):
        assert script.routes() == FIRST and script.policy["digest"] == digest
        assert len(wire.sent) == 1 and len(wire.sent[0]) == 2 * writer._staging.buffer.numel()
        assert script.layout.dtype == "bfloat16"
    assert wires[0].sent == wires[1].sent and writer._parcel.host is None, "no host memory was needed"
    change(model)
    send(writer)
    assert scripts[0].routes() == [*FIRST, *SENT], "the layout is told once"


def test_a_server_that_takes_nothing_over_nccl_reads_memory(
    model: Any, scripts: list[Scripted], wired: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, writer, wires = wired
    scripts[1].faults["stage"] = [(501, {"message": "no NCCL connection"}, {})]
    send(writer)
    assert scripts[0].routes() == FIRST
    assert scripts[1].routes() == ["prepare", "stage", *SENT] and scripts[1].calls[-2][1]["written"]
    assert not writer.engine.reaches_all and not wires[1].sent
    monkeypatch.setenv("SWIFT_LORA_FIX_TRANSPORT", "nccl")
    named = remote_writer(wired[0], model)
    with pytest.raises(errors.RolloutServerError, match=f"no NCCL connection to .*{scripts[1].url}"):
        send(named)


def test_a_broadcast_that_nobody_takes_part_in_is_given_up(model: Any, scripts: list[Scripted], wired: Any) -> None:
    _, writer, wires = wired
    over = threading.Event()
    wires[1].works = over.wait
    with pytest.raises(errors.RolloutServerError, match=f"{scripts[1].url} did not take part .* within 3 s"):
        send(writer)
    over.set()
    assert scripts[0].policy is None, "nobody switched"
    while not wires[1].sent:
        time.sleep(0.01)
    send(writer)
    assert len(wires[1].sent) == 1, "what waits on it would come before whatever is sent next"


def test_a_server_that_dies_within_a_broadcast_is_connected_again(
    model: Any, scripts: list[Scripted], wired: Any
) -> None:
    trainer, writer, wires = wired
    send(writer)
    change(model)
    trainer.vllm_client.connect = lambda one: fresh
    fresh, over = Wire(), threading.Event()
    wires[1].works = over.wait
    scripts[1].faults["receive"] = [lambda: scripts[1].restart()]
    digest = send(writer)
    over.set()
    assert [script.policy["digest"] for script in scripts] == [digest] * 2 and writer.engine.nccl.all_are_open()
    assert len(fresh.sent) == 1, "and it came over NCCL"


def test_a_connection_that_does_not_open_again_is_given_up(
    model: Any, scripts: list[Scripted], wired: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, writer, _ = wired
    logging.getLogger("swift").propagate = True
    send(writer)
    over = threading.Event()
    trainer.vllm_client.connect = lambda one: over.wait()
    scripts[1].restart()
    assert writer.engine.make_ready() and not writer.engine.nccl.is_open(1) and writer.is_current()
    over.set()
    assert "NCCL could not be opened again (not within 3 s)" in caplog.text
    assert any(content.get("written") for route, content in scripts[1].calls if route == "receive")


def test_what_a_server_refuses_to_receive_closes_nccl(model: Any, scripts: list[Scripted], wired: Any) -> None:
    _, writer, wires = wired
    over = threading.Event()
    wires[0].works = over.wait
    scripts[0].faults["receive"] = [(422, {"message": "digest differs"}, {})]
    with pytest.raises(errors.RolloutServerError, match="digest differs"):
        send(writer)
    over.set()
    assert not writer.engine.nccl.is_open(0) and writer.engine.nccl.is_open(1)


def test_a_base_that_differs_is_sent_and_sent_again(
    model: Any, scripts: list[Scripted], wired: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, writer, _ = wired
    trainer.vllm_client.connect = lambda one: Wire()
    pushes: list[list[str]] = []
    monkeypatch.setattr(base, "send", lambda *_: pushes.append([s.routes()[-1] for s in scripts]))
    with torch.no_grad():
        model.base_model.model.first.base_layer.weight[0, 0] += 1e-3
    writer.send_base()
    assert pushes == [["push", "push"]] and [s.epoch for s in scripts] == [1, 1], "begun before it"
    assert scripts[0].calls[-1][1]["ends"] is True, "and ended after it"
    send(writer)
    assert scripts[0].routes()[-3:] == SENT and writer.is_current()
    scripts[1].restart()
    writer.ranks = 2  # the other ranks are elsewhere while the main one looks after servers
    writer._on_main = None
    writer.engine.make_ready()
    assert len(pushes) == 2 and writer.is_current()
    assert [s.epoch for s in scripts] == [2, 1], "ms-swift can only send a base to all: the others begin anew, too"
    scripts[0].faults["push"] = [None, (500, {"message": "1 updates over NCCL failed"}, {})]
    del writer._on_main
    writer.ranks = 1
    with pytest.raises(errors.RolloutServerError, match="1 updates over NCCL failed"):
        writer.send_base()


def test_a_server_with_a_base_of_another_run(
    model: Any, scripts: list[Scripted], wired: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model folder says nothing of what it computes with."""
    pushes: list[int] = []
    monkeypatch.setattr(base, "send", lambda *_: pushes.append(1))
    trainer, writer, _ = wired
    writer.send_base()
    assert not pushes
    scripts[1].epoch = 1
    writer.engine.check_fit()
    writer.send_base()
    assert pushes == [1], "so it is sent the trainer's"
    writer.engine.nccl.close(1, "a test")
    with pytest.raises(errors.BaseMismatchError, match=f"{scripts[0].url} has a base that was sent to it"):
        writer.engine.check_fit()
        writer.send_base()


def test_a_base_that_somebody_writes_over_is_noticed(model: Any, scripts: list[Scripted]) -> None:
    _, writer = writer_for(model, scripts)
    send(writer)
    scripts[1].epoch = 1
    assert not writer.is_current()
    with pytest.raises(errors.BaseMismatchError, match=scripts[1].url):
        send(writer)


def test_layers_that_changed_places_are_another_base(model: Any) -> None:
    shape = (2, 2)
    mine = {f"model.layers.{n}.up.weight": (torch.bfloat16, shape, 10 + n) for n in range(3)}
    theirs = {name: ["bfloat16", list(shape), value] for name, (_, _, value) in mine.items()}
    renamed = {name.replace("model.", "language."): content for name, content in theirs.items()}
    assert model_files.compared(mine, theirs) == model_files.compared(mine, renamed) == ([], [])
    for held in (theirs, renamed):
        first, second = list(held)[:2]
        held[first], held[second] = held[second], held[first]
        assert model_files.compared(mine, held)[0] == list(mine)[:2]
    assert model_files.compared({"a.weight": (torch.bfloat16, (9,), 1)}, theirs) == ([], ["a.weight"])


def test_nccl_on_one_side_alone_is_an_error(model: Any, scripts: list[Scripted], wired: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("SWIFT_LORA_FIX_TRANSPORT", "reload")
    with pytest.raises(errors.SettingsError, match=f"{scripts[0].url} has opened NCCL"):
        remote.RemoteEngine(SwiftTrainer(wired[0]))


def test_a_restarted_server_is_connected_again(model: Any, scripts: list[Scripted], wired: Any) -> None:
    trainer, writer, wires = wired
    send(writer)
    fresh = Wire()
    seen: list[Any] = []

    def connect(one: Any) -> Wire:
        seen.append((one.base_urls, one.group_ports, one.num_servers))
        return fresh

    client = trainer.vllm_client
    client.connect = connect
    scripts[1].restart()
    assert writer.engine.make_ready()
    assert seen == [([scripts[1].url], [2], 1)] and client.num_servers == 2
    assert len(fresh.sent) == 1 and len(wires[0].sent) == 2 and scripts[1].policy == scripts[0].policy


# ---- stepping aside --------------------------------------------------------------------------------------------------

BARE = (404, b"Not Found", {})


def why_not(model: Any, scripts: list[Scripted], **faults: Any) -> str | None:
    """What is decided before the first sync; ``faults``: what servers ``one`` and ``two`` answer to ``status``."""
    for script, fault in zip(scripts, (faults.get("one"), faults.get("two"))):
        script.faults["status"] = [fault] * 50
    trainer = trainer_for(model, scripts)
    return remote.why_not(SwiftTrainer(trainer))


def test_servers_that_are_all_without_us_are_left_to_ms_swift(model: Any, scripts: list[Scripted]) -> None:
    assert why_not(model, scripts) is None
    reason = why_not(model, scripts, one=BARE, two=BARE)
    assert reason is not None and "--external_plugins" in reason


@pytest.mark.parametrize(
    "faults, phrase",
    [
        ({"two": BARE}, "1 of 2 rollout servers are without swift_lora_fix"),
        ({"one": BARE, "two": (401, {"message": "another key"}, {})}, "another key"),
        ({"one": (500, {"message": "a bug"}, {}), "two": (500, {"message": "a bug"}, {})}, "a bug"),
        ({"two": (401, {"message": "SWIFT_LORA_FIX_API_KEY"}, {})}, "401: SWIFT_LORA_FIX_API_KEY"),
        ({"one": (503, {"detail": "busy"}, {})}, "within 1 s.*503 busy"),
    ],
)
def test_whatever_else_is_no_reason_to_step_aside(
    model: Any, scripts: list[Scripted], monkeypatch: pytest.MonkeyPatch, faults: Any, phrase: str
) -> None:
    """The run would train on what this package exists to prevent, after one line at info."""
    monkeypatch.setenv("SWIFT_LORA_FIX_SERVER_DEADLINE", "1")
    with pytest.raises(errors.RolloutServerError, match=phrase):
        why_not(model, scripts, **faults)
