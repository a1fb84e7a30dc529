"""The trainer's side: servers that do not fit, hang, or are without this package."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch

from swift_lora_fix import errors
from swift_lora_fix.frameworks.swift.port import SwiftTrainer
from swift_lora_fix.server.trainer import remote
from swift_lora_fix.server.trainer.client import Servers
from swift_lora_fix.server.wire import PROTOCOL
from tests.support.scripted_servers import (
    Scripted,
    send,
    trainer_for,
    writer_for,
)


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
