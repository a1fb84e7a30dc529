"""Ends what hangs, and nothing else: a process has all the time that it needs while it goes on.

It goes on while a file of its own changes, or while it and its children use the processor. It hangs when neither was so
for ``$SLF_HANG_SECONDS`` (300), or, busy as it may be, when no file changed for six times as long.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

HANG_SECONDS = float(os.environ.get("SLF_HANG_SECONDS", "300"))
IDLE_SHARE = 0.02  # of one core: threads that only wait use less
SILENT_TIMES = 6


class Hang(Exception):
    """A process that does not go on; it was killed."""


class Progress:
    """What a process and its children do; ``check`` it now and then. ``files``: what it writes, whole folders too."""

    def __init__(self, pid: int, *files: Path, seconds: float = HANG_SECONDS) -> None:
        self.pid, self.files, self.seconds = pid, files, seconds
        self.pause = min(5.0, seconds / 4)  # between two checks
        self.seen = self._files()
        self.cpu = self._cpu()
        self.changed_at = self.went_on_at = time.monotonic()

    def check(self) -> None:
        """Raises Hang, and kills nothing."""
        now, seen, cpu = time.monotonic(), self._files(), self._cpu()
        if seen != self.seen:
            self.seen, self.changed_at, self.went_on_at = seen, now, now
        if abs(cpu - self.cpu) > IDLE_SHARE * self.seconds:  # less than before: a child ended
            self.cpu, self.went_on_at = cpu, now
        if now - self.went_on_at > self.seconds:
            raise Hang(f"it wrote nothing and used no processor for {self.seconds:g} s")
        if now - self.changed_at > SILENT_TIMES * self.seconds:
            raise Hang(f"it wrote nothing for {SILENT_TIMES * self.seconds:g} s")

    def _files(self) -> list[tuple[str, int, int]]:
        found = []
        for top in self.files:
            for folder, _, names in os.walk(top) if top.is_dir() else [(str(top.parent), [], [top.name])]:
                for path in (os.path.join(folder, name) for name in names):
                    try:
                        about = os.stat(path)
                    except OSError:  # gone meanwhile
                        continue
                    found.append((path, about.st_size, about.st_mtime_ns))
        return sorted(found)

    def _cpu(self) -> float:
        total = 0.0
        try:
            process = psutil.Process(self.pid)
            for one in (process, *process.children(recursive=True)):
                total += sum(one.cpu_times()[:4]) if one.is_running() else 0.0  # its own, and its ended children's
        except psutil.Error:  # ended meanwhile
            pass
        return total


def kill(pid: int) -> None:
    """This process and its children, in whatever sessions they are."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (*process.children(recursive=True), process):
            with contextlib.suppress(psutil.Error):
                one.kill()


def wait(process: subprocess.Popen[Any], *files: Path, seconds: float = HANG_SECONDS) -> int:
    """Its exit status. Raises Hang when it does not go on, after it and its children are killed."""
    progress = Progress(process.pid, *files, seconds=seconds)
    while True:
        try:
            return process.wait(progress.pause)
        except subprocess.TimeoutExpired:
            pass
        try:
            progress.check()
        except Hang:
            kill(process.pid)
            process.wait()
            raise


def run(
    command: Sequence[object],
    *files: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    seconds: float = HANG_SECONDS,
) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` to its end, its output captured as text. Raises Hang with the end of that output."""
    words = list(map(str, command))
    with tempfile.TemporaryDirectory(prefix="slf-run-") as name:
        out, err = Path(name) / "stdout", Path(name) / "stderr"
        with open(out, "w") as stdout, open(err, "w") as stderr:
            process = subprocess.Popen(words, stdout=stdout, stderr=stderr, cwd=cwd, env=env, start_new_session=True)
        try:
            status = wait(process, out, err, *files, seconds=seconds)
        except Hang as hang:
            said = (out.read_text(errors="replace") + err.read_text(errors="replace"))[-4000:]
            raise Hang(f"{' '.join(words)}: {hang}\n{said}") from None
        finally:
            if process.poll() is None:  # the test was interrupted
                kill(process.pid)
                process.wait()
        texts = out.read_text(errors="replace"), err.read_text(errors="replace")
    return subprocess.CompletedProcess(words, status, *texts)
