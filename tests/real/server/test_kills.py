"""Trainer, web server and workers killed at random moments, on request:

    SLF_SOAK=1 SLF_KILLS=200 SLF_RESTARTS=8 scripts/test tests/real/server/test_kills.py

Each rollout that anybody gets must be, token by token, what the policy that was asked for answers on this server's
base; and nothing may be left behind. Records: README.md.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from swift_lora_fix.server.shared import NAME
from swift_lora_fix.server.wire import Policy
from tests.support import shm
from tests.support.driver import REPOSITORY, make_model, this_python
from tests.support.kill_trainer import SEEDS
from tests.support.reload_client import KEY, ReloadServer, made_adapter, sent_of

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not os.environ.get("SLF_SOAK"), reason="on request: SLF_SOAK=1"),
]

KILLS, RESTARTS = int(os.environ.get("SLF_KILLS", "200")), int(os.environ.get("SLF_RESTARTS", "8"))
SEED = int(os.environ.get("SLF_KILL_SEED", "0"))
STOPPED_SECONDS = 1.0


class Trainers:
    """Trainers forked from one process that has everything loaded."""

    def __init__(self, model: Path, url: str, references: Path, log: Path) -> None:
        environment = {
            **os.environ,
            "SWIFT_LORA_FIX_TRANSPORT": "reload",
            "SWIFT_LORA_FIX_API_KEY": KEY,
            "SWIFT_LORA_FIX_SERVER_DEADLINE": "600",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "tests.support.kill_trainer", str(model), url, str(references)]
        self.log = log
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=open(log, "w"), env=environment, cwd=REPOSITORY
        )
        self.wait_for(lambda: "ready" in self.said())

    def said(self, since: int = 0) -> list[str]:
        return self.log.read_text().splitlines()[since:]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 600) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.01)

    def start(self) -> psutil.Process:
        before = len(self.said())
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        self.wait_for(lambda: any(line.startswith("trainer ") for line in self.said(before)))
        (line,) = (line for line in self.said(before) if line.startswith("trainer "))
        return psutil.Process(int(line.split()[1]))

    def rollouts(self) -> int:
        return sum(line.startswith("rollout") for line in self.said())

    def go_on(self, more: int = 2) -> None:
        """Until so many more rollouts came."""
        wanted = self.rollouts() + more
        self.wait_for(lambda: self.rollouts() >= wanted)


def gone(process: psutil.Process, number: int) -> None:
    process.send_signal(number)
    if number == signal.SIGSTOP:
        time.sleep(random.random() * STOPPED_SECONDS)
        process.kill()
    end = time.monotonic() + 30
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, process
        time.sleep(0.005)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReloadServer]:
    folder = tmp_path_factory.mktemp("kills")
    with ReloadServer(make_model(this_python(), folder, "qwen2"), folder) as running:
        yield running


@pytest.fixture(scope="module")
def references(server: ReloadServer) -> Path:
    """What each policy answers, before anything is killed."""
    found = {}
    for version, seed in enumerate(SEEDS):
        sent = sent_of(made_adapter(server.model, seed))
        policy = Policy(version=version, step=0, digest=sent.digest, run="5eed")
        assert server.stage(policy, sent).status_code == server.commit(policy).status_code == 200
        found[sent.digest] = server.rollouts(policy)[0]
    assert len({json.dumps(tokens) for tokens in found.values()}) == len(SEEDS)
    file = server.folder / "references.json"
    file.write_text(json.dumps(found))
    # this process holds the lease, and lives: another one's name, which is gone
    assert server.lease("5eed", pid=1 << 21).status_code == 200
    return file


def left_behind() -> set[str]:
    ours = re.compile(r"swift.?lora.?fix|slf[-_]", re.IGNORECASE)
    return shm.names() | {name for name in os.listdir(tempfile.gettempdir()) if ours.search(name)}


def memories() -> list[str]:
    """Every open or mapped memory of a policy on this host."""
    found = []
    for process in psutil.process_iter():
        for place in ("fd", "map_files"):
            try:
                for link in Path(f"/proc/{process.pid}/{place}").iterdir():
                    if NAME in os.readlink(link):
                        found.append(f"{process.pid}/{place}/{link.name}")
            except OSError:
                continue
    return found


def test_killed_at_random_moments(server: ReloadServer, references: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dice, done = random.Random(SEED), Counter[str]()
    names, refused = left_behind(), 0
    trainers = Trainers(server.model, server.url, references, server.folder / "trainers.txt")
    trainer = trainers.start()
    trainers.go_on(5)
    started = time.monotonic()
    trainers.go_on(10)
    cycle = (time.monotonic() - started) / 10
    kinds = ["trainer"] * KILLS + ["server"] * RESTARTS
    dice.shuffle(kinds)
    for kind in kinds:
        number = dice.choice((signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP))
        time.sleep(dice.random() * 2 * cycle)
        if kind == "trainer":
            if number == signal.SIGSTOP and dice.random() < 0.3:
                refused += second_trainer_is_refused(trainers, trainer)
            gone(trainer, number)
            done[f"trainer {number.name}"] += 1
            trainer = trainers.start()
        else:
            victims = server_processes(server)
            name = dice.choice(sorted(victims))
            done[f"{name} {number.name}"] += 1
            if number == signal.SIGSTOP:  # a while; then it goes on, or the rest of it is restarted
                victims[name].suspend()
                time.sleep(dice.random() * 5)
                victims[name].resume()
            else:
                gone(victims[name], number)
                server.stop()
                server.start().wait()
            if not trainer.is_running():
                trainer = trainers.start()
        check_goes_on(trainers, trainer)
        wrong = [line for line in trainers.said() if line.startswith("WRONG")]
        assert not wrong, wrong
        if not trainer.is_running():
            trainer = trainers.start()
    rollouts, ends = (
        trainers.rollouts(),
        Counter(line.split(":")[0] for line in trainers.said() if line.startswith("end")),
    )
    gone(trainer, signal.SIGKILL)
    trainers.process.kill()
    trainers.process.wait()
    time.sleep(1)
    assert not memories(), "nothing of a policy is held by anybody"
    processes = psutil.Process(server.process.pid).children(recursive=True) if server.process else []
    server.stop()
    psutil.wait_procs(processes, timeout=30)
    assert not [process for process in processes if process.is_running()]
    assert left_behind() <= names
    with capsys.disabled():
        total = sum(done.values())
        print(f"\n{total} kills ({dict(sorted(done.items()))}), a second trainer refused {refused} times, {rollouts} ")
        print(
            f"rollouts, none wrong; trainers that ended themselves: {dict(ends)}; a sync and its rollout {cycle:.2f} s"
        )


def check_goes_on(trainers: Trainers, trainer: psutil.Process) -> None:
    """Two more rollouts come, or the trainer has said why not."""
    wanted, ends = trainers.rollouts() + 2, sum(line.startswith("end") for line in trainers.said())
    trainers.wait_for(
        lambda: trainers.rollouts() >= wanted or sum(line.startswith("end") for line in trainers.said()) > ends
    )


def second_trainer_is_refused(trainers: Trainers, first: psutil.Process) -> int:
    """While the first one is stopped, and so alive."""
    first.suspend()
    before = len(trainers.said())
    second = trainers.start()
    trainers.wait_for(lambda: any(line.startswith("end") for line in trainers.said(before)))
    (line,) = (line for line in trainers.said(before) if line.startswith("end"))
    first.resume()
    assert "which is alive" in line or "is not run" in line, line
    assert not second.is_running() or second.wait(10) is None
    return 1


def server_processes(server: ReloadServer) -> dict[str, psutil.Process]:
    """The web server's, its worker's, and where vLLM has one of its own, the engine's."""
    assert server.process is not None
    web = psutil.Process(server.process.pid)
    found = {"web": web}
    for process in web.children(recursive=True):
        command = " ".join(process.cmdline())
        if "resource_tracker" not in command:
            found["engine" if found.get("worker") and process.ppid() == found["worker"].pid else "worker"] = process
    return found
