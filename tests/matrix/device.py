"""What this machine runs cells on: a CPU, where stand-ins are needed, or GPUs, where none are."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

SHARE = 0.3  # of a GPU's memory, for a server beside a trainer


@functools.cache
def gpus() -> tuple[str, ...]:
    """As ``CUDA_VISIBLE_DEVICES`` names them; none on a CPU."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return tuple(named.split(",")[:count])


def name() -> str:
    import torch

    return torch.cuda.get_device_name() if gpus() else "CPU"


@dataclass(frozen=True)
class Places:
    """trainer, server: the GPUs of each, none on a CPU. ranks: the trainer's."""

    trainer: tuple[str, ...]
    server: tuple[str, ...]
    ranks: int

    @property
    def apart(self) -> bool:
        """NCCL joins a trainer and a server on two GPUs, and not on one."""
        return self.trainer != self.server


def places(ranks: int, has_server: bool) -> Places:
    """Where a cell of so many ranks runs: on fewer ranks where there are fewer GPUs, its server on the last of them."""
    found = gpus()
    trainer = found[:-1] if has_server and len(found) > 1 else found
    ranks = min(ranks, len(trainer)) if found else ranks
    return Places(trainer[:ranks], found[-1:] if has_server else (), ranks)
