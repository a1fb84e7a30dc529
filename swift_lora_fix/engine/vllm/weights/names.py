"""Names under which vLLM loads the weights of layers that it has wrapped for LoRA.

vLLM keeps such a layer's own weights under ``base_layer``, and wraps a packed layer (``qkv_proj``) whole, also where
only some of its parts have a LoRA. A framework adds ``base_layer`` to the names of the trainer's own LoRA layers alone,
and then vLLM's ``load_weights`` dies of a KeyError for the other parts, and for wrapped embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from ..handle import EngineHandle

WRAPPED = "base_layer"
# Names differ between the trainer's model and vLLM's in front (model., language_model.), never at the end.
TAIL = 4


class Names:
    """Paths of modules, to be asked by another model's path of the same module."""

    def __init__(self, paths: Iterable[str]) -> None:
        parts = [path.split(".") for path in paths]
        self._ends = {".".join(part[-size:]) for part in parts for size in range(1, min(TAIL, len(part)) + 1)}
        self._short = {".".join(part) for part in parts if len(part) < TAIL}

    def __contains__(self, path: str) -> bool:
        parts = path.split(".")[-TAIL:]
        ends = {".".join(parts[-size:]) for size in range(1, len(parts) + 1)}
        return ".".join(parts) in self._ends or bool(ends & self._short)

    def __bool__(self) -> bool:
        return bool(self._ends)


def of_wrapped_layers(engine: EngineHandle) -> Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]:
    """What gives each weight of a wrapped layer the name that vLLM loads it by."""
    wrapped = Names(_wrapped(engine.model))

    def rename(weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return {_renamed(name, wrapped): value for name, value in weights.items()}

    return rename if wrapped else lambda weights: weights


def _renamed(name: str, wrapped: Names) -> str:
    module, _, parameter = name.rpartition(".")
    if module.endswith(f".{WRAPPED}") or module not in wrapped:
        return name
    return f"{module}.{WRAPPED}.{parameter}"


def _wrapped(model: Any) -> Iterator[str]:
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})  # not every model packs
    for path, module in model.named_modules():
        if isinstance(getattr(module, WRAPPED, None), torch.nn.Module):
            parent, _, name = path.rpartition(".")
            for part in (name, *packed.get(name, ())):
                yield f"{parent}.{part}" if parent else part
