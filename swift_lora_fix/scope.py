"""Decides which trainers we sync, and in which mode the engine serves their adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .common.settings import Settings
from .engine.vllm import fitting
from .engine.vllm.handle import EngineHandle
from .errors import SettingsError, UnsupportedAdapterError
from .policy import adapter as adapters
from .policy import merging
from .policy.adapter import DEFAULT_ADAPTER
from .server.trainer import remote
from .trainer import TrainerPort

# What ms-swift trains with these has a LoRA. lora_llm (swift/tuner_plugin/lora_llm.py): on the language model; towers
# and aligner are trained whole. ms-swift gives its engine no LoRA layers.
TUNERS = ("lora", "lora_llm")


@dataclass(frozen=True)
class Scope:
    ours: bool
    reason: str
    mode: Literal["adapter", "fused"] = "adapter"
    is_open: bool = False  # auto: measured later, and the mode may change then


def decide(trainer: TrainerPort) -> Scope:
    """Decide from the trainer as its framework prepared it. ``Scope.reason`` is one line for the log.

    Raises SettingsError when SWIFT_LORA_FIX_MODE and the engine's LoRA layers contradict each other;
    UnsupportedAdapterError when it asks for fused mode but the weights cannot be rewritten (quantised, tied).

    Where no mode is asked for by name and the engine's LoRA layers cannot apply the adapter, it is folded in, if that
    can be had; else binding it raises.
    """
    if not trainer.uses_vllm:
        return _aside("rollouts do not use vLLM", trainer)
    if trainer.tuner not in TUNERS:
        return _aside(f"the tuner is {trainer.tuner!r}, not {' or '.join(map(repr, TUNERS))}", trainer)
    settings = Settings.from_environment()
    asked = settings.mode
    if trainer.engine_place == "server":
        return _for_servers(trainer, settings)
    if trainer.engine_place == "folders":
        if asked not in ("", "adapter"):
            raise SettingsError(f"SWIFT_LORA_FIX_MODE={asked!r} is for colocated engines: unset it for a vLLM server.")
        return Scope(True, "armed, server mode: vLLM loads each policy from a folder, the trainer is only read.")
    if trainer.engine_place != "colocate":
        return _aside(f"vllm_mode is {trainer.engine_place!r}, neither 'colocate' nor 'server'", trainer)
    if asked == "adapter" and not trainer.engine_has_lora:
        raise SettingsError(
            f"SWIFT_LORA_FIX_MODE='adapter' needs vLLM's LoRA: start with {trainer.words.with_lora}, or unset it."
        )
    misfit = _misfit(trainer) if trainer.engine_has_lora and asked in ("", "auto") else None
    if misfit is not None and why_not_fused(trainer) is None:
        return Scope(
            True,
            f"armed, fused mode: {misfit}. So the adapter is folded into the engine's weights, the trainer is only "
            "read.",
            "fused",
        )
    if trainer.engine_has_lora and asked != "fused":
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
    return _aside(f"the fused mode cannot be had, {problem}", trainer)


def _for_servers(trainer: TrainerPort, settings: Settings) -> Scope:
    if settings.mode not in ("", "adapter"):
        raise SettingsError(
            f"SWIFT_LORA_FIX_MODE={settings.mode!r} is for colocated engines: unset it for rollout servers."
        )
    if trainer.engine_has_lora:
        problem = None if settings.transport else remote.why_not(trainer)  # asked by name: what is missing raises later
    else:
        problem = f"the rollout servers have no LoRA layers: start them with {trainer.words.with_lora}"
    if problem is not None:
        if settings.transport:
            raise SettingsError(f"SWIFT_LORA_FIX_TRANSPORT={settings.transport!r} cannot be had: {problem}.")
        return _aside(problem, trainer)
    return Scope(True, "armed, server mode: rollout servers get the adapter, and the base where theirs is another.")


def _can_be_apart(trainer: TrainerPort) -> bool:
    try:
        adapters.bind(trainer.model, words=trainer.words)
    except UnsupportedAdapterError:
        return False
    return True


def _misfit(trainer: TrainerPort) -> str | None:
    """Why the LoRA layers of the trainer's engine cannot apply its adapter, or None."""
    try:
        adapter = adapters.bind(trainer.model, words=trainer.words)
    except UnsupportedAdapterError:
        return None  # it is refused when it is bound to be served
    return fitting.why_not(adapter, EngineHandle(trainer.vllm_engine))


def why_not_fused(trainer: TrainerPort) -> str | None:
    """Why the engine's weights cannot be rewritten, and which mode works instead; None when they can."""
    obstacle = _obstacle(trainer)
    if obstacle is None:
        return None
    if _can_be_apart(trainer):
        return f"{obstacle}. Use {trainer.words.with_lora}, with which the adapter stays apart"
    return (
        f"{obstacle}. Nor can vLLM's LoRA layers serve this adapter: train it without that, or on what is not "
        "quantised, tied or packed"
    )


def _obstacle(trainer: TrainerPort) -> str | None:
    quantization = trainer.vllm_engine.vllm_config.model_config.quantization
    if quantization:
        return f"the engine holds the base quantised ({quantization}), and the merged weights are not"
    model = trainer.model
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


def _aside(why: str, trainer: TrainerPort) -> Scope:
    return Scope(False, f"stepping aside: {why}. {trainer.words.framework}'s own weight sync runs unchanged.")
