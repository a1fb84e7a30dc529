"""What a trainer sends, without a trainer: a layout, its values staged in one buffer, and their digest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from swift_lora_fix.server.rollout.receiver import Received
from swift_lora_fix.server.shared import Memory, Opened
from swift_lora_fix.server.wire import Address, Layout


@dataclass
class Sent:
    layout: Layout
    digest: str
    memory: Memory

    @property
    def body(self) -> bytes:
        return bytes(self.memory.view)


def write(memory: dict[str, Any], sent: Sent) -> None:
    """Into a server's memory, as a trainer of its host does."""
    Opened().at(Address.model_validate(memory), pins=False).copy_(sent.memory.tensor)


def staged(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], digest: str | None = None) -> Sent:
    """``tensors`` by PEFT key, with the scaling in B, all of one dtype. digest: announced instead of the right one."""
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    entries = tuple((key, tuple(tensor.shape)) for key, tensor in tensors.items())
    layout = Layout(dtype=dtype, entries=entries, config=dict(config))
    received = Received(layout, torch.device("cpu"))
    for key, view in received.tensors().items():
        view.copy_(tensors[key])
    memory = Memory(Received.size_of(layout))
    memory.tensor.copy_(received.content)
    return Sent(layout, digest or received.staging.digest(), memory)
