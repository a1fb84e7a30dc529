"""Kills trainers and rollout servers at random moments, and looks at every rollout and at what is left behind."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import psutil

from swift_lora_fix.server.shared import NAME
from tests.support import shm
from tests.support.driver import REPOSITORY
from tests.support.reload_client import KEY

STOPPED_SECONDS = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP)


class Forking:
    """A process that has everything loaded and forks what is asked for; ``log`` has what all of them say."""

    def __init__(self, module: str, log: Path, *arguments: object) -> None:
        environment = {
            **os.environ,
            "SWIFT_LORA_FIX_TRANSPORT": "reload",
            "SWIFT_LORA_FIX_API_KEY": KEY,
            "SWIFT_LORA_FIX_SERVER_DEADLINE": "600",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(temporary(log.parent)),
        }
        self.log = log
        with open(log, "w") as output, open(log.with_suffix(".errors.txt"), "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=errors,
                env=environment,
                cwd=REPOSITORY,
            )
        self.wait_for(lambda: "ready" in self.said())

    def said(self, since: int = 0) -> list[str]:
        return self.log.read_text().splitlines()[since:]

    def count(self, word: str) -> int:
        return sum(line.startswith(word) for line in self.said())

    def wait_for(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.005)

    def start(self, word: str) -> psutil.Process:
        before = len(self.said())
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        self.wait_for(lambda: any(line.startswith(f"{word} ") for line in self.said(before)))
        (line,) = (line for line in self.said(before) if line.startswith(f"{word} "))
        return psutil.Process(int(line.split()[1]))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


class Killable(Protocol):
    def processes(self) -> dict[str, psutil.Process]:
        """By name: those that may be killed."""

    def restart(self) -> None:
        """Kill the rest of it, start it again, and wait until it answers."""


def killed(server: Killable, trainers: Forking, kills: int, restarts: int, seed: int) -> str:
    """Kill ``kills`` trainers and ``restarts`` times a process of the server, in random order. Returns the record."""
    dice, done, refused, names = random.Random(seed), Counter[str](), 0, left_behind(trainers.log.parent)
    trainer = trainers.start("trainer")
    trainers.wait_for(lambda: trainers.count("rollout") > 2)
    started, before = time.monotonic(), trainers.count("rollout")
    trainers.wait_for(lambda: trainers.count("rollout") >= before + 5)
    cycle = (time.monotonic() - started) / 5
    refused += _second_is_refused(trainers, trainer)
    kinds = ["trainer"] * kills + ["server"] * restarts
    dice.shuffle(kinds)
    for kind in kinds:
        number = dice.choice(SIGNALS)
        time.sleep(dice.random() * 2 * cycle)
        if kind == "trainer":
            if number == signal.SIGSTOP and dice.random() < 0.5:
                refused += _second_is_refused(trainers, trainer)
            _gone(trainer, number, dice)
            done[f"trainer {number.name}"] += 1
        else:
            victims = server.processes()
            name = dice.choice(sorted(victims))
            done[f"{name} {number.name}"] += 1
            if number == signal.SIGSTOP:  # a while; then it goes on
                victims[name].suspend()
                time.sleep(dice.random() * 2 * STOPPED_SECONDS)
                victims[name].resume()
            else:
                _gone(victims[name], number, dice)
                time.sleep(dice.random() * 2 * cycle)
                server.restart()
        if not is_there(trainer):
            trainer = trainers.start("trainer")
        trainer = _goes_on(trainers, trainer)
    assert is_there(trainer)
    trainer.kill()
    trainers.stop()
    time.sleep(1)
    wrong = [line for line in trainers.said() if line.startswith("WRONG")]
    assert not wrong, wrong
    held = {inode for _, inode in memories([*server.processes().values()])}
    assert len(held) <= 1, f"{held}: more than the server's own, which its next trainer will write to"
    assert not left_behind(trainers.log.parent) - names
    ends = Counter(line.split(":")[0] for line in trainers.said() if line.startswith("end"))
    return (
        f"{sum(done.values())} kills: {dict(sorted(done.items()))}; a second trainer refused {refused} times; "
        f"{trainers.count('rollout')} rollouts, {len(wrong)} wrong; trainers that ended themselves: {dict(ends)}; a "
        f"sync with its rollout takes {1e3 * cycle:.0f} ms"
    )


def say(line: str) -> None:
    """In one write. Under PYTHONUNBUFFERED ``print`` makes two, and who is stopped in between leaves half a line."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


def is_there(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _gone(process: psutil.Process, number: int, dice: random.Random) -> None:
    process.send_signal(number)
    if number == signal.SIGSTOP:
        time.sleep(dice.random() * STOPPED_SECONDS)
        process.kill()
    end = time.monotonic() + 30
    while is_there(process):
        assert time.monotonic() < end, process
        time.sleep(0.002)


def _goes_on(trainers: Forking, trainer: psutil.Process) -> psutil.Process:
    """Until two more rollouts came. A trainer that ended itself has said why, and another one begins."""
    wanted = trainers.count("rollout") + 2

    def over() -> bool:
        return trainers.count("rollout") >= wanted or trainers.count("WRONG") > 0 or not is_there(trainer)

    for _ in range(20):
        trainers.wait_for(over)
        if is_there(trainer):
            return trainer
        trainer = trainers.start("trainer")
    raise AssertionError(f"no trainer goes on: {trainers.said()[-20:]}")


def _second_is_refused(trainers: Forking, first: psutil.Process) -> int:
    """While the first one is stopped, and so alive."""
    first.suspend()
    before = len(trainers.said())
    second = trainers.start("trainer")
    trainers.wait_for(lambda: any(line.startswith("end") for line in trainers.said(before)))
    (line,) = (line for line in trainers.said(before) if line.startswith("end"))
    assert "which is alive" in line, line
    trainers.wait_for(lambda: not is_there(second))
    first.resume()
    return 1


def temporary(folder: Path) -> Path:
    """The folder for temporary files of what is killed: other suites use that of the machine."""
    made = folder / "tmp"
    made.mkdir(exist_ok=True)
    return made


def left_behind(folder: Path) -> set[str]:
    """Names of ours in /dev/shm, and whatever they left in their folder for temporary files."""
    ours = re.compile(r"swift.?lora.?fix", re.IGNORECASE)
    return {name for name in shm.names() if ours.search(name)} | set(os.listdir(temporary(folder)))


def memories(processes: Sequence[psutil.Process]) -> set[tuple[str, int]]:
    """The memory of policies that these processes, and those below them, have open or mapped: which, and its inode."""
    found = set()
    for process in {each for top in processes for each in tree(top)}:
        about = Path(f"/proc/{process.pid}")
        with contextlib.suppress(OSError):
            lines = (about / "maps").read_text().splitlines()
            found |= {("mapped", int(line.split()[4])) for line in lines if NAME in line}
            for link in (about / "fd").iterdir():
                with contextlib.suppress(OSError):
                    found |= {("open", link.stat().st_ino)} if NAME in os.readlink(link) else set()
    return found


def is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True
    return False


def wait_until_free(port: int, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_free(port):
        assert time.monotonic() < end, f"port {port} is still taken"
        time.sleep(0.01)


def tree(process: psutil.Process) -> Iterator[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        yield from process.children(recursive=True)
    yield process
