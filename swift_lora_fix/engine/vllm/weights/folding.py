"""Decides which merged weights the kernel writes: W + s*B*A of a linear LoRA, from the trainer to the engine.

The kernel (kernels/fold_kernel.py) must first prove itself against float64, on this device, for every kind of tensor.
Whatever it fails, PyTorch computes in float32 (policy/merging.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ....common.log import warning
from ....policy.merging import Factors
from ....policy.rounding import rounded
from ..watch import Region

Fold = Callable[[torch.Tensor, Factors], None]
PROOF_ROWS = 1024  # compared at a time, so that the proof needs less memory than a layer
# what the split into two bfloat16 drops from a product (fold_kernel.py), with room for the float32 sum
LEFT_OUT = 2.0**-15
FLOAT32 = 2.0**-22  # of the sum with W, and of the comparison itself
DTYPES = (torch.bfloat16, torch.float16)  # that an engine may hold


@dataclass(frozen=True)
class Kind:
    """What the kernel is compiled and launched for; each kind is proved once."""

    dtypes: tuple[torch.dtype, ...]
    shape: torch.Size
    strides: tuple[int, ...]
    rank: int


def block(factors: Factors, region: Region) -> Factors | None:
    """The factors of a region of W; None when the region is not a rectangular block of W."""
    columns = factors.w.shape[1]
    shape = region.destination.shape
    if len(shape) != 2 or region.stride != (columns, 1) or not factors.w.is_contiguous():
        return None
    first_row, first_column = divmod(region.offset, columns)
    if first_column + shape[1] > columns:
        return None
    rows, span = slice(first_row, first_row + shape[0]), slice(first_column, first_column + shape[1])
    place = {"row": factors.row + first_row, "column": factors.column + first_column}
    return replace(factors, w=factors.w[rows, span], b=factors.b[rows], a=factors.a[:, span], **place)


class Folding:
    """Writes regions with the kernel where it is proved. fold: the kernel, None if this device has none."""

    def __init__(self, fold: Fold | None) -> None:
        self._fold = fold
        self._proved: dict[Kind, bool] = {}

    @torch.no_grad()
    def accepts(self, factors: Factors, region: Region) -> bool:
        """Whether the kernel may write this region. The region must hold W; it holds W again afterwards."""
        part = block(factors, region)
        if self._fold is None or part is None or not _fits(part, region.destination):
            return False
        kind = _kind(part, region.destination)
        if kind not in self._proved:
            try:
                problem = self._prove(part, region.destination)
            except Exception as error:  # Triton raises many kinds, memory may be short: then PyTorch
                problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            finally:
                region.destination.copy_(part.w)
            self._proved[kind] = problem is None
            if problem is not None and list(self._proved.values()).count(False) == 1:
                warning(f"fused mode: PyTorch computes weights that the kernel gets wrong: {problem}.")
        return self._proved[kind]

    def write(self, factors: Factors, region: Region, destination: torch.Tensor) -> None:
        """Write W + s*B*A of an accepted region to ``destination``, which has its shape and dtype."""
        part = block(factors, region)
        assert part is not None and self._fold is not None
        self._fold(destination, part)

    def write_whole(self, factors: Factors, destination: torch.Tensor) -> bool:
        """The same for a whole weight that lies nowhere in the engine. False where no region of its kind was proved."""
        known = _fits(factors, destination) and self._proved.get(_kind(factors, destination), False)
        if self._fold is None or not known:
            return False
        self._fold(destination, factors)
        return True

    def _prove(self, part: Factors, destination: torch.Tensor) -> str | None:
        """Fold in a random adapter about as large as W. Returns how the result is off, or None.

        A larger value is never rounded to a smaller one, so a right result lies between what the least and the greatest
        value that the bound allows are rounded to.
        """
        generator = torch.Generator(part.w.device).manual_seed(0)
        size = float(part.w.abs().max()) or 1.0
        a = torch.randn(part.a.shape, generator=generator, device=part.a.device)
        b = torch.randn(part.b.shape, generator=generator, device=part.b.device) * (size / math.sqrt(part.rank))
        tried = replace(part, a=a.to(part.a.dtype), b=b.to(part.b.dtype), scale=0.75)
        self._fold(destination, tried)  # type: ignore[misc]
        for start in range(0, len(destination), PROOF_ROWS):
            rows = slice(start, start + PROOF_ROWS)
            least, exact, most = between(tried, rows, destination.dtype)
            held = destination[rows]
            if not bool(((least <= held) & (held <= most)).all()):
                off = float((held.double() - exact).abs().nan_to_num(math.inf).max())
                return f"a weight of shape {tuple(destination.shape)} was off by {off:.3g}"
        return None


def between(part: Factors, rows: slice, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of these rows of W + scale*B*A: what the least and the greatest value that the bound allows are rounded to, and
    between them the exact values, in float64."""
    w, b = part.w[rows], part.b[rows]
    exact = w.double() + part.scale * (b.double() @ part.a.double())
    bound = LEFT_OUT * abs(part.scale) * (b.abs().double() @ part.a.abs().double()) + FLOAT32 * exact.abs()
    place = (part.seed, part.row + (rows.start or 0), part.column)
    least, most = (rounded(value.float(), w, dtype, *place) for value in (exact - bound, exact + bound))
    return least, exact, most


def of(device: torch.device) -> Folding:
    """Uses the kernel on a CUDA device with Triton."""
    if device.type != "cuda":
        return Folding(None)
    try:
        from ..kernels.fold_kernel import fold
    except ImportError as error:
        warning(f"fused mode: PyTorch computes the merged weights, which is slower, for want of Triton ({error}).")
        return Folding(None)
    return Folding(fold)


def _fits(part: Factors, destination: torch.Tensor) -> bool:
    tensors: tuple[Any, ...] = (destination, part.w, part.b, part.a)
    return (
        destination.dtype in DTYPES
        and all(tensor.device == destination.device and tensor.is_floating_point() for tensor in tensors)
        and all(tensor.stride(1) == 1 for tensor in (part.w, part.b, part.a))
    )


def _kind(part: Factors, destination: torch.Tensor) -> Kind:
    dtypes = (destination.dtype, part.w.dtype, part.b.dtype, part.a.dtype)
    strides = (*destination.stride(), part.w.stride(0), part.b.stride(0), part.a.stride(0))
    return Kind(dtypes, destination.shape, strides, part.rank)
