"""Communication between the ranks of one run."""

from __future__ import annotations

import torch


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
