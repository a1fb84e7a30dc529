"""Shared memory without a name: a ``memfd`` of one process, which others of its host open through ``/proc``.

No file system has an entry for it, so the kernel frees it with its last user: a killed process leaves nothing behind.
"""

from __future__ import annotations

import fcntl
import os
import stat

from ..errors import SegmentError


def create(name: str) -> int:
    """A descriptor of a new one, empty and not sealed."""
    return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def path_of(pid: int, descriptor: int) -> str:
    return f"/proc/{pid}/fd/{descriptor}"


def opened(pid: int, descriptor: int, name: str, access: int = os.O_RDONLY) -> int:
    """A descriptor of another process's. Raises SegmentError when there is none of this name."""
    path = path_of(pid, descriptor)
    try:
        found = os.readlink(path)
        if found.startswith(f"/memfd:{name}"):
            return os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SegmentError(
            f"The adapter's shared memory {path} cannot be opened here ({error.strerror}): the process that has it has "
            "ended or released it, runs in another container, or is another user's."
        ) from error
    raise SegmentError(f"{path} is not an adapter's shared memory but {found!r}; nothing was read.")


def check(descriptor: int, path: str, size: int, seals: int) -> None:
    """Raise SegmentError unless it has this size and these seals."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        raise SegmentError(f"{path} has {status.st_size} bytes where {size} were sent: truncated, or somebody else's.")
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & seals != seals:
        raise SegmentError(f"{path} is not sealed, so it could change while it is read; nothing was read.")
