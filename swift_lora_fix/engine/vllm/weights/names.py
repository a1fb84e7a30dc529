"""Names under which vLLM loads the weights of layers that it has wrapped for LoRA.

vLLM keeps such a layer's own weights under ``base_layer``, and wraps a packed layer (``qkv_proj``) whole, also where
only some of its parts have a LoRA. A framework adds ``base_layer`` to the names of the trainer's own LoRA layers alone,
and then vLLM's ``load_weights`` dies of a KeyError for the other parts, and for wrapped embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..handle import EngineHandle

WRAPPED = "base_layer"
# Names differ between the trainer's model and vLLM's in front (model., language_model.), never at the end.
TAIL = 4


def of_wrapped_layers(engine: EngineHandle) -> Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]:
    """What gives each weight of a wrapped layer the name that vLLM loads it by."""
    wrapped = _wrapped_tails(engine.model)

    def rename(weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return {_renamed(name, wrapped): value for name, value in weights.items()}

    return rename if wrapped else lambda weights: weights


def _renamed(name: str, wrapped: set[str]) -> str:
    module, _, parameter = name.rpartition(".")
    if module.endswith(f".{WRAPPED}") or tail(module) not in wrapped:
        return name
    return f"{module}.{WRAPPED}.{parameter}"


def _wrapped_tails(model: Any) -> set[str]:
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})  # not every model packs
    found = set()
    for path, module in model.named_modules():
        if isinstance(getattr(module, WRAPPED, None), torch.nn.Module):
            parent, _, name = path.rpartition(".")
            for part in (name, *packed.get(name, ())):
                found.add(tail(f"{parent}.{part}" if parent else part))
    return found


def tail(module: str) -> str:
    """The last parts of a module's path, which the trainer's model and vLLM's have in common."""
    return ".".join(module.split(".")[-TAIL:])
