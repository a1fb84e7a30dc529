"""Slow links and large bodies: a request may take as long as it makes progress."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from swift_lora_fix import errors
from swift_lora_fix.server.trainer import remote
from swift_lora_fix.server.trainer.client import Servers
from tests.support.links import throttled

MIB = 1 << 20


class Counting(BaseHTTPRequestHandler):
    """Answers with how many bytes it was sent."""

    def do_POST(self) -> None:  # noqa: N802
        left = size = int(self.headers["Content-Length"])
        while left:
            left -= len(self.rfile.read(min(left, MIB)))
        text = b'{"boot": "", "size": %d}' % size
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Counting) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_forty_mib_over_a_slow_link(port: int) -> None:
    """4 MiB a second: ten seconds, where no single phase waits for five."""
    body = bytes(40 * MIB)
    with throttled(port, 4 * MIB) as slow:
        servers = Servers([f"http://127.0.0.1:{slow}"], deadline=60)
        length = {"Content-Length": str(len(body))}
        answer = servers.post(0, "stage", blocks=lambda: [bytes(MIB)] * 40, headers=length)
        assert answer["size"] == len(body)


def test_a_multimodal_request_of_200_mb(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ms-swift's own client, which names no timeout at all."""
    monkeypatch.setenv("SWIFT_LORA_FIX_TRANSPORT", "reload")
    client = SimpleNamespace(sessions=[requests.Session()])
    remote.prepare_client(client)
    body = bytes(200_000_000)
    with throttled(port, 30_000_000) as slow:
        answer = client.sessions[0].post(f"http://127.0.0.1:{slow}/infer/", data=body).json()
        assert answer["size"] == len(body)


# ---- what comes back, or does not ----------------------------------------------------------------------------------


class Cut(BaseHTTPRequestHandler):
    """Cuts its first answer in the middle."""

    asked: list[str] = []

    def do_GET(self) -> None:  # noqa: N802
        text, cut = b'{"boot": "one"}', not self.asked
        self.asked.append(self.headers.get("Authorization", ""))
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text[:4] if cut else text)
        self.close_connection = True

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def cutting() -> Iterator[str]:
    Cut.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Cut) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_answer_that_is_cut_is_asked_for_again(cutting: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert Servers([cutting], deadline=10).get(0, "status") == {"boot": "one"} and len(Cut.asked) == 2
    assert "HTTP Request" not in caplog.text, "the log is the run's"


def test_an_answer_that_is_cut_is_named(cutting: str) -> None:
    with pytest.raises(errors.RolloutServerError, match=f"{cutting}.*within 0.2 s.*RemoteProtocolError"):
        Servers([cutting], deadline=0.2).get(0, "status")


def test_netrc_does_not_replace_the_key(cutting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("SWIFT_LORA_FIX_API_KEY", "secret")
    Servers([cutting], "secret", deadline=10).get(0, "status")
    client = SimpleNamespace(sessions=[requests.Session()])
    remote.prepare_client(client)
    client.sessions[0].post(f"{cutting}/infer/", json={})
    assert set(Cut.asked) == {"Bearer secret"}
