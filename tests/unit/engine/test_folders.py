"""Policies as folders for a plain ``vllm serve``: what is asked of the server, and what is left when it refuses.

The server is a stand-in that knows names as vLLM's does; the real one is asked in tests/real/trl/test_server.py.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swift_lora_fix import errors, scope
from swift_lora_fix.engine.vllm import folders
from swift_lora_fix.engine.vllm.folders import FolderEngine, FolderWriter
from swift_lora_fix.policy import adapter
from swift_lora_fix.session import Session
from tests.support.fakes.trainer import port_of
from tests.support.peft_models import peft_model


class Server(ThreadingHTTPServer):
    """refuses: the status with which the next load is answered. asked: routes and bodies, in order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.held, self.asked, self.refuses, self.updates = ["base"], list[Any](), 0, True
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": name} for name in self.server.held]})

    def do_POST(self) -> None:
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, route = self.server, self.path.rpartition("/")[2]
        server.asked.append((route, said))
        if not server.updates:
            self.answer(404, {"detail": "Not Found"})
        elif not said["lora_name"]:
            self.answer(400, {"error": {"message": "lora_name needs to be provided"}})
        elif route == "unload_lora_adapter":
            server.held.remove(said["lora_name"])
            self.answer(200, {})
        elif server.refuses:
            self.answer(server.refuses, {"error": {"message": "no room"}})
        else:
            server.held.append(said["lora_name"])
            self.answer(200, {})

    def answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def session_with(server: Server, folder: Path, model: torch.nn.Module | None = None) -> Session:
    client = SimpleNamespace(base_url=server.url, model="base")
    port = port_of(model or peft_model(lora_alpha=12), place="folders", client=client, folder=str(folder))
    made = Session(port, "adapter")
    made.kept = port  # type: ignore[attr-defined]
    return made


def saved(folder: Path) -> list[Path]:
    return sorted((folder / "swift_lora_fix").iterdir())


def test_each_policy_gets_a_name_and_the_one_before_is_unloaded(server: Server, tmp_path: Path) -> None:
    session = session_with(server, tmp_path)
    names = []
    for _ in range(4):
        session.synchronize()
        base, name = server.held
        assert session.engine.generate(lambda: session.engine.client.model) == name  # type: ignore[attr-defined]
        assert session.what_is_missing() is None
        assert name.endswith(f"-{session.last_write.digest}"), "requests and answers name the policy by its digest"
        names.append(name)
    assert len(set(names)) == 4 and [route for route, _ in server.asked].count("unload_lora_adapter") == 3
    assert [path.name for path in saved(tmp_path)] == names[-2:], "older folders are gone"
    assert session.engine.client.model == "base", "outside of a rollout it is the framework's own"  # type: ignore[attr-defined]


def test_the_folder_is_the_policy_with_its_scaling_in_b(server: Server, tmp_path: Path) -> None:
    model = peft_model(r=4, lora_alpha=12)
    session_with(server, tmp_path, model).synchronize()
    (folder,) = saved(tmp_path)
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    assert config["r"] == config["lora_alpha"] and config["peft_type"] == "LORA"
    for entry in adapter.bind(model).entries:
        assert (
            torch.equal(tensors[entry.key], entry.parameter * entry.scale) and tensors[entry.key].dtype == torch.float32
        )
    assert {entry.scale for entry in adapter.bind(model).entries} == {1.0, 3.0}


def test_a_server_that_refuses_serves_what_it_served(server: Server, tmp_path: Path) -> None:
    session = session_with(server, tmp_path)
    session.synchronize()
    before, server.refuses = list(server.held), 500
    with pytest.raises(errors.RolloutServerError, match="did not take the adapter in .*500: .*no room"):
        session.synchronize()
    assert server.held == before and [path.name for path in saved(tmp_path)] == before[1:]
    assert "no sync has completed" in str(session.what_is_missing()), "so that nothing is generated by it"


def test_a_policy_that_is_not_unloaded_is_a_warning(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The new one is held by then, and rollouts ask for it: it must stay."""
    session, post = session_with(server, tmp_path), folders._post
    session.synchronize()

    def fails(url: str, route: str, content: dict[str, str]) -> Any:
        if route == "unload_lora_adapter":
            raise errors.RolloutServerError("it does not answer")
        return post(url, route, content)

    monkeypatch.setattr(folders, "_post", fails)
    monkeypatch.setattr(logging.getLogger("swift"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="swift.lora_fix"):
        session.synchronize()
    assert any("did not unload" in message and "it does not answer" in message for message in caplog.messages)
    newest = session.engine.generate(lambda: session.engine.client.model)  # type: ignore[attr-defined]
    assert newest == server.held[-1] == saved(tmp_path)[-1].name and session.what_is_missing() is None


def test_a_server_that_was_started_again_holds_nothing(server: Server, tmp_path: Path) -> None:
    session = session_with(server, tmp_path)
    session.synchronize()
    server.held = ["base"]
    assert "does not hold it any more" in str(session.what_is_missing())


def test_a_server_that_is_gone_is_an_error(server: Server, tmp_path: Path) -> None:
    session = session_with(server, tmp_path)
    session.synchronize()
    server.shutdown()
    server.server_close()
    with pytest.raises(errors.RolloutServerError, match="does not answer"):
        session.what_is_missing()


def test_for_the_gate_requests_ask_for_the_base(server: Server, tmp_path: Path) -> None:
    session = session_with(server, tmp_path)
    session.synchronize()
    engine: Any = session.engine
    with session.writer.serving.engine_without_adapter():
        assert engine.generate(lambda: engine.client.model) == "base"
    assert engine.generate(lambda: engine.client.model) == server.held[1]


def test_the_rank_that_does_not_talk_to_the_server(tmp_path: Path) -> None:
    port = port_of(peft_model(), place="folders", client=None, folder=str(tmp_path))
    engine = FolderEngine(port)
    writer = FolderWriter(port, engine, adapter.bind(port.model))
    assert engine.generate(lambda: "nothing") == "nothing" and writer.what_is_missing() is None
    assert engine.is_of(port) and writer.send_base() is None


@pytest.mark.parametrize(
    "lora, updates, why",
    [
        ({"max_lora_rank": 16}, True, ""),
        (None, True, "has no LoRA layers: start it with --enable-lora"),
        ({"max_lora_rank": 8}, True, "has no room for rank 12: start it with --max-lora-rank 16"),
        ({"max_lora_rank": 16}, False, "takes no adapter while it runs: .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
    ],
)
def test_what_a_server_lacks_is_said(server: Server, lora: Any, updates: bool, why: str) -> None:
    server.updates = updates
    found = folders.why_not(server.url, lora, 12)
    assert bool(found) is bool(why)
    assert server.held == ["base"], "nothing was changed"
    assert re.search(why, found), found


def test_there_is_one_mode(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = session_with(server, tmp_path).trainer
    assert "vLLM loads each policy from a folder" in scope.decide(port).reason
    monkeypatch.setenv("SWIFT_LORA_FIX_MODE", "fused")
    with pytest.raises(errors.SettingsError, match="'fused' is for colocated engines"):
        scope.decide(port)
