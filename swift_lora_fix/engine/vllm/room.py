"""What a colocated engine must be started with, so that vLLM's LoRA layers can hold the adapter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from ...common.words import Words
from ...errors import UnsupportedAdapterError
from ...install import releases
from .fitting import TOWER_OPTION, is_tower


@dataclass(frozen=True)
class Room:
    """rank: vLLM's ``max_lora_rank``. towers: whether vLLM must be told to make LoRA layers in vision or audio towers
    and connectors too (``TOWER_OPTION``)."""

    rank: int
    towers: bool


def needed(model: torch.nn.Module, adapter_name: str, asked: int, words: Words) -> Room:
    """The room that the adapter needs. ms-swift gives vLLM ``--lora_rank`` (``asked``) as it is: vLLM refuses a rank
    that is not in its list, and an adapter whose largest rank is above (a rank pattern, ``--adapters``) has no room.

    Raises UnsupportedAdapterError where vLLM's LoRA layers have no room for the adapter's rank at all.
    """
    from peft.tuners.lora import LoraLayer
    from vllm.engine.arg_utils import EngineArgs

    layers = {
        name: int(module.r[adapter_name])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.scaling
    }
    most = max((asked, *layers.values()))
    rank = releases.engine_rank(most)
    if rank is None:
        raise UnsupportedAdapterError(
            f"vLLM's LoRA layers have room for rank {releases.ENGINE_RANKS[-1]} at most, adapter {adapter_name!r} has "
            f"rank {most}. Use {words.without_lora} (fused mode), or a smaller rank ({words.rank})."
        )
    options = {option.name for option in dataclasses.fields(EngineArgs)}
    return Room(rank, TOWER_OPTION in options and any(is_tower(name) for name in layers))
