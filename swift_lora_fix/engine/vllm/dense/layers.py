"""Makes vLLM's LoRA layers dense: the slot's A is moved to below the base weight, where one product computes both.

``base_layer.weight``, ``lora_a_stacked`` and ``lora_b_stacked`` become views of the new memory, with the shapes and
values that they had. So vLLM's loaders, the write plan, the audits and the sleep work on them as before.

A layer that does not allow this, or is not proved (proving.py), keeps vLLM's kernels.
"""

from __future__ import annotations

import hashlib
import json
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from ....common.log import info, warning
from ....errors import ContractError
from . import gated, op, proving

# In vLLM's compile cache, whose key has the engine's config in it and none of the code that replaces a layer's.
MARK = "swift_lora_fix_dense"
VERSION = 1
LAYERS = (
    "ColumnParallelLinearWithLoRA",
    "MergedColumnParallelLinearWithLoRA",
    "MergedColumnParallelLinearVariableSliceWithLoRA",
    "QKVParallelLinearWithLoRA",
    "MergedQKVParallelLinearWithLoRA",
    "RowParallelLinearWithLoRA",
    "ReplicatedLinearWithLoRA",
)
# Their ``forward`` is the product and nothing more. A subclass may do more.
BASES = (
    "ColumnParallelLinear",
    "MergedColumnParallelLinear",
    "QKVParallelLinear",
    "RowParallelLinear",
    "ReplicatedLinear",
)
DTYPES = {"cuda": (torch.bfloat16, torch.float16), "cpu": (torch.bfloat16, torch.float16, torch.float32)}


def make_dense(manager: Any) -> None:
    """Make the LoRA layers of ``manager`` dense, a vLLM ``LoRAModelManager`` that has just created them.

    What does not allow it keeps vLLM's kernels. Raises ContractError, saying why, if no layer can be made dense.
    """
    problem = _try(manager)
    if problem is not None:
        raise ContractError(f"SWIFT_LORA_FIX_KERNELS='dense': no LoRA layer of this engine can be dense: {problem}.")


def make_dense_if_possible(manager: Any) -> None:
    """The same where nobody asked for it: if no layer can be made dense, one line says why."""
    problem = _try(manager)
    if problem is not None:
        info(f"vLLM's kernels compute the adapter, because no LoRA layer of this engine can be dense: {problem}.")


def _try(manager: Any) -> str | None:
    """Make dense what can be, and say so. Returns why it is none, or None."""
    kept: Counter[str] = Counter()
    made: list[str] = []
    problem = None
    try:
        problem = _engine_does_not_fit(manager)
        if problem is None:
            _make(manager, made, kept)
    except Exception as error:  # memory may be short, Triton raises many kinds
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if not made:
        return problem or "; ".join(kept) or "the model has no LoRA layers"
    if problem is not None:
        warning(f"some LoRA layers keep vLLM's kernels: {problem}.")
    rest = "".join(f"; {number} keep vLLM's kernels ({why})" for why, number in kept.items())
    info(f"dense LoRA layers: {len(made)}, each kind proved against float64 and against vLLM's kernels{rest}.")
    return None


def _make(manager: Any, made: list[str], kept: Counter[str]) -> None:
    prover = proving.Prover(manager)
    shared = _shared_storages(manager.model)
    for name, layer in dict(manager.modules).items():
        why = _does_not_fit(layer, shared)
        if why is None:
            before, why = _install(layer), "its proof did not end"
            try:
                why = prover.problem_of(layer, before["apply"])
            finally:
                if why is not None:
                    _restore(layer, before)
        if why is None:
            made.append(name)
        else:
            kept[f"{type(layer).__name__}: {why}"] += 1
    fused = [name for name in made if gated.fuse(manager, name)]
    if fused:
        info(f"dense LoRA layers: {len(fused)} go on to the activation that follows, proved against the two apart.")
    _mark(made, fused)
    if manager.device.type == "cuda" and made:
        torch.cuda.empty_cache()  # the weights have moved out of where they were


def _engine_does_not_fit(manager: Any) -> str | None:
    """Why no layer of this engine can be dense, or None."""
    config = manager.lora_config
    if config.max_loras != 1:
        return f"the engine has room for {config.max_loras} adapters at a time (max_loras)"
    if getattr(config, "fully_sharded_loras", False):
        return "the adapter is sharded over the ranks (fully_sharded_loras)"
    if torch.version.hip is not None:
        return "they are not made for ROCm"
    from vllm import envs

    if getattr(envs, "VLLM_BATCH_INVARIANT", False):
        return "VLLM_BATCH_INVARIANT asks for vLLM's own products"
    if not isinstance(_config().additional_config, dict):
        return "the engine's additional_config is no dictionary, so vLLM's compile cache could not tell them apart"
    return None


def _mark(made: list[str], fused: list[str]) -> None:
    """Mark the engine's config for vLLM's compile cache: which layers are dense, and how. Copies of the config share
    the dictionary."""
    said = json.dumps([VERSION, sorted(made), sorted(fused)]).encode()
    _config().additional_config[MARK] = hashlib.sha256(said).hexdigest()[:16]


def _config() -> Any:
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config()


def _does_not_fit(layer: Any, shared: set[int]) -> str | None:
    """Why this layer cannot be dense, or None."""
    base: Any = getattr(layer, "base_layer", None)
    if type(layer).__name__ not in LAYERS:
        return "it is no plain linear layer"
    if type(base).__name__ not in BASES:
        return f"its base is a {type(base).__name__}"
    if type(base.quant_method).__name__ != "UnquantizedLinearMethod":
        return f"its base is quantised ({type(base.quant_method).__name__})"
    weight, a, b = getattr(base, "weight", None), layer.lora_a_stacked, layer.lora_b_stacked
    outputs = sum(part.shape[2] for part in b)
    device = a[0].device.type
    if not isinstance(weight, torch.Tensor) or weight.shape != (outputs, a[0].shape[3]) or not weight.is_contiguous():
        return "its weight lies otherwise than its LoRA expects"  # packed away, for one, by vLLM's CPU backend
    if device not in DTYPES or weight.device.type != device:
        return f"it is on {weight.device.type}"
    if weight.dtype not in DTYPES[device] or a[0].dtype != weight.dtype:
        return f"its weight is {weight.dtype}, its LoRA {a[0].dtype}"
    if len({part.shape[2] for part in a} | {part.shape[3] for part in b}) != 1:
        return "its slices have different ranks"
    if device == "cuda" and len(b) > _most_slices():
        return f"it has {len(b)} slices"
    if weight.untyped_storage().data_ptr() in shared:
        return "another layer uses its weight too"
    return None


def _most_slices() -> int:
    from ..kernels.combine_kernel import SLICES

    return SLICES


def _shared_storages(model: torch.nn.Module) -> set[int]:
    """The memory that more than one tensor of the model uses, or that lies in a layer with two LoRA layers around it.
    Tensors that are no parameters count: an attention layer may keep views of a weight."""
    held = (tensor for module in model.modules() for tensor in _tensors(module) if tensor.numel())
    found = Counter(tensor.untyped_storage().data_ptr() for tensor in held)
    bases = [base for module in model.modules() if (base := module._modules.get("base_layer")) is not None]
    wrapped = Counter(map(id, bases))
    twice = (tensor for base in bases if wrapped[id(base)] > 1 for tensor in base.parameters())
    return {pointer for pointer, number in found.items() if number > 1} | {
        tensor.untyped_storage().data_ptr() for tensor in twice
    }


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Those of the module itself: parameters, buffers, plain attributes."""
    for values in (vars(module).values(), module._parameters.values(), module._buffers.values()):
        yield from (value for value in values if isinstance(value, torch.Tensor))


@torch.no_grad()
def _install(layer: Any) -> dict[str, Any]:
    """Move the layer's tensors and replace its ``apply``. Returns what ``_restore`` needs."""
    base, a, b = layer.base_layer, layer.lora_a_stacked, layer.lora_b_stacked
    weight, bias = base.weight, getattr(base, "bias", None)
    outputs, inputs = weight.shape
    rank, count = a[0].shape[2], len(a)
    slices = [part.shape[2] for part in b]
    rows = weight.new_zeros(outputs + count * rank, inputs)
    rows[:outputs] = weight
    whole_b = weight.new_zeros(outputs, rank)
    before = {"apply": layer.apply, "a": a, "b": b, "weight": weight.data, "bias": None if bias is None else bias.data}
    layer.dense_rows, layer.dense_b, layer.dense_slices = rows, whole_b, slices
    layer.dense_bias = None
    if bias is not None:
        layer.dense_bias = bias.new_zeros(outputs + count * rank)
        layer.dense_bias[:outputs] = bias
        bias.data = layer.dense_bias[:outputs]
        # a buffer of the model, so that vLLM restores it after a sleep of level 2
        layer.register_buffer("dense_bias_of_a", layer.dense_bias[outputs:], persistent=False)
    weight.data = rows[:outputs]
    layer.lora_a_stacked = tuple(part[None, None] for part in rows[outputs:].split(rank))
    layer.lora_b_stacked = tuple(part[None, None] for part in whole_b.split(slices))
    layer.apply = types.MethodType(_apply, layer)
    return before


def _restore(layer: Any, before: dict[str, Any]) -> None:
    """Undo ``_install``: vLLM's kernels and the memory of before."""
    base = layer.base_layer
    del layer.apply
    base.weight.data = before["weight"]
    layer.lora_a_stacked, layer.lora_b_stacked = before["a"], before["b"]
    if before["bias"] is not None:
        base.bias.data = before["bias"]
        del layer.dense_bias_of_a
    del layer.dense_rows, layer.dense_b, layer.dense_slices, layer.dense_bias


def _apply(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """In place of the layer's ``apply``. bias: the base layer's own, or None."""
    return torch.ops.swift_lora_fix.dense_linear(*op.arguments(layer, x, bias))
