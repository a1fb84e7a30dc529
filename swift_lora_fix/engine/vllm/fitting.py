"""Checks, before anything is sent, that vLLM's LoRA layers can take the adapter: its rank, a layer for each module."""

from __future__ import annotations

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
    fused, rank = f"{adapter.words.without_lora} (fused mode)", adapter.max_rank
    advice = f"Use {fused}, {_tower_advice(adapter, engine)}or train without them."
    if rank > engine.lora_config.max_lora_rank:
        room = releases.engine_rank(rank) or rank
        made = "The engine was made before swift_lora_fix could give it room"
        advice = f"{made}: set {adapter.words.rank} to {room}, or use {fused}."
    problem = why_not(adapter, engine)
    if problem is not None:
        raise UnsupportedAdapterError(f"The engine cannot apply the adapter: {problem}. {advice}")


def why_not(adapter: Adapter, engine: EngineHandle) -> str | None:
    """Why the engine's LoRA layers cannot apply the adapter, with the modules that they cannot take; None if they
    can."""
    limit = engine.lora_config.max_lora_rank
    if adapter.max_rank > limit:
        entry = max(adapter.entries, key=lambda e: e.rank)
        return (
            f"adapter {adapter.name!r} has rank {entry.rank} ({entry.key}), the engine was started with "
            f"max_lora_rank={limit}"
        )
    whole = _whole(adapter, engine)
    if whole:
        return (
            f"the LoRA layers of this vLLM take {_some(whole)} in parts that are trained apart, and adapter "
            f"{adapter.name!r} has one LoRA for the whole (vLLM would fail with an IndexError)"
        )
    unserved = _unserved(adapter, engine)
    if unserved:
        count = len(unserved)
        return f"vLLM has no LoRA layer for {count} of the modules of adapter {adapter.name!r} ({_some(unserved)})"
    return None


def _some(modules: list[str]) -> str:
    return ", ".join(modules[:4]) + (" ..." if len(modules) > 4 else "")


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


def _tower_advice(adapter: Adapter, engine: EngineHandle) -> str:
    """Suggest the option if vLLM has it, the trainer's users can set it, it is off, and all modules without a layer lie
    outside the language model."""
    config, more, modules = engine.lora_config, adapter.words.more, _unserved(adapter, engine)
    known = hasattr(config, TOWER_OPTION)  # older releases of vLLM lack it
    if not (known and more and modules) or getattr(config, TOWER_OPTION) or not all(map(is_tower, modules)):
        return ""
    option = more.format(f'{{"{TOWER_OPTION}": true}}')
    return f"or {option} where vLLM serves this model's tower, "


def is_tower(module: str) -> bool:
    """Whether a module, by its name, is part of a vision or audio tower or of what connects one to the language
    model."""
    return any(word in module for word in ("visual", "vision", "audio", "tower", "aligner", "merger", "projector"))
