"""Checks, before anything is sent, that vLLM's LoRA layers can take the adapter: its rank, a layer for each module."""

from __future__ import annotations

from collections.abc import Callable

from ...common.words import Words
from ...errors import UnsupportedAdapterError
from ...install import releases
from ...policy.adapter import Adapter
from .handle import EngineHandle
from .weights.names import Names

PEFT_PREFIX = "base_model.model."
TOWER_OPTION = "enable_tower_connector_lora"  # of vLLM's LoRAConfig: LoRA in vision towers and connectors


def check_fits(adapter: Adapter, engine: EngineHandle) -> None:
    """Raise UnsupportedAdapterError when the adapter's rank exceeds the engine's, or when modules have no LoRA layer
    that takes them. The message names them, and the mode that serves them."""
    _check_ranks(adapter, engine)
    whole = _whole(adapter, engine)
    if whole:
        raise UnsupportedAdapterError(
            f"The LoRA layers of this vLLM take {whole[0]} (and {len(whole) - 1} more) in parts that are "
            f"trained apart, and adapter {adapter.name!r} has one LoRA for the whole: vLLM would fail with an "
            f"IndexError. Use {adapter.words.without_lora} (fused mode), or train without them."
        )
    unserved = _unserved(adapter, engine)
    if unserved:
        raise UnsupportedAdapterError(
            f"vLLM has no LoRA layer for {len(unserved)} of the modules of adapter {adapter.name!r}: "
            f"{', '.join(unserved[:4])}{' ...' if len(unserved) > 4 else ''}. Use {adapter.words.without_lora} (fused "
            f"mode), {_tower_advice(unserved, engine, adapter.words)}or train without them."
        )


def _check_ranks(adapter: Adapter, engine: EngineHandle) -> None:
    limit = engine.lora_config.max_lora_rank
    if adapter.max_rank > limit:
        entry = max(adapter.entries, key=lambda e: e.rank)
        raise UnsupportedAdapterError(
            f"Adapter {adapter.name!r} has rank {entry.rank} ({entry.key}), the engine was started with "
            f"max_lora_rank={limit}. The engine was made before swift_lora_fix could give it room: set "
            f"{adapter.words.rank} to {releases.engine_rank(entry.rank) or entry.rank}, or use "
            f"{adapter.words.without_lora} (fused mode)."
        )


def _unserved(adapter: Adapter, engine: EngineHandle) -> list[str]:
    """Modules without a LoRA layer. The trainer's names differ from vLLM's only at the front, so the ends are compared.
    Experts of a fused MoE layer are skipped: vLLM names them differently, and rejects them itself if it cannot serve
    them."""
    manager = engine.manager
    parts = [part for parts in manager.packed_modules.values() for part in parts]
    served = Names((*manager.modules, *parts))
    return [module for module in _modules(adapter) if module not in served and ".experts" not in module]


def _whole(adapter: Adapter, engine: EngineHandle) -> list[str]:
    """Modules that are one in the trainer, and packed out of several in the engine: ``gate_up_proj`` of GLM-4. Layers
    of vLLM that take either are named VariableSlice (lora/layers/column_parallel_linear.py); the others index the
    single tensor as if it were the list of its parts."""
    manager = engine.manager
    several = [name for name, parts in manager.packed_modules.items() if len(parts) > 1 and ".experts" not in name]
    packed = Names([name for name in several if "VariableSlice" not in type(manager.modules.get(name)).__name__])
    return [module for module in _modules(adapter) if module in packed]


def _modules(adapter: Adapter) -> list[str]:
    names = (entry.key.rsplit(".lora_", 1)[0].removeprefix(PEFT_PREFIX) for entry in adapter.entries)
    return list(dict.fromkeys(names))


def towers_without_layers(adapter: Adapter, engine: Callable[[], EngineHandle]) -> list[str]:
    """Modules of the adapter in vision or audio towers, or their connectors, that have no LoRA layer in the engine."""
    if not any(is_tower(entry.key) for entry in adapter.entries):
        return []
    return [module for module in _unserved(adapter, engine()) if is_tower(module)]


def _tower_advice(modules: list[str], engine: EngineHandle, words: Words) -> str:
    """Suggest the option if vLLM has it, the trainer's users can set it, it is off, and all these modules lie outside
    the language model."""
    config = engine.lora_config
    known = hasattr(config, TOWER_OPTION)  # older releases of vLLM lack it
    if not known or not words.more or getattr(config, TOWER_OPTION) or not all(is_tower(module) for module in modules):
        return ""
    option = words.more.format(f'{{"{TOWER_OPTION}": true}}')
    return f"or {option} where vLLM serves this model's tower, "


def is_tower(module: str) -> bool:
    """Whether a module, by its name, is part of a vision or audio tower or of what connects one to the language
    model."""
    return any(word in module for word in ("visual", "vision", "audio", "tower", "aligner", "merger", "projector"))
