"""The Triton kernel of fused mode: cast(W + s*B*A), read from the trainer and written to the engine in one pass.

A GPU's matrix units multiply bfloat16, not float32. So s*B and A are each split into a sum of two bfloat16, which
together keep 16 bits, and the products are summed in float32. The error is below 1.25 * 2**-16 * |s| * (|B| @ |A|):
what the split drops from each factor (at most 2**-17 of it), and the product of the two low parts (2**-18), which is
not computed. The sum with W is rounded once. Importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

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
    SPLIT: tl.constexpr,
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
    value = (plain.to(tl.float32) + added).to(out.dtype.element_ty)
    tl.store(out + row * out_rows + column * out_columns, value, mask=inside)


def fold(
    out: torch.Tensor, w: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float, split: bool = True
) -> None:
    """Write cast(W + scale*B*A) to ``out`` (rows, columns), which may have any strides.

    W is (rows, columns), B (rows, r), A (r, columns), each with contiguous rows. All on one device, in any floating
    dtype. split: multiply in pairs of bfloat16, see above; otherwise in float32, slow, but Triton's interpreter can.
    """
    rank = b.shape[1]
    grid = (triton.cdiv(out.shape[0], ROWS), triton.cdiv(out.shape[1], COLUMNS))
    strides = (*out.stride(), w.stride(0), b.stride(0), a.stride(0))
    block = max(16, min(RANK, triton.next_power_of_2(rank)))
    sizes = (split, ROWS, COLUMNS, block, rank > block)
    _fold[grid](out, w, b, a, scale, *out.shape, rank, *strides, *sizes, num_warps=WARPS, num_stages=1)
