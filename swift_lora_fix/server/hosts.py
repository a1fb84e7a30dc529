"""Which host and process this is, and whether a process that another one named is still alive. On both sides."""

from __future__ import annotations

import contextlib
import os
import socket
from functools import cache
from pathlib import Path

from .wire import Holder


@cache
def this_host() -> str:
    """The same for two processes that see each other below ``/proc``: the kernel's boot and the PID namespace. Empty if
    the kernel does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def this_process(run: str) -> Holder:
    pid = os.getpid()
    return Holder(run=run, host=this_host(), name=socket.gethostname(), pid=pid, start=_started(pid))


def is_alive(holder: Holder) -> bool | None:
    """Whether the process of this holder runs; None if this host cannot tell."""
    if not holder.host or holder.host != this_host():
        return None
    return _started(holder.pid) == holder.start


def _started(pid: int) -> int:
    """When it began; -1 if there is no such process, or only what its parent has not reaped yet."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return -1 if fields[0] in ("Z", "X") else int(fields[19])  # the 3rd and the 22nd of proc(5)
    return -1
