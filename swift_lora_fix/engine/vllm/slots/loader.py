"""The reference path: vLLM's own code loads the adapter, from copies, under one fixed id.

The scaling is folded into B here, with PEFT's own number for each module, and vLLM is told a scaling of 1. So rank and
alpha patterns and rsLoRA come out right even on releases whose ``PEFTHelper`` has one scaling for the whole adapter.
The product is computed in fp32 and rounded once to the LoRA dtype. vLLM would round B first and scale it afterwards
(``LoRALayerWeights.optimize``): the same bits if the scaling is a power of two, otherwise up to one more rounding away
from what the trainer computes.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping
from typing import Any

import torch

from ....common.words import PLAIN, Words
from ....errors import EngineStateError
from ....policy.adapter import Adapter
from ..handle import ADAPTER_ID, ADAPTER_NAME, ADAPTER_PATH, EngineHandle


def stage(
    adapter: Adapter, held: dict[str, torch.Tensor], dtype: torch.dtype, pinned: bool = False
) -> dict[str, torch.Tensor]:
    """Copy ``held`` (whole CPU tensors by PEFT key) into new CPU tensors of the LoRA dtype, scaling folded into B.

    Always copies: vLLM keeps a tensor that already has its device and dtype, and scales it in place.
    """
    staged = {}
    for entry in adapter.entries:
        value = held[entry.key]
        copy = torch.empty(value.shape, dtype=dtype, device="cpu", pin_memory=pinned)
        copy.copy_(value if entry.scale == 1.0 else value.float() * entry.scale)
        staged[entry.key] = copy
    return staged


def load(engine: EngineHandle, adapter: Adapter, staged: dict[str, torch.Tensor], request_class: Any) -> None:
    """Have vLLM replace the adapter by ``staged`` (PEFT keys, (r, in) and (out, r), LoRA dtype, scaling folded in).

    request_class: ms-swift's ``TensorLoRARequest``. vLLM keeps the tensors. Raises EngineStateError when vLLM refuses
    them, or has no LoRA layer for some of their modules.
    """
    inplace = {"load_inplace": True} if "load_inplace" in request_class.__struct_fields__ else {}
    if not inplace and ADAPTER_ID in engine.llm_engine.list_loras():
        engine.llm_engine.remove_lora(ADAPTER_ID)
    loaded = engine.llm_engine.add_lora(request(adapter, staged, request_class, **inplace))
    if loaded is False:
        raise EngineStateError(f"vLLM's add_lora() refused adapter {ADAPTER_ID} ({ADAPTER_NAME}).")
    check_served(engine, adapter.words)


def request(adapter: Adapter, staged: dict[str, torch.Tensor], request_class: Any, **more: Any) -> Any:
    """What vLLM's ``add_lora`` takes of this adapter."""
    return request_class(
        lora_name=ADAPTER_NAME,
        lora_int_id=ADAPTER_ID,
        lora_path=ADAPTER_PATH,
        peft_config=plain_config(adapter),
        lora_tensors=staged,
        **more,
    )


def check_served(engine: EngineHandle, words: Words = PLAIN) -> None:
    """Raise EngineStateError naming the modules of the loaded adapter that no LoRA layer of the engine applies. vLLM
    itself checks only the last part of their names."""
    manager = engine.manager
    loaded = manager.list_adapters()[ADAPTER_ID]
    ignored = sorted(name for name in loaded.loras if name not in manager.modules)
    if ignored or not loaded.loras:
        raise EngineStateError(
            f"vLLM applies no LoRA in {len(ignored)} of the adapter's modules, so rollouts would silently lack them: "
            f"{', '.join(ignored[:8]) or 'all of them'}{' ...' if len(ignored) > 8 else ''}. "
            f"Train without these target modules, or use {words.without_lora} (fused mode)."
        )


def plain_config(adapter: Adapter) -> dict[str, Any]:
    """The adapter's PEFT config for vLLM, as a plain LoRA of scaling 1 (B contains the scaling already), with only
    types that JSON has."""
    config = dict(adapter.config) if isinstance(adapter.config, Mapping) else dataclasses.asdict(adapter.config)
    config.update(
        r=adapter.max_rank,
        lora_alpha=adapter.max_rank,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        # PiSSA, OLoRA and the like change the base. The engine has that changed base, so the rest is a plain LoRA
        init_lora_weights=True,
    )
    return dict(json.loads(json.dumps(config, default=_plain)))


def _plain(value: Any) -> Any:
    """Converts what JSON does not have: sets and enums."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.value if isinstance(value, enum.Enum) else str(value)
