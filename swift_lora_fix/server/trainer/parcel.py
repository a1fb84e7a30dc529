"""Trainer side: one policy to send. One buffer on the trainer's device holds it; host memory is filled if needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch

from ..shared import Memory
from ..wire import Policy

BLOCK = 4 << 20  # bytes of a body that are sent at once


class Parcel:
    """``policy``, and the staged ``buffer`` with the whole adapter (LoRA dtype, scaling in B; one-dimensional, on the
    trainer's device). The next policy is staged into the same buffer, and the same host memory."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer, self.policy = buffer, Policy(version=0, step=0, digest="none", run="0")
        self.host: Memory | None = None  # made at the first policy that needs it
        self._is_filled, self._filling = False, threading.Lock()

    def now_holds(self, policy: Policy) -> None:
        self.policy, self._is_filled = policy, False

    def memory(self) -> Memory:
        """Its bytes in shared memory, copied there at the first call. Raises SegmentError when there is no room."""
        with self._filling:
            content = self.buffer.view(torch.uint8)
            if self.host is None:
                self.host = Memory(content.numel())
                if content.is_cuda:
                    self.host.pin()
            if not self._is_filled:
                self.host.tensor.copy_(content)
                self._is_filled = True
            return self.host

    def blocks(self) -> Iterator[bytes]:
        """Its bytes, in blocks."""
        view = self.memory().view
        return (bytes(view[at : at + BLOCK]) for at in range(0, len(view), BLOCK))
