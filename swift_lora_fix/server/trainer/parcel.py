"""Trainer side: one policy to send. One buffer on the trainer's device holds it; host memory is filled if needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch

from ..shared import Memory
from ..wire import Layout, Policy

BLOCK = 4 << 20  # bytes of a body that are sent at once


class Host:
    """The host memory of one trainer: made at the first policy that needs it, used again by the next ones."""

    def __init__(self) -> None:
        self.memory: Memory | None = None

    def filled(self, buffer: torch.Tensor) -> Memory:
        content = buffer.view(torch.uint8)
        if self.memory is None or self.memory.address.size != content.numel():
            self.memory = None  # free it first
            self.memory = Memory(content.numel())
            if content.is_cuda:
                self.memory.pin()
        self.memory.tensor.copy_(content)
        return self.memory


class Parcel:
    """A policy, and the staged ``buffer`` with the whole adapter (LoRA dtype, scaling in B; one-dimensional, on the
    trainer's device). Valid until the next policy is staged."""

    def __init__(self, policy: Policy, layout: Layout, buffer: torch.Tensor, host: Host) -> None:
        self.policy, self.layout, self.buffer, self._host = policy, layout, buffer, host
        self._filling = threading.Lock()
        self._filled: Memory | None = None

    def memory(self) -> Memory:
        """Its bytes in shared memory, copied there at the first call. Raises SegmentError when there is no room."""
        with self._filling:
            self._filled = self._filled or self._host.filled(self.buffer)
            return self._filled

    def blocks(self) -> Iterator[bytes]:
        """Its bytes, in blocks."""
        view = self.memory().view
        return (bytes(view[at : at + BLOCK]) for at in range(0, len(view), BLOCK))
