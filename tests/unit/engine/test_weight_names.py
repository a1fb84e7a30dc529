"""Experts that vLLM 0.26 wrapped for LoRA. A CPU has no LoRA for experts, so ``RoutedExperts`` is a stand-in here; the
real one is in tests/real/gpu/test_examples_gpu.py (moe_adapter)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from swift_lora_fix.engine.vllm.weights.names import with_experts_as_they_are


class RoutedExperts(torch.nn.Module):
    """Loads as vllm/model_executor/layers/fused_moe/routed_experts.py does: by the prefix, its own parameter."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.w13_weight, self.lora_base_layer_prefix = torch.nn.Parameter(torch.zeros(2)), prefix

    def load(self) -> Any:
        return getattr(self, f"{self.lora_base_layer_prefix}w13_weight")


def test_wrapped_experts_take_their_weights_while_the_base_is_sent_and_are_wrapped_again_afterwards() -> None:
    wrapped, plain = RoutedExperts("base_layer."), RoutedExperts("")
    model = torch.nn.Sequential(wrapped, plain)
    with pytest.raises(AttributeError, match="base_layer.w13_weight"):
        wrapped.load()
    with pytest.raises(RuntimeError, match="vLLM"), with_experts_as_they_are(model):
        assert wrapped.load() is wrapped.w13_weight and plain.load() is plain.w13_weight
        raise RuntimeError("vLLM is out of memory")
    assert (wrapped.lora_base_layer_prefix, plain.lora_base_layer_prefix) == ("base_layer.", "")
