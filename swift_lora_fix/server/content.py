"""The digest of an adapter's two files, computed on both sides: SHA-256, on all cores for large files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

BLOCK = 8 << 20  # bytes


class ContentHash:
    """SHA-256 of the config, preceded by its length (which separates the two files), and of the SHA-256 of each block
    of the weights. So blocks can be hashed in parallel, and as they arrive."""

    def __init__(self, config: bytes) -> None:
        self._whole = hashlib.sha256(len(config).to_bytes(8, "big") + config)
        self._block, self._filled = hashlib.sha256(), 0

    def update(self, data: bytes) -> None:
        """Add the next bytes of the weights, any number of them."""
        rest = memoryview(data)
        while rest:
            part, rest = rest[: BLOCK - self._filled], rest[BLOCK - self._filled :]
            self._block.update(part)
            self._filled += len(part)
            if self._filled == BLOCK:
                self._whole.update(self._block.digest())
                self._block, self._filled = hashlib.sha256(), 0

    def hexdigest(self) -> str:
        whole = self._whole.copy()
        if self._filled:
            whole.update(self._block.digest())
        return whole.hexdigest()

    def of(self, data: bytes | memoryview) -> str:
        """The digest if ``data`` is all of the weights."""
        view = memoryview(data)
        return self._of_blocks(len(view), lambda start: _digest(view[start : start + BLOCK]))

    def copy(self, source: int, write: Callable[[bytes, int], None], size: int) -> str:
        """Pass the first ``size`` bytes of the file descriptor ``source`` to ``write``, in blocks with their offsets.
        Returns the digest of what was written. (If the file has become shorter, that is another digest.)"""

        def block(start: int) -> bytes:
            data = os.pread(source, min(BLOCK, size - start), start)
            write(data, start)
            return _digest(data)

        return self._of_blocks(size, block)

    def _of_blocks(self, size: int, digest_at: Callable[[int], bytes]) -> str:
        """Call ``digest_at`` with the start of each block, on all cores: reads, writes and hashes release the GIL."""
        starts, whole = range(0, size, BLOCK), self._whole.copy()
        with ThreadPoolExecutor(max_workers=min(max(1, len(starts)), os.cpu_count() or 1)) as pool:
            for digest in pool.map(digest_at, starts):
                whole.update(digest)
        return whole.hexdigest()


def content_digest(config: bytes, weights: bytes | memoryview) -> str:
    """The digest of both files, in hexadecimal."""
    return ContentHash(config).of(weights)


def _digest(block: bytes | memoryview) -> bytes:
    return hashlib.sha256(block).digest()
