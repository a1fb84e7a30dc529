"""What is left behind in /dev/shm."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def abandoned() -> set[str]:
    """Names in /dev/shm that no living process maps or has open: those of others (another environment's suite beside
    this one) come and go."""
    names = set(os.listdir("/dev/shm"))
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            used = (process / "maps").read_text(errors="replace")
            used += "\n".join(os.readlink(link) for link in (process / "fd").iterdir())
            names = {name for name in names if f"/dev/shm/{name}" not in used}
    return {name for name in names if os.path.exists(f"/dev/shm/{name}")}
