"""The operators of dense LoRA layers: W·x + bias + B·(A·x), where the rows of A lie below those of W.

One matrix product gives W·x and A·x. A second step adds B·(A·x), each output slice with its own rows of A, to the
tokens that have the adapter. A·x is rounded to the dtype of x in between, as PEFT does under autocast.

``dense_gated`` goes on to the activation that follows in most models: silu(first slice) · second slice.

They are opaque to ``torch.compile``: vLLM's graphs hold the operator, and nothing of what is inside.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

# Up to so many tokens W·x and A·x are one product, and the sum goes into new memory. Above, where the second product
# costs nothing, the sum is made in place: a prefill then needs no second output.
TOGETHER = 1024


def dense_linear(
    x: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    b: torch.Tensor,
    indices: torch.Tensor,
    slices: Sequence[int],
) -> torch.Tensor:
    """The layer's output, (..., n).

    Args:
        x: (..., k), all tokens of a step.
        rows: (n + len(slices)·r, k): W, then for each slice the r rows of its A.
        bias: (n + len(slices)·r,), zero for the rows of A; None without one.
        b: (n, r): for each slice its B, scaled.
        indices: (at least as many as there are tokens,), int64: 0 for a token that has the adapter.
        slices: the slices' numbers of outputs, n together.
    """
    base, shrunk, is_view = _products(x, rows, bias, len(b))
    out = x.new_empty(base.shape) if is_view else base
    _kernels(x).combine(out, base, shrunk, b, indices[: len(out)], slices)
    return out.view(*x.shape[:-1], len(b))


def dense_gated(
    x: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    b: torch.Tensor,
    indices: torch.Tensor,
    slices: Sequence[int],
) -> torch.Tensor:
    """silu(gate)·up, (..., n / 2), of the layer's output, whose two slices they are. Arguments as above."""
    base, shrunk, _ = _products(x, rows, bias, len(b))
    out = x.new_empty(len(base), slices[0])
    _kernels(x).combine_gated(out, base, shrunk, b, indices[: len(out)])
    return out.view(*x.shape[:-1], slices[0])


def arguments(layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> tuple[Any, ...]:
    """What both operators take for a dense LoRA layer of vLLM's. bias: the base layer's own, or None."""
    return (
        x,
        layer.dense_rows,
        None if bias is None else layer.dense_bias,
        layer.dense_b,
        layer.punica_wrapper._token_lora_indices,
        layer.dense_slices,
    )


def _products(
    x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None, outputs: int
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """W·x + bias and A·x, and whether they are views of one tensor."""
    flat, linear = x.reshape(-1, x.shape[-1]), torch.nn.functional.linear
    if len(flat) <= TOGETHER:
        both = linear(flat, rows, bias)
        return both[:, :outputs], both[:, outputs:], True
    return linear(flat, rows[:outputs], None if bias is None else bias[:outputs]), linear(flat, rows[outputs:]), False


def combine(
    out: torch.Tensor,
    base: torch.Tensor,
    shrunk: torch.Tensor,
    b: torch.Tensor,
    indices: torch.Tensor,
    slices: Sequence[int],
) -> None:
    """Write base + B·shrunk to ``out``, which may be ``base``: summed in float32, rounded once.

    out, base: (tokens, n). shrunk: (tokens, len(slices)·r). b: (n, r). indices: (tokens,).
    """
    rank, start = b.shape[1], 0
    has_adapter = (indices == 0)[:, None]
    for number, outputs in enumerate(slices):
        columns = slice(start, start + outputs)
        factor = shrunk[:, number * rank : (number + 1) * rank]
        added = base[:, columns].float() + factor.float() @ b[columns].float().T
        out[:, columns] = torch.where(has_adapter, added.to(out.dtype), base[:, columns])
        start += outputs


def combine_gated(
    out: torch.Tensor, base: torch.Tensor, shrunk: torch.Tensor, b: torch.Tensor, indices: torch.Tensor
) -> None:
    """Write silu(gate)·up to ``out``, (tokens, n / 2). Gate and up are rounded first, as two layers would."""
    whole, half = torch.empty_like(base), out.shape[1]
    combine(whole, base, shrunk, b, indices, [half, half])
    gate, up = whole[:, :half].float(), whole[:, half:].float()
    out.copy_(torch.nn.functional.silu(gate) * up)


def _kernels(x: torch.Tensor) -> Any:
    """Where ``combine`` and ``combine_gated`` for x's device are."""
    if not x.is_cuda:
        return sys.modules[__name__]
    from ..kernels import combine_kernel

    return combine_kernel


def _shape(
    x: torch.Tensor, rows: torch.Tensor, bias: Any, b: torch.Tensor, indices: Any, slices: Sequence[int]
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], sum(slices)))


def _gated_shape(
    x: torch.Tensor, rows: torch.Tensor, bias: Any, b: torch.Tensor, indices: Any, slices: Sequence[int]
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], slices[0]))


# The library object keeps the operators registered.
_LIBRARY = torch.library.Library("swift_lora_fix", "FRAGMENT")
for _function, _fake in ((dense_linear, _shape), (dense_gated, _gated_shape)):
    _name = _function.__name__
    _LIBRARY.define(
        f"{_name}(Tensor x, Tensor rows, Tensor? bias, Tensor b, Tensor indices, SymInt[] slices) -> Tensor",
        tags=(torch.Tag.needs_fixed_stride_order,),
    )
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _function, _key)
    torch.library.register_fake(f"swift_lora_fix::{_name}", _fake, lib=_LIBRARY)
