"""The Triton kernels of dense LoRA layers: W·x + B·(A·x) for the tokens that have the adapter, W·x for the others; and
the same with the activation silu(gate)·up after it.

W·x and A·x come from one matrix product (dense/op.py). Every sum has one order and one program, so the same input gives
the same bits. Importing this module needs Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

SLICES = 4  # output slices of a layer, at most


@triton.jit
def _next_slice(tile, first, size, number, this, following, wanted, TILE: tl.constexpr):
    """Step from slice ``wanted - 1`` to the next one, if the tile is beyond it."""
    tiles = (this + TILE - 1) // TILE
    beyond = (number == wanted - 1) & (tile >= tiles)
    tile = tl.where(beyond, tile - tiles, tile)
    first = tl.where(beyond, first + this, first)
    size = tl.where(beyond, following, size)
    number = tl.where(beyond, wanted, number)
    return tile, first, size, number


@triton.jit
def _factor(b, column, is_column, r, RANK: tl.constexpr):
    return tl.load(b + column[None, :] * RANK + r[:, None], mask=is_column[None, :] & (r[:, None] < RANK), other=0.0)


@triton.jit
def _left(row, is_token, r, RANK: tl.constexpr):
    return tl.load(row + r[None, :], mask=is_token[:, None] & (r[None, :] < RANK), other=0.0)


@triton.jit
def _combine(
    out,
    base,
    shrunk,
    b,
    indices,
    tokens,
    out_row,
    base_row,
    shrunk_row,
    n0,
    n1,
    n2,
    n3,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COUNT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One tile of TOKENS x OUTPUTS. RANKS: ranks at a time, a power of two."""
    tile, first, size, number = tl.program_id(0), 0, n0, 0
    if COUNT > 1:
        tile, first, size, number = _next_slice(tile, first, size, number, n0, n1, 1, OUTPUTS)
    if COUNT > 2:
        tile, first, size, number = _next_slice(tile, first, size, number, n1, n2, 2, OUTPUTS)
    if COUNT > 3:
        tile, first, size, number = _next_slice(tile, first, size, number, n2, n3, 3, OUTPUTS)
    column = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    is_column = column < size
    column += first
    r = tl.arange(0, RANKS)
    # B is no part of the product before: its rows are read while that still runs
    factor = _factor(b, column, is_column, r, RANK)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < tokens
    # all reads first, none waits for another
    has_adapter = tl.load(indices + token, mask=is_token, other=-1) == 0
    token = token.to(tl.int64)
    row = shrunk + token[:, None] * shrunk_row + number * RANK
    left = _left(row, is_token, r, RANK)
    inside = is_token[:, None] & is_column[None, :]
    plain = tl.load(base + token[:, None] * base_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    added = tl.dot(left, factor)
    for start in tl.static_range(RANKS, RANK, RANKS):
        more = start + r
        added = tl.dot(_left(row, is_token, more, RANK), _factor(b, column, is_column, more, RANK), added)
    value = tl.where(has_adapter[:, None], plain + added, plain)
    tl.store(out + token[:, None] * out_row + column[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _combine_gated(
    out,
    base,
    shrunk,
    b,
    indices,
    tokens,
    out_row,
    base_row,
    shrunk_row,
    half,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One tile of TOKENS x OUTPUTS of silu(gate)·up; up lies ``half`` outputs after gate."""
    column = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_column = column < half
    r = tl.arange(0, RANKS)
    gate_factor = _factor(b, column, is_column, r, RANK)
    up_factor = _factor(b, column + half, is_column, r, RANK)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < tokens
    has_adapter = tl.load(indices + token, mask=is_token, other=-1) == 0
    token = token.to(tl.int64)
    row = shrunk + token[:, None] * shrunk_row
    gate_left, up_left = _left(row, is_token, r, RANK), _left(row + RANK, is_token, r, RANK)
    inside = is_token[:, None] & is_column[None, :]
    place = base + token[:, None] * base_row + column[None, :]
    plain_gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    plain_up = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    gate, up = tl.dot(gate_left, gate_factor), tl.dot(up_left, up_factor)
    for start in tl.static_range(RANKS, RANK, RANKS):
        more = start + r
        gate = tl.dot(_left(row, is_token, more, RANK), _factor(b, column, is_column, more, RANK), gate)
        up = tl.dot(_left(row + RANK, is_token, more, RANK), _factor(b, column + half, is_column, more, RANK), up)
    gate = tl.where(has_adapter[:, None], plain_gate + gate, plain_gate).to(out.dtype.element_ty).to(tl.float32)
    up = tl.where(has_adapter[:, None], plain_up + up, plain_up).to(out.dtype.element_ty).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + token[:, None] * out_row + column[None, :], value.to(out.dtype.element_ty), mask=inside)


Tiling = tuple[int, int, int]  # tokens and outputs of a tile, warps


def combine(
    out: torch.Tensor,
    base: torch.Tensor,
    shrunk: torch.Tensor,
    b: torch.Tensor,
    indices: torch.Tensor,
    slices: Sequence[int],
    tiling: Tiling | None = None,
) -> None:
    """Write base + B·shrunk to ``out``, as ``dense.op.combine`` does. At most ``SLICES`` slices; bfloat16 or float16.

    tiling: None takes the one that measured best.
    """
    tile_tokens, tile_outputs, warps = tiling or best_tiling(len(out), len(b))
    sizes = (*slices, *(0,) * (SLICES - len(slices)))
    grid = (sum(triton.cdiv(size, tile_outputs) for size in slices), triton.cdiv(len(out), tile_tokens))
    rank, ranks, overlap, options = _options(out, b)
    strides = (out.stride(0), base.stride(0), shrunk.stride(0))
    constants = (rank, ranks, tile_tokens, tile_outputs, len(slices), overlap)
    _combine[grid](out, base, shrunk, b, indices, len(out), *strides, *sizes, *constants, num_warps=warps, **options)


def combine_gated(
    out: torch.Tensor,
    base: torch.Tensor,
    shrunk: torch.Tensor,
    b: torch.Tensor,
    indices: torch.Tensor,
    tiling: Tiling | None = None,
) -> None:
    """Write silu(gate)·up to ``out``, as ``dense.op.combine_gated`` does. tiling: as for ``combine``."""
    half = out.shape[1]
    tile_tokens, tile_outputs, warps = tiling or best_gated_tiling(len(out), half)
    grid = (triton.cdiv(half, tile_outputs), triton.cdiv(len(out), tile_tokens))
    rank, ranks, overlap, options = _options(out, b)
    strides = (out.stride(0), base.stride(0), shrunk.stride(0))
    constants = (half, rank, ranks, tile_tokens, tile_outputs, overlap)
    _combine_gated[grid](out, base, shrunk, b, indices, len(out), *strides, *constants, num_warps=warps, **options)


def best_tiling(tokens: int, outputs: int) -> Tiling:
    """The tiling that measured best on an H200, for layers of a 7B model at rank 64 (bench/combine.py)."""
    if outputs < 8192:
        return (16, 64, 8) if tokens <= 16 else (32, 64, 4) if tokens <= 128 else (64, 64, 4)
    return (16, 128, 4) if tokens <= 16 else (64, 64, 8) if tokens <= 128 else (64, 128, 8)


def best_gated_tiling(tokens: int, outputs: int) -> Tiling:
    """The same for ``combine_gated``."""
    return (16, 64, 4) if tokens <= 16 else (32, 64, 4) if tokens <= 128 else (64, 64, 8)


def _options(out: torch.Tensor, b: torch.Tensor) -> tuple[int, int, bool, dict[str, Any]]:
    """Rank, ranks at a time, whether kernels overlap, and Triton's options for a launch."""
    rank = b.shape[1]
    ranks = min(128, max(16, triton.next_power_of_2(rank)))
    overlap = out.is_cuda and _can_overlap(out.device.index or 0)
    return rank, ranks, overlap, {"num_stages": 1, **({"launch_pdl": True} if overlap else {})}


@lru_cache
def _can_overlap(device: int) -> bool:
    """Whether the kernel may start while the one before still runs (programmatic dependent launch: Hopper, Triton)."""
    return torch.cuda.get_device_capability(device) >= (9, 0) and hasattr(tl.extra.cuda, "gdc_wait")
