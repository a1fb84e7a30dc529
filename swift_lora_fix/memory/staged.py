"""A request for an engine in this process whose tensors vLLM keeps themselves, so that a write plan can be learnt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .request import LoRATensorRequest


class StagedRequest:
    """Made like a LoRARequest that takes tensors (``TrainerPort.adapter_request_class``)."""

    __struct_fields__ = LoRATensorRequest.__struct_fields__

    def __new__(
        cls,
        lora_name: str,
        lora_int_id: int,
        lora_path: str,
        peft_config: Any,
        lora_tensors: Mapping[str, torch.Tensor],
        load_inplace: bool = False,
    ) -> Any:
        """lora_path: unused, there is no folder. lora_tensors: on the CPU, in the LoRA dtype; vLLM keeps them."""
        request = LoRATensorRequest(lora_name, lora_int_id, peft_config, lora_tensors, load_inplace=load_inplace)
        request.content.is_kept = True
        return request
