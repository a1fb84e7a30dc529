"""What an adapter needs of vLLM's LoRA layers, looked at before anything is sent: its rank, a layer for each module."""

from __future__ import annotations

from ...errors import UnsupportedAdapterError
from ...policy.adapter import Adapter
from .handle import EngineHandle
from .weights.names import Names

PEFT_PREFIX = "base_model.model."
TOWER_OPTION = "enable_tower_connector_lora"  # of vLLM's LoRAConfig: LoRA on a vision tower and on an aligner


def check_fits(adapter: Adapter, engine: EngineHandle) -> None:
    """Raise UnsupportedAdapterError where the engine has no room for the adapter's rank, or no LoRA layer for some of
    its modules; it names them, and the mode that serves them."""
    _check_ranks(adapter, engine)
    unserved = _unserved(adapter, engine)
    if unserved:
        raise UnsupportedAdapterError(
            f"vLLM has no LoRA layer for {len(unserved)} of the modules of adapter {adapter.name!r}: "
            f"{', '.join(unserved[:4])}{' ...' if len(unserved) > 4 else ''}. Use --vllm_enable_lora false (fused "
            f"mode), {_tower_advice(unserved, engine)}or train without them."
        )


def _check_ranks(adapter: Adapter, engine: EngineHandle) -> None:
    limit = engine.lora_config.max_lora_rank
    if adapter.max_rank > limit:
        entry = max(adapter.entries, key=lambda e: e.rank)
        raise UnsupportedAdapterError(
            f"Adapter {adapter.name!r} has rank {entry.rank} ({entry.key}), the engine was started with "
            f"max_lora_rank={limit}. ms-swift takes that from --lora_rank: set --lora_rank {entry.rank}, "
            "also where the adapter is loaded with --adapters."
        )


def _unserved(adapter: Adapter, engine: EngineHandle) -> list[str]:
    """Names differ in front between the trainer's model and vLLM's, never at the end: the ends are compared. Experts of
    a fused MoE layer have names of their own in vLLM, which says itself whether it takes them."""
    manager = engine.manager
    parts = [part for parts in manager.packed_modules.values() for part in parts]
    served = Names((*manager.modules, *parts))
    modules = dict.fromkeys(entry.key.rsplit(".lora_", 1)[0].removeprefix(PEFT_PREFIX) for entry in adapter.entries)
    return [module for module in modules if module not in served and ".experts" not in module]


def _tower_advice(modules: list[str], engine: EngineHandle) -> str:
    """The option is worth a word where vLLM knows it and has it off, and the modules are none of a language model's."""
    config = engine.lora_config
    known = hasattr(config, TOWER_OPTION)  # older releases of vLLM do not have it
    if not known or getattr(config, TOWER_OPTION) or not all(_is_tower(module) for module in modules):
        return ""
    return f"or --vllm_engine_kwargs '{{\"{TOWER_OPTION}\": true}}' where vLLM serves this model's tower, "


def _is_tower(module: str) -> bool:
    return any(word in module for word in ("visual", "vision", "audio", "tower", "aligner", "merger", "projector"))
