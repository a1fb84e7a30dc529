"""The digest of an adapter's two files, which both sides compute: SHA-256, of large files by all cores."""

from __future__ import annotations

import hashlib
import os
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
        view, whole = memoryview(data), self._whole.copy()
        blocks = [view[start : start + BLOCK] for start in range(0, len(view), BLOCK)]
        # hashing lets other threads run
        with ThreadPoolExecutor(max_workers=min(max(1, len(blocks)), os.cpu_count() or 1)) as pool:
            for digest in pool.map(_digest, blocks):
                whole.update(digest)
        return whole.hexdigest()


def content_digest(config: bytes, weights: bytes | memoryview) -> str:
    """Of both files, in hexadecimal."""
    return ContentHash(config).of(weights)


def _digest(block: memoryview) -> bytes:
    return hashlib.sha256(block).digest()
