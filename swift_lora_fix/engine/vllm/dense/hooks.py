"""The hook into vLLM for dense LoRA layers. No logic here."""

from __future__ import annotations

from typing import Any, Callable

from ....common.settings import Settings
from ....install.registry import Patch, PatchSet
from . import layers


def _never() -> bool:
    return False


is_for_a_trainer: Callable[[], bool] = _never  # whether this process makes a trainer's rollouts; DenseLayers sets it


def make_dense(wrapped: Callable[..., Any], manager: Any, args: Any, kwargs: Any) -> Any:
    """``LoRAModelManager._create_lora_modules``: makes the layers that it made dense, before anything is compiled."""
    made = wrapped(*args, **kwargs)
    if Settings.from_environment().kernels == "dense":
        layers.make_dense(manager)
    elif manager.device.type == "cuda" and is_for_a_trainer():
        layers.make_dense_if_possible(manager)
    return made


LAYERS = PatchSet(
    "vllm.lora.model_manager",
    (
        Patch(
            "LoRAModelManager._create_lora_modules",
            make_dense,
            why="vLLM's LoRA kernels, made for many adapters at once, cost about a third of the generation's speed",
            goes_when="vLLM computes a single adapter at about the speed of the plain base",
        ),
    ),
)
