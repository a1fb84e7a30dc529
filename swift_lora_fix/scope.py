"""Which trainers' sync is ours, and in which mode the engine serves their adapter."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

from . import adapter, merging
from .adapter import DEFAULT_ADAPTER
from .errors import SettingsError, UnsupportedAdapterError, UnsupportedTrainerError
from .server import remote
from .settings import Settings


@dataclass(frozen=True)
class Scope:
    ours: bool
    reason: str
    mode: Literal["adapter", "fused"] = "adapter"
    is_open: bool = False  # measured later, and changed where the other mode is the better one


def decide(trainer: Any) -> Scope:
    """Decide from the trainer as ms-swift prepared it; ``reason`` is one line for the log.

    Raises SettingsError where SWIFT_LORA_FIX_MODE asks for what --vllm_enable_lora excludes; UnsupportedAdapterError
    where it asks for the fused mode and the weights cannot be rewritten (quantised, tied).
    """
    args = trainer.args
    tuner = getattr(args, "tuner_type", None) or getattr(args, "train_type", None)
    if not args.use_vllm:
        return _aside("rollouts do not use vLLM")
    if tuner != "lora":
        return _aside(f"the tuner is {tuner!r}, not 'lora'")
    settings = Settings.from_environment()
    asked = settings.mode
    if trainer.vllm_mode == "server":
        return _for_servers(trainer, settings)
    if trainer.vllm_mode != "colocate":
        return _aside(f"vllm_mode is {trainer.vllm_mode!r}, neither 'colocate' nor 'server'")
    if asked == "adapter" and not trainer.rollout_enable_lora:
        raise SettingsError(
            "SWIFT_LORA_FIX_MODE='adapter' needs vLLM's LoRA layers: add --vllm_enable_lora true, or unset it."
        )
    if trainer.rollout_enable_lora and asked != "fused":
        is_open = asked == "auto"
        if not is_open or _can_be_apart(trainer):
            reason = "armed: the engine gets the unmerged base once and the adapter once, the trainer is only read."
            return Scope(True, reason + (" The mode is measured soon." if is_open else ""), "adapter", is_open)
    problem = why_not_fused(trainer)
    if problem is None:
        return Scope(
            True,
            "armed, fused mode: the engine's weights become those of the trainer's base with the adapter folded in, "
            "the trainer is only read.",
            "fused",
        )
    if asked == "fused":
        raise UnsupportedAdapterError(f"SWIFT_LORA_FIX_MODE='fused' cannot be had: {problem}.")
    return _aside(f"the fused mode cannot be had, {problem}")


def _for_servers(trainer: Any, settings: Settings) -> Scope:
    if settings.mode not in ("", "adapter"):
        raise SettingsError(
            f"SWIFT_LORA_FIX_MODE={settings.mode!r} is for colocated engines: unset it for rollout servers."
        )
    if trainer.rollout_enable_lora:
        problem = None if settings.transport else remote.why_not(trainer)  # by name: what is missing raises later
    else:
        problem = "the rollout servers have no LoRA layers: start `swift rollout` with --vllm_enable_lora true"
    if problem is not None:
        if settings.transport:
            raise SettingsError(f"SWIFT_LORA_FIX_TRANSPORT={settings.transport!r} cannot be had: {problem}.")
        return _aside(problem)
    return Scope(True, "armed, server mode: rollout servers get the adapter, and the base where theirs is another.")


def _can_be_apart(trainer: Any) -> bool:
    try:
        adapter.bind(trainer.accelerator.unwrap_model(trainer.model))
    except UnsupportedAdapterError:
        return False
    return True


def why_not_fused(trainer: Any) -> str | None:
    """What keeps the engine's weights from being rewritten, and the mode that works; None when nothing does."""
    obstacle = _obstacle(trainer)
    if obstacle is None:
        return None
    if _can_be_apart(trainer):
        return f"{obstacle}. Use --vllm_enable_lora true, with which the adapter stays apart"
    return (
        f"{obstacle}. Nor can vLLM's LoRA layers serve this adapter: train it without that, or on what is not "
        "quantised, tied or packed"
    )


def _obstacle(trainer: Any) -> str | None:
    quantization = getattr(trainer.engine.engine.vllm_config.model_config, "quantization", None)
    if quantization:
        return f"the engine holds the base quantised ({quantization}), and the merged weights are not"
    model = trainer.accelerator.unwrap_model(trainer.model)
    try:
        modules = merging.bind(model, DEFAULT_ADAPTER)
    except UnsupportedAdapterError as error:
        return str(error)
    for module in modules:
        for source, parameter in ((source, module.parameters[name]) for source, name in module.plain.items()):
            if not parameter.is_floating_point() or parameter.element_size() < 2:
                return f"the trainer holds {source} quantised ({parameter.dtype})"
    tied = merging.tied(model, modules)
    if tied:
        return f"{tied[0]} is tied to {tied[1]}, the adapter parts them, and in the engine they are one"
    return None


def request_class(trainer: Any) -> Any:
    """ms-swift's ``TensorLoRARequest``, from the module that defines the trainer's rollout mixin."""
    return rollout_module(type(trainer)).TensorLoRARequest


def rollout_module(trainer_class: type) -> Any:
    """The module of ms-swift's ``RolloutTrainerMixin`` in the trainer's bases."""
    for cls in trainer_class.__mro__:
        if cls.__name__ == "RolloutTrainerMixin":
            return sys.modules[cls.__module__]
    raise UnsupportedTrainerError(f"{trainer_class.__name__} is not built on ms-swift's RolloutTrainerMixin.")


def _aside(why: str) -> Scope:
    return Scope(False, f"stepping aside: {why}. ms-swift's own weight sync runs unchanged.")
