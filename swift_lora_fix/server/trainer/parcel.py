"""Trainer side: one policy to send. One buffer on the trainer's device holds it, and host memory where it is a body."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch

from ..wire import Policy

BLOCK = 4 << 20  # bytes of a body that are sent at once


class Parcel:
    """``policy``, and the staged ``buffer`` with the whole adapter (LoRA dtype, scaling in B; one-dimensional, on the
    trainer's device). The next policy is staged into the same buffer, and the same host memory."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer, self.policy = buffer, Policy(version=0, step=0, digest="none", run="0")
        self.host: torch.Tensor | None = None  # made at the first policy that needs it
        self._is_filled, self._filling = False, threading.Lock()

    def now_holds(self, policy: Policy) -> None:
        self.policy, self._is_filled = policy, False

    @property
    def content(self) -> torch.Tensor:
        """Its bytes, (size,), uint8, on the trainer's device."""
        return self.buffer.view(torch.uint8)

    def blocks(self) -> Iterator[bytes]:
        """Its bytes, in blocks. They are copied to the host at the first call."""
        content = self.content
        with self._filling:
            if self.host is None:
                self.host = torch.empty(content.shape, dtype=torch.uint8, pin_memory=content.is_cuda)
            if not self._is_filled:
                self.host.copy_(content)
                self._is_filled = True
        view = memoryview(self.host.numpy())
        return (bytes(view[at : at + BLOCK]) for at in range(0, len(view), BLOCK))
