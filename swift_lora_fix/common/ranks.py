"""Communication between the ranks of one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import RolloutServerError


def ranks_agree(fine: bool, device: torch.device) -> bool:
    """Whether ``fine`` is true on every rank of this run. A collective: all ranks must call it."""
    flag = torch.tensor(int(fine), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag)


def gathered(row: torch.Tensor, ranks: int) -> torch.Tensor:
    """[n] of each rank, as [ranks, n]. A collective."""
    rows = [torch.empty_like(row) for _ in range(ranks)]
    torch.distributed.all_gather(rows, row)
    return torch.stack(rows)


def on_main_rank(work: Callable[[], Any], is_main: bool, ranks: int, device: torch.device) -> Exception | None:
    """Run it on the main rank, which alone talks to servers. Every rank gets its error, or None. A collective."""
    problem: Exception | None = None
    if is_main:
        try:
            work()
        except Exception as error:
            problem = error
    if ranks > 1:
        told = [None if problem is None else f"{type(problem).__name__}: {problem}"]
        torch.distributed.broadcast_object_list(told, src=0, device=device)
        if told[0] is not None and problem is None:
            problem = RolloutServerError(f"On the main rank: {told[0]}")
    return problem
