"""The bytes of one policy in shared memory without a name: a ``memfd`` of one process, which others of its host map.

No file system has an entry for it, so the kernel frees it with its last user: a killed trainer leaves nothing behind.
Its size is sealed, its content is not: the trainer writes each policy into the same memory. Who reads it copies it
first, and proves the policy's digest of the copy.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import weakref
from collections.abc import Iterator

import torch

from ..common import memfd
from ..errors import SegmentError, StagingError
from .wire import UNSEEN, Address

NAME = "swift-lora-fix-policy"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Memory:
    """``size`` bytes of this process; dropping the object frees them. ``tensor``: (size,), uint8, to write to."""

    def __init__(self, size: int) -> None:
        descriptor = memfd.create(NAME)
        weakref.finalize(self, os.close, descriptor)
        try:
            os.posix_fallocate(descriptor, 0, size)  # a mapping without memory behind it would be a SIGBUS
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            self.view = memoryview(mmap.mmap(descriptor, size))
        except OSError as error:
            raise SegmentError(
                f"There is no memory for the {size} bytes of the adapter ({error.strerror}): free some on this host."
            ) from error
        self.tensor = torch.frombuffer(self.view, dtype=torch.uint8)
        self.address = Address(pid=os.getpid(), descriptor=descriptor, size=size)

    def pin(self) -> None:
        """Lock its pages for copies from a GPU at full speed. Where that is refused, they are slower."""
        runtime, start = torch.cuda.cudart(), self.tensor.data_ptr()
        if runtime.cudaHostRegister(start, self.address.size, 0) == runtime.cudaError.success:
            weakref.finalize(self, runtime.cudaHostUnregister, start)


@contextlib.contextmanager
def opened(address: Address) -> Iterator[torch.Tensor]:
    """The bytes at this address, (size,), uint8, valid inside only. To be copied, not written to.

    Raises StagingError (`UNSEEN`) when it cannot be opened here: the process has ended, is another user's or in another
    container; or what is there is no policy's memory of that size.
    """
    path = memfd.path_of(address.pid, address.descriptor)
    try:
        descriptor = memfd.opened(address.pid, address.descriptor, NAME)
        try:
            memfd.check(descriptor, path, address.size, _SEALS)
            # torch wants a buffer that it could write to
            mapped = mmap.mmap(descriptor, address.size, access=mmap.ACCESS_COPY)
        finally:
            os.close(descriptor)
    except SegmentError as error:
        raise StagingError(str(error), UNSEEN) from error
    tensor = torch.frombuffer(mapped, dtype=torch.uint8)
    try:
        yield tensor
    finally:
        del tensor
        with contextlib.suppress(BufferError):  # a view of it is left; the mapping goes with that
            mapped.close()
