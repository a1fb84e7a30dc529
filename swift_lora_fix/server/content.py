"""The digest of an adapter's two files, which both sides compute: SHA-256, of large files by all cores."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

BLOCK = 8 << 20  # bytes


class ContentHash:
    """SHA-256 of the config, with its length (which keeps the two files apart), and of the SHA-256 of each block of the
    weights: blocks can be hashed at the same time, and hashed as they come."""

    def __init__(self, config: bytes) -> None:
        self._whole = hashlib.sha256(len(config).to_bytes(8, "big") + config)
        self._block, self._filled = hashlib.sha256(), 0

    def update(self, data: bytes) -> None:
        """The next bytes of the weights, as many as there are."""
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
        """The digest with ``data`` as the whole weights."""
        view = memoryview(data)
        return self._of_blocks(len(view), lambda start: _digest(view[start : start + BLOCK]))

    def copy(self, source: int, write: Callable[[bytes, int], None], size: int) -> str:
        """``write`` the first ``size`` bytes of the file with descriptor ``source``, in blocks, each with where it
        starts; the digest of what was written (of a file that has become shorter, another one)."""

        def block(start: int) -> bytes:
            data = os.pread(source, min(BLOCK, size - start), start)
            write(data, start)
            return _digest(data)

        return self._of_blocks(size, block)

    def _of_blocks(self, size: int, digest_at: Callable[[int], bytes]) -> str:
        """``digest_at`` the start of each block, by all cores: reading, writing and hashing let other threads run."""
        starts, whole = range(0, size, BLOCK), self._whole.copy()
        with ThreadPoolExecutor(max_workers=min(max(1, len(starts)), os.cpu_count() or 1)) as pool:
            for digest in pool.map(digest_at, starts):
                whole.update(digest)
        return whole.hexdigest()


def content_digest(config: bytes, weights: bytes | memoryview) -> str:
    """Of both files, in hexadecimal."""
    return ContentHash(config).of(weights)


def _digest(block: bytes | memoryview) -> bytes:
    return hashlib.sha256(block).digest()
