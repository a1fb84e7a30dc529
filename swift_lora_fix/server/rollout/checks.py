"""Checks that an adapter fits the server's model: names, ranks, shapes, finite values. Nothing here touches an engine.

Legend for shapes: r rank, in/out the wrapped layer's features. A is (r, in), B is (out, r). Tensors may be on ``meta``,
without values, when only their names and shapes are checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from ...errors import StagingError
from ...install import releases
from ...memory.segment import DTYPES
from ...policy.files import TensorHeader

_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(embedding_)?(?P<side>[AB])(\.weight)?")
_FLOATS = ("F64", "F32", "BF16", "F16", "F8")


def check_names(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], max_rank: int) -> None:
    """Raise StagingError unless these are pairs of A and B, with ranks that config and engine allow."""
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None or tensor.dim() != 2 or tensor.dtype not in DTYPES:
            raise StagingError(
                f"The adapter has {name!r} ({tuple(tensor.shape)}, {tensor.dtype}), which is no LoRA matrix: floats "
                "are expected, with names as in 'base_model.model.<module>.lora_A.weight'."
            )
        sides.setdefault(found["module"], {})[found["side"]] = tensor
    if not sides:
        raise StagingError("The layout has no tensors: an adapter has at least one lora_A and one lora_B.")
    ranks = {config.get("r"), *(config.get("rank_pattern") or {}).values()}
    smaller_are_fine = scales_nothing(config)
    for module, pair in sides.items():
        if len(pair) < 2:
            raise StagingError(f"The adapter has only lora_{next(iter(pair))} of {module!r}: A and B go together.")
        (rank, _), (_, columns) = pair["A"].shape, pair["B"].shape
        if rank != columns:
            raise StagingError(f"Of {module!r}, A has rank {rank} and B {columns}: these are not one adapter.")
        if rank > max_rank:
            raise StagingError(
                f"{module!r} has rank {rank}, this server has room for {max_rank}: start it with "
                f"--vllm_max_lora_rank {releases.engine_rank(rank) or rank}."
            )
        if rank not in ranks and not (smaller_are_fine and rank < config["r"]):
            raise StagingError(f"{module!r} has rank {rank}, the config says {sorted(map(str, ranks))}.")


def scales_nothing(config: Mapping[str, Any]) -> bool:
    """Whether vLLM scales nothing, whatever rank a module has (rank_pattern). So a trainer with this package sends it
    (``slots.loader.plain_config``): the scaling is in B, and ``r`` is the largest rank."""
    patterns = config.get("rank_pattern") or config.get("alpha_pattern") or config.get("use_rslora")
    return not patterns and isinstance(config.get("r"), int) and config.get("lora_alpha") == config["r"]


def check_shapes(tensors: Mapping[str, torch.Tensor], base: Mapping[str, TensorHeader]) -> None:
    """Raise StagingError if a module is not the base's. vLLM's loader judges what the model's files do not name."""
    modules = {name[: -len(".weight")] for name in base if name.endswith(".weight")}
    wanted: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if found := _NAME.fullmatch(name):
            wanted.setdefault(found["module"], {})[found["side"]] = tensor
    if not modules.intersection(wanted):
        return  # the files name modules differently than PEFT
    layers, kinds = {_kind(name) for name in modules}, {name.split(".")[-1] for name in modules}
    for module, pair in wanted.items():
        if module in modules:
            _check_shape(module, pair["A"], pair["B"], base[f"{module}.weight"])
        elif _kind(module) in layers or (module.split(".")[-1] not in kinds and ".experts" not in module):
            raise StagingError(f"The server's model has no module {module!r}: is the adapter one of another model?")


def _kind(module: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", module)


def _check_shape(module: str, a: torch.Tensor, b: torch.Tensor, weight: TensorHeader) -> None:
    shape = (b.shape[0], a.shape[1])
    if weight.dtype.startswith(_FLOATS) and sorted(shape) != sorted(weight.shape):  # Conv1D and embeddings: (in, out)
        raise StagingError(
            f"{module!r} is {tuple(weight.shape)} in the server's model, A {tuple(a.shape)} and B {tuple(b.shape)} are "
            f"for {shape}: is the adapter one of another model?"
        )
