"""LoRA adapters from memory for any program that uses vLLM's ``LLM``, ``AsyncLLM`` or engine; ms-swift is not needed.

The path of an adapter::

    request.py   LoRATensorRequest: tensors and PEFT's config in place of a folder
    sending.py   in the process of the LLM: publishes it once, releases it when every worker has loaded it
    segment.py   its bytes: safetensors in sealed shared memory without a name
    loading.py   in the worker: vLLM's own loader, with all its checks, reads the segment as if it were the file
    update.py    a new policy under the same id; if the worker is in this process, straight into its slots
    hooks.py     when the hooks (patches.py) go in

Importing this package installs the hooks in this process and, through vLLM's plugin entry point, in those that vLLM
starts. If ``VLLM_PLUGINS`` is set, it must name ``swift_lora_fix``.
"""

from __future__ import annotations

from .hooks import install
from .request import LoRATensorRequest, from_peft_model, from_safetensors
from .update import update

__all__ = ["LoRATensorRequest", "from_peft_model", "from_safetensors", "update"]

install()
