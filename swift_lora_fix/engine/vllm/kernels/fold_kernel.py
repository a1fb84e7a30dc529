"""The Triton kernel of fused mode: cast(W + s*B*A), read from the trainer and written to the engine in one pass.

A GPU's matrix units multiply bfloat16, not float32. So s*B and A are each split into a sum of two bfloat16, which
together keep 16 bits, and the products are summed in float32. The error is below 1.25 * 2**-16 * |s| * (|B| @ |A|):
what the split drops from each factor (at most 2**-17 of it), and the product of the two low parts (2**-18), which is
not computed. The sum with W is rounded once, as policy/rounding.py does. Importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ....policy.merging import Factors

# The fastest of 30 configurations on an H200. It takes half as long again if the first block of ranks is moved into the
# loop: Triton then stages loads in shared memory, and fewer tiles run at a time.
ROWS, COLUMNS, RANK, WARPS = 64, 128, 64, 4


@triton.jit
def _product(b, a, row, column, r, rows, columns, rank, b_rows, a_rows, scale, added, SPLIT: tl.constexpr):
    """added + scale*B@A for one tile and the ranks in ``r``."""
    left = tl.load(b + row * b_rows + r[None, :], mask=(row < rows) & (r[None, :] < rank), other=0.0)
    right = tl.load(
        a + r[:, None].to(tl.int64) * a_rows + column, mask=(r[:, None] < rank) & (column < columns), other=0.0
    )
    left, right = left.to(tl.float32) * scale, right.to(tl.float32)
    if SPLIT:
        left_high, right_high = left.to(tl.bfloat16), right.to(tl.bfloat16)
        left_low = (left - left_high.to(tl.float32)).to(tl.bfloat16)
        right_low = (right - right_high.to(tl.float32)).to(tl.bfloat16)
        added = tl.dot(left_low, right_high, added)
        added = tl.dot(left_high, right_low, added)
        added = tl.dot(left_high, right_high, added)
    else:
        added = tl.dot(left, right, added, input_precision="ieee")
    return added


@triton.jit
def _rounded(value, row, column, seed):
    """float32 to bfloat16, in the words of policy/rounding.py."""
    h = row.to(tl.uint32) * 0x9E3779B1 + column.to(tl.uint32) * 0x85EBCA6B + seed.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    chance = (h ^ (h >> 16)) & 0xFFFF
    kept = (value.to(tl.uint32, bitcast=True) + chance) >> 16
    kept = tl.where(value == value, kept, 0x7FC0)  # not a number
    return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["seed", "first_row", "first_column"])
def _fold(
    out,
    w,
    b,
    a,
    scale,
    rows,
    columns,
    rank,
    out_rows,
    out_columns,
    w_rows,
    b_rows,
    a_rows,
    seed,
    first_row,
    first_column,
    SPLIT: tl.constexpr,
    BFLOAT16: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    MORE: tl.constexpr,
):
    """One tile of ROWS x COLUMNS."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    inside = (row < rows) & (column < columns)
    plain = tl.load(w + row * w_rows + column, mask=inside, other=0.0)
    added = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    r = tl.arange(0, RANK)
    added = _product(b, a, row, column, r, rows, columns, rank, b_rows, a_rows, scale, added, SPLIT)
    if MORE:
        for start in range(RANK, rank, RANK):
            added = _product(b, a, row, column, start + r, rows, columns, rank, b_rows, a_rows, scale, added, SPLIT)
    if BFLOAT16:
        value = plain.to(tl.bfloat16).to(tl.float32) + added
        held = _rounded(value, row + first_row, column + first_column, seed)
    else:
        held = (plain.to(tl.float32) + added).to(out.dtype.element_ty)
    tl.store(out + row * out_rows + column * out_columns, held, mask=inside)


def fold(out: torch.Tensor, factors: Factors, split: bool = True) -> None:
    """Write cast(W + scale*B*A) to ``out`` (rows, columns), which may have any strides.

    W is (rows, columns), B (rows, r), A (r, columns), each with contiguous rows. All on one device, in any floating
    dtype. split: multiply in pairs of bfloat16, see above; otherwise in float32, slow, but Triton's interpreter can.
    """
    w, b, a, rank = factors.w, factors.b, factors.a, factors.rank
    grid = (triton.cdiv(out.shape[0], ROWS), triton.cdiv(out.shape[1], COLUMNS))
    strides = (*out.stride(), w.stride(0), b.stride(0), a.stride(0))
    block = max(16, min(RANK, triton.next_power_of_2(rank)))
    place = (factors.seed, factors.row, factors.column)
    sizes = (split, out.dtype == torch.bfloat16, ROWS, COLUMNS, block, rank > block)
    _fold[grid](out, w, b, a, factors.scale, *out.shape, rank, *strides, *place, *sizes, num_warps=WARPS, num_stages=1)
