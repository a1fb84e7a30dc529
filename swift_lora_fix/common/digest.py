"""A 64-bit checksum of a tensor's bits, computed on its device: two native int64 sums, no temporary copy.

The bits are read as a matrix x of 64-bit words, and D = sum_r w[r] * sum_c x[r, c] + sum_c v[c] * sum_r x[r, c] modulo
2**64, with odd weights w and even weights v. A change within one 16-bit value changes D by an odd number times less
than 2**16 * 2**48, which is never 0 modulo 2**64: it is always detected. Values that trade places are detected too, up
to chance. The checksum guards against faults, not against an adversary. It is the same on a CPU and on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch

COLUMNS = 1 << 12  # 64-bit words a row
_MASK = (1 << 64) - 1
_FACTOR = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """The checksum of ``tensor``'s bits; shape and dtype do not count. 0-dim int64 on its device."""
    words = _words(tensor)
    rows = words.numel() // COLUMNS
    row_weights, column_weights = _weights(rows + 1, words.device)
    body, rest = words[: rows * COLUMNS].view(rows, COLUMNS), words[rows * COLUMNS :]
    total = rest.sum() * row_weights[rows] + (rest * column_weights[: rest.numel()]).sum()
    return total + (body.sum(1) * row_weights[:rows]).sum() + (body.sum(0) * column_weights).sum()


def combine(checksums: Iterable[int]) -> str:
    """One digest of checksums, in their order: 16 hexadecimal digits."""
    total = 0
    for value in checksums:
        total = (total * _FACTOR + value) & _MASK
    return f"{total:016x}"


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bits as 64-bit words; no copy if the memory is contiguous, aligned, and a multiple of 8 bytes."""
    flat = tensor.detach().contiguous().view(-1)
    size = flat.element_size()
    if flat.numel() * size % 8 or flat.storage_offset() * size % 8:
        padded = flat.new_zeros(-(-flat.numel() * size // 8) * 8 // size)
        padded[: flat.numel()] = flat
        flat = padded
    return flat.view(torch.int64)


@cache  # never evicted: CUDA graphs read these tensors
def _weights(rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    factor = _FACTOR - (1 << 64)
    row = torch.arange(1, rows + 1, device=device, dtype=torch.int64) * factor | 1
    column = torch.arange(1, COLUMNS + 1, device=device, dtype=torch.int64) * (factor ^ 0x5555555555555555) & ~1
    return row, column
