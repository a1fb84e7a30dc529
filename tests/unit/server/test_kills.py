"""Both sides in their own processes, killed at random moments; without vLLM (with it: tests/real/server/test_kills.py).

SLF_KILLS and SLF_RESTARTS ask for more.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import requests

from swift_lora_fix.server.shared import Memory
from swift_lora_fix.server.wire import PREFIX
from tests.support import kills, tiny
from tests.support.kill_trainer import SEEDS
from tests.support.reload_client import KEY, PROMPTS, made_adapter, sent_of
from tests.support.rollout_server import quiet_port

KILLS, RESTARTS = int(os.environ.get("SLF_KILLS", "12")), int(os.environ.get("SLF_RESTARTS", "8"))
SEED = int(os.environ.get("SLF_KILL_SEED", "0"))


def test_memory_that_is_held_is_seen() -> None:
    before = kills.memories([psutil.Process()])
    made = Memory(1 << 12)
    (opened, there), (mapped, also_there) = sorted(kills.memories([psutil.Process()]) - before, reverse=True)
    assert (opened, mapped) == ("open", "mapped") and there == also_there
    del made
    assert not kills.memories([psutil.Process()]) - before


class Light:
    def __init__(self, model: Path, folder: Path) -> None:
        self.port = quiet_port()
        self.forking = kills.Forking("tests.support.light_server", folder / "servers.txt", model, self.port, 2)
        self.web = self.forking.start("server")
        self.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                requests.get(f"{self.url}{PREFIX}/status/", headers={"Authorization": f"Bearer {KEY}"}, timeout=5)
                return
            except requests.ConnectionError:
                time.sleep(0.02)
        raise AssertionError(self.forking.log.with_suffix(".errors.txt").read_text()[-2000:])

    def processes(self) -> dict[str, psutil.Process]:
        workers = sorted(self.web.children(), key=lambda process: process.pid)
        return {"web": self.web, **{f"worker {index}": process for index, process in enumerate(workers)}}

    def stop(self) -> None:
        try:
            os.killpg(self.web.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def restart(self) -> None:
        self.stop()
        kills.wait_until_free(self.port)  # who was killed may take a moment to go, and listens until then
        self.web = self.forking.start("server")
        self.wait()


def test_killed_at_random_moments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each rollout is of the policy that was asked for, from every worker; nothing is left; a second trainer is refused
    while the first one lives, and not a moment longer."""
    model = tiny.make_model("qwen2", tmp_path / "model")
    digests = [sent_of(made_adapter(model, seed)).digest for seed in SEEDS]
    references = tmp_path / "references.json"
    references.write_text(json.dumps({digest: [[[digest], []]] * len(PROMPTS) for digest in digests}))
    server = Light(model, tmp_path)
    trainers = kills.Forking("tests.support.kill_trainer", tmp_path / "trainers.txt", model, server.url, references)
    try:
        record = kills.killed(server, trainers, KILLS, RESTARTS, SEED)
        processes = list(server.processes().values())
        server.stop()
        _, alive = psutil.wait_procs(processes, timeout=30)
        assert not [process for process in alive if kills.is_there(process)] and kills.is_free(server.port)
    finally:
        server.stop()
        server.forking.stop()
        trainers.stop()
    with capsys.disabled():
        print(f"\n{record}")
