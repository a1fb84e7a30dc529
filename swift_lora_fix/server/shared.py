"""The bytes of one policy in shared memory without a name: a ``memfd`` of one process, which others of its host map.

It is a rollout server's, one as long as adapters have one layout. A trainer of its host writes each policy into it, or
the server does, what came as a body; the server's vLLM workers copy it first, and prove the policy's digest of the
copy. No file system has an entry for it, so the kernel frees it with its last user: a killed trainer leaves nothing
behind. Its size is sealed, its content is not.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref

import torch

from ..common import memfd
from ..errors import SegmentError, StagingError
from .wire import UNSEEN, Address

NAME = "swift-lora-fix-policy"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Mapped:
    """``size`` bytes of shared memory in this process, unmapped with this object. ``tensor``: (size,), uint8."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.view = memoryview(mmap.mmap(descriptor, size))
        self.tensor = torch.frombuffer(self.view, dtype=torch.uint8)
        self._is_pinned = False

    def pin(self) -> None:
        """Lock its pages for copies to and from a GPU at full speed. Where that is refused, they are slower."""
        if self._is_pinned:
            return
        runtime, start, self._is_pinned = torch.cuda.cudart(), self.tensor.data_ptr(), True
        if runtime.cudaHostRegister(start, self.tensor.numel(), 0) == runtime.cudaError.success:
            weakref.finalize(self, runtime.cudaHostUnregister, start)


class Memory(Mapped):
    """``size`` bytes of this process; dropping the object frees them."""

    def __init__(self, size: int) -> None:
        descriptor = memfd.create(NAME)
        weakref.finalize(self, os.close, descriptor)
        try:
            os.posix_fallocate(descriptor, 0, size)  # a mapping without memory behind it would be a SIGBUS
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            super().__init__(descriptor, size)
        except OSError as error:
            raise SegmentError(
                f"There is no memory for the {size} bytes of the adapter ({error.strerror}): free some on this host."
            ) from error
        self.address = Address(pid=os.getpid(), descriptor=descriptor, size=size)


class Opened:
    """Such memory of another process: mapped once for as long as it is the same, since to map 323 MB anew for each
    policy costs several times what copying them does."""

    def __init__(self) -> None:
        self._mapped: Mapped | None = None
        self._inode = 0

    def at(self, address: Address, pins: bool) -> torch.Tensor:
        """The bytes at this address, (size,), uint8. pins: for copies to or from a GPU.

        Raises StagingError (`UNSEEN`) when it cannot be opened here: the process has ended, is another user's or in
        another container; or what is there is no policy's memory of that size.
        """
        path = memfd.path_of(address.pid, address.descriptor)
        try:
            descriptor = memfd.opened(address.pid, address.descriptor, NAME, os.O_RDWR)  # else it cannot be pinned
            try:
                memfd.check(descriptor, path, address.size, _SEALS)
                inode = os.fstat(descriptor).st_ino  # nobody else's as long as it is mapped here
                if self._mapped is None or inode != self._inode:
                    self._mapped = None  # unmap that one first
                    self._mapped, self._inode = Mapped(descriptor, address.size), inode
            finally:
                os.close(descriptor)
        except SegmentError as error:
            raise StagingError(str(error), UNSEEN) from error
        if pins:
            self._mapped.pin()
        return self._mapped.tensor
