"""What the model's own files hold: shapes, to check an adapter, and checksums, to compare with the trainer's base."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..common.digest import checksum
from . import adapter as adapters
from .adapter import Adapter
from .files import TensorHeader, read_header

Sums = dict[str, tuple[torch.dtype, tuple[int, ...], int]]  # by name: dtype, whole shape, checksum
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BYTES = (torch.float8_e4m3fn, torch.int8)
# behind the name of a weight in these: what each of its blocks or rows is to be multiplied with
SCALES = ("_scale_inv", "_scale")
# GPTQ's zeros are one lower in its first format, all codes of so many bits in an int32: what makes them one higher
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def base_shapes(model: str) -> dict[str, TensorHeader]:
    """The headers of a model folder's safetensors files, by tensor name."""
    return {name: header for file in _model_files(model) for name, header in read_header(file).items()}


def base_sums(model: str, dtype: torch.dtype | None = None) -> dict[str, list[Any]]:
    """Dtype, shape and checksum of each tensor in a model folder's safetensors files, as the engine holds it.

    dtype: the engine's. Floats in the files are cast to it first, as vLLM does when it loads them. A weight in FP8
    or INT8 with its scales is there twice: as it is, and, with ``*`` behind its name, as a trainer computes it that has
    no kernels for these, in ``dtype``. What belongs to a weight in GPTQ's or AWQ's codes is there as it is, too, its
    floats not cast and GPTQ's zeros one higher: gptqmodel keeps them so.
    """
    return {
        name: [str(tensor.dtype).split(".")[-1], list(tensor.shape), int(checksum(tensor))]
        for name, tensor in _tensors(model, dtype)
    }


def _tensors(model: str, dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in _model_files(model)]
        where = {name: file for file in files for name in file.keys()}
        is_lower = _has_lower_zeros(model)
        for name, file in where.items():
            tensor = file.get_tensor(name)
            cast = tensor.to(dtype) if dtype in FLOATS and tensor.dtype in FLOATS else tensor
            yield name, cast
            layer = name.rpartition(".")[0]
            if f"{layer}.qweight" in where and cast.dtype != tensor.dtype:
                yield f"{name}*", tensor
            if is_lower and name.endswith(".qzeros") and f"{layer}.scales" in where:
                bits = 32 * tensor.shape[-1] // where[f"{layer}.scales"].get_slice(f"{layer}.scales").get_shape()[-1]
                yield from [(f"{name}*", tensor + ONES[bits])] if bits in ONES else []
            behind = next((f"{name}{end}" for end in SCALES if f"{name}{end}" in where), None)
            if tensor.dtype in BYTES and tensor.ndim == 2 and behind is not None:
                plain = _multiplied(tensor, where[behind].get_tensor(behind), dtype)
                yield from [(f"{name}*", plain)] if plain is not None else []


def _has_lower_zeros(model: str) -> bool:
    """Whether the folder's files are of GPTQ's first format."""
    path = Path(model) / "config.json"
    how = (json.loads(path.read_text()) if path.is_file() else {}).get("quantization_config") or {}
    version = how.get("checkpoint_format") or how.get("format") or "gptq"  # as transformers' GPTQConfig reads it
    return how.get("quant_method") == "gptq" and version.lower() == "gptq"


def _multiplied(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor | None:
    """weight: (out, in). scales: one a block, (out / rows, in / columns). In float32, rounded once to ``dtype``: what
    transformers' ``Fp8Dequantize`` and compressed-tensors make of them. None where blocks do not fill the weight."""
    if scales.ndim != 2 or any(size % count for size, count in zip(weight.shape, scales.shape)):
        return None
    rows, columns = (size // count for size, count in zip(weight.shape, scales.shape))
    whole = scales.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return (weight.float() * whole).to(dtype or torch.bfloat16)


def _model_files(model: str) -> list[Path]:
    return sorted(Path(model).glob("*.safetensors"))


def trainer_sums(model: torch.nn.Module, adapter: Adapter, device: torch.device) -> Sums:
    """Dtype, whole shape and checksum of each frozen parameter, and of what packed layers hold in buffers; sharded ones
    are all-gathered one at a time."""
    found = {}
    for name, parameter in (*adapters.frozen_parameters(model), *adapters.packed_buffers(model)):
        with adapters.whole([parameter], adapter.sharding, device) as (value,):
            found[name] = (value.dtype, tuple(value.shape), int(checksum(value.detach())))
    return found


def compared(sums: Sums, answer: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the trainer's parameters that differ from an engine's files, and of those without a counterpart there.

    A name that both have is compared as such, in either of its forms. Files may name a layer otherwise than the
    trainer: then one of the same layer number, shape and content must be there, and where the numbers differ too, one
    of the same content. A layer that its kernel packed anew, so that no file has its ``qweight`` in this form, has no
    counterpart where it differs.
    """
    held = {name: (tuple(shape), value) for name, (_, shape, value) in answer.items()}
    places = {(_place(name), *content) for name, content in held.items()}
    numbered = {(_place(name), shape) for name, (shape, _) in held.items()}
    values, shapes = set(held.values()), {shape for shape, _ in held.values()}
    forms = {(dtype, tuple(shape)) for dtype, shape, _ in answer.values()}
    packed_anew = tuple(
        name.removesuffix("qweight")
        for name, (dtype, shape, _) in sums.items()
        if name.endswith(".qweight") and (str(dtype).split(".")[-1], shape) not in forms
    )
    differing: list[str] = []
    elsewhere: list[str] = []
    for name, (_, shape, value) in sums.items():
        if name in held:
            fine = (shape, value) in (held[name], held.get(f"{name}*"))
        elif (_place(name), shape) in numbered:
            fine = (_place(name), shape, value) in places
        else:
            fine = (shape, value) in values
        if not fine:
            known = (name in held or shape in shapes) and not name.startswith(packed_anew)
            (differing if known else elsewhere).append(name)
    return differing, elsewhere


def _place(name: str) -> tuple[str, ...]:
    """The numbers in a parameter's name: its layer, its expert."""
    return tuple(re.findall(r"\d+", name))
