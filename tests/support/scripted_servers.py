"""Scripted rollout servers over HTTP, each in a thread of this process, and a real trainer's side of them."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import torch

from swift_lora_fix.frameworks.swift.port import SwiftTrainer
from swift_lora_fix.policy import adapter
from swift_lora_fix.server.hosts import this_host
from swift_lora_fix.server.rollout.receiver import Received
from swift_lora_fix.server.shared import Memory
from swift_lora_fix.server.trainer import remote
from swift_lora_fix.server.trainer.writer import RemoteWriter
from swift_lora_fix.server.wire import POLICY_HEADER, PREFIX, PROTOCOL, Layout

SENT = ["stage", "receive", "commit"]
FIRST = ["prepare", *SENT]


class Scripted:
    """One server: keeps what it is told, and answers ``faults[route]`` (status, body, headers) once each, first."""

    all: list[Scripted] = []  # those of this test

    def __init__(self, sums: dict[str, Any]) -> None:
        self.policy: Any = None
        self.staged: Any = None
        self.plain, self.boot, self.epoch, self.sums = False, "first", 0, sums
        self.host = this_host()
        self.lora_dtype, self.logits_processors = "bfloat16", list[str]()
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
        about.update(logits_processors=self.logits_processors)
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
