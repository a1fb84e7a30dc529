"""What the model's own files hold: shapes, to check an adapter, and checksums, to compare with the trainer's base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...policy.files import TensorHeader, read_header


def base_shapes(model: str) -> dict[str, TensorHeader]:
    """The headers of a model folder's safetensors files, by tensor name."""
    return {name: header for file in _model_files(model) for name, header in read_header(file).items()}


def base_sums(model: str, dtype: Any = None) -> dict[str, list[Any]]:
    """Dtype, shape and checksum of each tensor in a model folder's safetensors files, as the engine holds it.

    dtype: the engine's torch dtype. Floats in the files are cast to it first, as vLLM does when it loads them.
    """
    import torch
    from safetensors import safe_open

    from ...common.digest import checksum

    floats, sums = (torch.float32, torch.bfloat16, torch.float16), {}
    for path in _model_files(model):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                tensor = tensor.to(dtype) if dtype in floats and tensor.dtype in floats else tensor
                sums[name] = [str(tensor.dtype).split(".")[-1], list(tensor.shape), int(checksum(tensor))]
    return sums


def _model_files(model: str) -> list[Path]:
    return sorted(Path(model).glob("*.safetensors"))
