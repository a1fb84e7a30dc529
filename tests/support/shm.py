"""What is left behind in /dev/shm."""

from __future__ import annotations

import os

# Python's multiprocessing: vLLM's queues, which stay behind wherever a suite beside this one kills an engine
OF_OTHERS = ("psm_", "sem.mp-")


def names() -> set[str]:
    """Names in /dev/shm. This package's segments have none at all (tests/unit/memory/test_memory.py: memfd)."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith(OF_OTHERS)}
