"""What the suites take for a hang, and what not, on real processes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support import hangs

SECONDS = 3.0


def run(code: str, *files: Path, seconds: float = SECONDS) -> str:
    return hangs.run([sys.executable, "-c", code], *files, seconds=seconds).stdout


def test_what_waits_for_ever_is_ended_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"""
import subprocess, sys, time
sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
open({str(child)!r}, "w").write(str(sleeper.pid))
print("the last words", flush=True)
time.sleep(3600)
"""
    with pytest.raises(hangs.Hang, match="(?s)used no processor for 3 s.*the last words"):
        run(code)
    pid, ends = int(child.read_text()), time.monotonic() + 60
    while is_running(pid) and time.monotonic() < ends:  # killed, and busy machines take a while over it
        time.sleep(0.1)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_what_computes_in_silence_goes_on() -> None:
    code = f"import time\nends = time.monotonic() + {2 * SECONDS}\nwhile time.monotonic() < ends: pass\nprint('done')"
    assert run(code) == "done\n"


def test_but_not_for_ever() -> None:
    with pytest.raises(hangs.Hang, match="wrote nothing"):
        run("while True: pass", seconds=1.0)


def test_what_writes_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    code = f"import time\nfor _ in range(20): open({str(file)!r}, 'a').write('x'); time.sleep(0.25)\nprint('done')"
    assert run(code, tmp_path) == "done\n"
