"""Real PEFT models of two linear layers and an embedding, and the little of a trainer that a unit test needs."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D


class Tiny(torch.nn.Module):
    def __init__(self, biased: bool = False, tie: bool = False, visual: bool = False) -> None:
        super().__init__()
        self.config = {"model_type": "tiny"}
        self.embed = torch.nn.Embedding(10, 8)
        self.first = torch.nn.Linear(8, 12, bias=biased)
        self.second = torch.nn.Linear(12, 4, bias=biased)
        self.turned = Conv1D(6, 8)  # its weight is (in, out)
        if visual:
            self.visual = torch.nn.Linear(8, 8)
        if tie:
            self.tied = torch.nn.Linear(8, 10, bias=False)
            self.tied.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.embed(ids)))


def peft_model(
    seed: int = 0, zero_b: bool = False, biased: bool = False, tie: bool = False, visual: bool = False, **config: Any
) -> torch.nn.Module:
    """A PEFT model; B is random unless ``zero_b``."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["first", "second"], **config}
    model = get_peft_model(Tiny(biased, tie, visual), LoraConfig(**settings))
    if not zero_b:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "lora_embedding_B" in name:
                    parameter.normal_()
    return model
