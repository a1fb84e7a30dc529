"""A dense layer of gate and up that goes on to silu(gate)·up: one kernel and two passes over memory fewer.

In vLLM's models an MLP computes ``down_proj(act_fn(gate_up_proj(x)))``. Here the layer applies the activation itself,
and ``act_fn`` of that MLP passes on what it gets. That this MLP does it so is proved by its output.
"""

from __future__ import annotations

import types
from functools import partial
from typing import Any

import torch

from ....common.log import warning
from . import op
from .proving import apart, clear_slots, fill_slots, normal

LAYER, ACTIVATION = "gate_up_proj", "SiluAndMul"
TOKENS = (1, 33, op.TOGETHER + 7)
ALLOWED = 2.0**-6  # root mean square of the difference between both outputs, to that of one; bfloat16 has 2**-9


@torch.no_grad()
def fuse(manager: Any, name: str) -> bool:
    """Make the dense layer ``name`` of vLLM's LoRA manager apply the activation, if the module that holds it allows it.

    With tensor parallelism nothing is done: the proof would need all ranks at a time.
    """
    path, _, last = name.rpartition(".")
    layer: Any = manager.modules[name]
    if last != LAYER or layer.tp_size > 1 or len(set(layer.dense_slices)) != 1 or len(layer.dense_slices) != 2:
        return False
    block = manager.model.get_submodule(path)
    if type(getattr(block, "act_fn", None)).__name__ != ACTIVATION:
        return False
    try:
        if not apart(partial(_is_proved, block, layer), layer.dense_rows.device):
            return False
    except Exception as error:  # another kind of block, too little memory: the two stay apart
        warning(f"{name} stays apart from the activation that follows: {type(error).__name__}: {error}")
        return False
    finally:
        clear_slots(layer)
        layer.punica_wrapper._token_lora_indices.fill_(-1)
    _install(block, layer)
    return True


def _is_proved(block: Any, layer: Any) -> bool:
    """Whether ``block`` gives the same with the activation in the layer and apart from it, with a random adapter that
    every other token has."""
    indices, rows = layer.punica_wrapper._token_lora_indices, layer.dense_rows
    generator = torch.Generator(rows.device).manual_seed(0)
    fill_slots(layer, generator)
    indices.copy_(torch.arange(indices.numel(), device=rows.device) % 2 - 1)
    for tokens in dict.fromkeys(min(tokens, indices.numel()) for tokens in TOKENS):
        x = normal((tokens, rows.shape[1]), generator).to(rows.dtype)
        apart_from_it = block(x).double()
        before = _install(block, layer)
        try:
            off = block(x).double() - apart_from_it
        finally:
            block.act_fn, layer.apply = before
        if not float(off.square().mean()) <= ALLOWED**2 * float(apart_from_it.square().mean()):
            return False
    return True


def _install(block: Any, layer: Any) -> tuple[Any, Any]:
    before = (block.act_fn, layer.apply)
    block.act_fn, layer.apply = torch.nn.Identity(), types.MethodType(_apply, layer)
    return before


def _apply(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """In place of the layer's ``apply``. bias: the base layer's own, or None."""
    return torch.ops.swift_lora_fix.dense_gated(*op.arguments(layer, x, bias))
