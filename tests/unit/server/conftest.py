"""What the tests of both sides share: a rollout server's routes, and scripted servers for a trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from swift_lora_fix.common.digest import checksum
from swift_lora_fix.policy import adapter as adapters
from swift_lora_fix.server.rollout import installing, receiver
from tests.support.parcels import Sent
from tests.support.peft_models import peft_model
from tests.support.rollout_routes import Server, Slots, adapter, commit, leased, stage
from tests.support.scripted_servers import Scripted


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "AdapterWriter", Slots)
    monkeypatch.setattr(receiver, "_request_class", lambda worker: None)


def installed(folder: Path) -> Server:
    made = Server(folder)
    installing.install(made)
    return made


@pytest.fixture
def server(stand_ins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("SWIFT_LORA_FIX_MAX_MIB", "1")
    monkeypatch.setenv("SWIFT_LORA_FIX_TRANSPORT", "reload")
    return installed(tmp_path)


@pytest.fixture
def client(server: Server) -> Iterator[TestClient]:
    yield from leased(server.app)


@pytest.fixture
def served(server: Server, client: TestClient) -> Sent:
    """Version 1, whose A begins with 1, is what both workers serve."""
    sent = adapter(1.0)
    assert stage(client, 1, sent).status_code == 200
    assert commit(client, 1, sent).status_code == 200
    return sent


@pytest.fixture
def open_server(stand_ins: None, tmp_path: Path) -> Server:
    """Where no transport is asked for by name."""
    return installed(tmp_path)


@pytest.fixture
def nccl(open_server: Server) -> Iterator[TestClient]:
    yield from leased(open_server.app)


@pytest.fixture
def model() -> Any:
    return peft_model()


@pytest.fixture
def scripts(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Scripted]]:
    monkeypatch.setenv("SWIFT_LORA_FIX_SERVER_DEADLINE", "3")
    monkeypatch.setenv("SWIFT_LORA_FIX_TRANSPORT", "reload")
    frozen = adapters.frozen_parameters(model)
    sums = {name: ["float32", list(p.shape), int(checksum(p.detach()))] for name, p in frozen}
    Scripted.all = made = [Scripted(sums), Scripted(sums)]
    yield made
    for script in made:
        script.http.shutdown()
        script.http.server_close()
