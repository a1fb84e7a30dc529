"""Rounds merged weights to the engine's dtype, so that a small update arrives.

Neighbours of W in bfloat16 are up to 2**-7 of it apart (an ulp), and the update dW of a LoRA is often smaller. Rounded
to the nearest, most of W + dW is W again, and what is lost always points the same way. So W + dW is rounded up or down
by chance, up with the probability that makes its mean right (stochastic rounding: M. Croci et al., Royal Society Open
Science 9, 2022): what is lost is noise, and in a layer's sums over thousands of weights it nearly cancels. What it is
worth is measured by bench/rounding.py (docs/modes.md).

The chance is a hash of the weight's name, row and column. So the same policy always has the same bits, in each
process, for each slice, and after a resume; and a weight that moves on slowly changes once. A W that is no bfloat16
number is first rounded to the nearest, as vLLM loads the base: without an update the engine holds the plain base.
float16 is eight times finer than bfloat16: there W + dW is rounded to the nearest.
"""

from __future__ import annotations

import zlib

import torch

ELEMENTS = 1 << 22  # rounded at a time, so that this needs less memory than a layer
NAN = 0x7FC0  # in bfloat16; with what is added to its bits, a GPU's NaN (0x7FFFFFFF) would become -0


def seed_of(source: str) -> int:
    """Below 2**31, by the name of the trainer's parameter."""
    return zlib.crc32(source.encode()) & 0x7FFFFFFF


@torch.no_grad()
def rounded(
    value: torch.Tensor, plain: torch.Tensor, dtype: torch.dtype, seed: int, row: int = 0, column: int = 0
) -> torch.Tensor:
    """``value``, W + dW in float32, in the engine's dtype. plain: W, of the same shape, in the trainer's dtype. row and
    column: where they begin in the whole weight. (Of more than two dimensions, all but the last count as rows.)"""
    if dtype != torch.bfloat16 or value.dtype != torch.float32:
        return value.to(dtype)
    rows = value.reshape(-1, value.shape[-1])
    base = plain.reshape(rows.shape)
    found = torch.empty_like(rows, dtype=dtype)
    step = max(1, ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        w = base[part].float()
        moved = rows[part] + (w.bfloat16().float() - w)  # exact, and nothing where W is a bfloat16 number
        found[part] = _rounded(moved, _chance(moved.shape, seed, row + start, column, value.device))
    return found.view(value.shape)


def _rounded(value: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """By the bits of float32: the upper sixteen are bfloat16's. Chance, 0 to 2**16 - 1, is added to the lower ones, and
    what they carry decides."""
    kept = (value.contiguous().view(torch.int32) + chance) >> 16
    return torch.where(value.isnan(), NAN, kept).to(torch.int16).view(torch.bfloat16)


def _chance(shape: torch.Size, seed: int, row: int, column: int, device: torch.device) -> torch.Tensor:
    """0 to 2**16 - 1 for each place: lowbias32, a hash by C. Wellons. kernels/fold_kernel.py computes the same."""
    rows, columns = (
        torch.arange(first, first + count, dtype=torch.int32, device=device) * _signed(factor)
        for first, count, factor in ((row, shape[0], 0x9E3779B1), (column, shape[1], 0x85EBCA6B))
    )
    h = rows[:, None] + columns[None, :] + seed
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D
    h = (h ^ ((h >> 15) & 0x1FFFF)) * _signed(0x846CA68B)
    return (h ^ (h >> 16)) & 0xFFFF


def _signed(number: int) -> int:
    """The same 32 bits, with a sign: PyTorch computes with these."""
    return number - (1 << 32) if number >= 1 << 31 else number
