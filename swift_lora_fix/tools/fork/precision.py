"""The adapter's values: whether they are usable, and what a cast to another dtype loses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import AdapterFileError, ForkError
from ...policy.kinds import is_b
from .source import Source

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # --dtype: the name in torch and in --lora_dtype


@dataclass(frozen=True)
class Cast:
    """The effect of a cast. loss: the largest |value - cast value|, in ``tensor`` (None: nothing was lost). zeroed: how
    many nonzero values became zero. before, after: torch's dtype names."""

    tensors: int
    before: tuple[str, ...]
    after: str
    loss: float
    tensor: str | None
    zeroed: int

    def __str__(self) -> str:
        words = f"cast {self.tensors} tensors from {' and '.join(self.before)} to {self.after}: "
        if self.tensor is None:
            return words + "nothing was lost"
        zeroed = f"; {self.zeroed} values became zero" if self.zeroed else ""
        return words + f"the largest value lost is {self.loss:.3g}, in {self.tensor}{zeroed}"


def check_values(source: Source, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises AdapterFileError naming a tensor with NaN or infinity, ForkError when every lora_B is zero."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise AdapterFileError(f"{source.weights} has NaN or infinity in {name}: fork an earlier checkpoint.")
    if not any(bool(tensor.any()) for name, tensor in tensors.items() if is_b(name)):
        raise ForkError(
            f"Every lora_B of {source.weights} is zero: the adapter does nothing, and its fork is a run from scratch."
        )


def dtypes_of(tensors: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """The floating-point dtypes among them, by torch's names."""
    return tuple(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()}))


def cast(tensors: Mapping[str, torch.Tensor], dtype: str) -> tuple[dict[str, torch.Tensor], Cast]:
    """Round every floating-point tensor to ``dtype`` (torch's name), to nearest even. Others stay unchanged.

    Raises ForkError naming a tensor whose values would become infinite.
    """
    import torch

    after = getattr(torch, dtype)
    done, count, loss, where, zeroed = {}, 0, 0.0, None, 0
    for name, tensor in tensors.items():
        done[name] = tensor
        if not tensor.is_floating_point() or tensor.dtype == after:
            continue
        value = done[name] = tensor.to(after)
        if not bool(value.isfinite().all()):
            raise ForkError(
                f"{name} has values up to {float(tensor.abs().max()):.6g}, which {dtype} cannot hold (its largest is "
                f"{torch.finfo(after).max:.6g}): use --dtype bf16, or keep."
            )
        lost = float((tensor.double() - value.double()).abs().max()) if tensor.numel() else 0.0
        count += 1
        zeroed += int(((value == 0) & (tensor != 0)).sum())
        if lost > loss:
            loss, where = lost, name
    return done, Cast(count, dtypes_of(tensors), dtype, loss, where, zeroed)
