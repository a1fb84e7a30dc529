"""The names under which vLLM loads the weights of layers that it has wrapped for LoRA.

vLLM keeps such a layer's own weights under ``base_layer``. It wraps a packed layer (``qkv_proj``) whole, even when only
some of its parts have a LoRA. Up to 0.27, loading wants ``base_layer`` in the names of all these parts. From 0.28 on
the wrapper has its own ``load_weights`` (vLLM 39935), and ``base_layer`` must not be in the name. A framework knows
only the trainer's LoRA layers, so for the other parts, and for wrapped embeddings, its names end in a KeyError.

Experts are apart. vLLM 0.26's ``RoutedExperts`` loads its own weights, and once it is wrapped it looks for them under
a name that they never have (AttributeError: ``base_layer.w13_weight``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from ....common.shadowing import holding
from ..handle import EngineHandle

WRAPPED = "base_layer"
EXPERTS_PREFIX = "lora_base_layer_prefix"  # of RoutedExperts; FusedMoEWithLoRA sets it to "base_layer."
# The trainer's names differ from vLLM's only at the front (model., language_model.), so the last parts are compared.
TAIL = 4


class Names:
    """A set of module paths. ``in`` also finds the path that another model has for the same module."""

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
    """Returns a function that renames weights of wrapped layers to the names that this engine loads."""
    layers = dict(_wrapped(engine.model))
    wrapped = Names(layers)
    forwards = any(hasattr(type(layer), "load_weights") for layer in layers.values())

    def rename(name: str) -> str:
        if forwards:
            return name.replace(f".{WRAPPED}.", ".")
        module, _, parameter = name.rpartition(".")
        if module.endswith(f".{WRAPPED}") or module not in wrapped:
            return name
        return f"{module}.{WRAPPED}.{parameter}"

    if not layers:
        return lambda weights: weights
    return lambda weights: {rename(name): value for name, value in weights.items()}


@contextlib.contextmanager
def with_experts_as_they_are(model: torch.nn.Module) -> Iterator[None]:
    """Context in which vLLM's wrapped experts load their weights as those that are not wrapped do."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if getattr(module, EXPERTS_PREFIX, ""):
                stack.enter_context(holding(module, **{EXPERTS_PREFIX: ""}))
        yield


def _wrapped(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Paths of the wrapped layers and of their packed parts, each with its layer."""
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})  # not every model packs
    for path, module in model.named_modules():
        if isinstance(getattr(module, WRAPPED, None), torch.nn.Module):
            parent, _, name = path.rpartition(".")
            for part in (name, *packed.get(name, ())):
                yield (f"{parent}.{part}" if parent else part), module
