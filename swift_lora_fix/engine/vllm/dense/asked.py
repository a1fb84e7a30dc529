"""Whether dense LoRA layers that were asked for are there: if not, an error or a line says so."""

from __future__ import annotations

from typing import Any

from ....common.log import info
from ....common.settings import Settings
from ....errors import ContractError
from ....install import releases


def check(mode: str, engine: Any) -> None:
    """For a run in ``mode`` with its engine (EnginePort), before anything is sent. Raises ContractError if an engine of
    this process was to have dense layers and has none."""
    if Settings.from_environment().kernels != "dense":
        return
    if mode == "fused":
        info("SWIFT_LORA_FIX_KERNELS='dense' is for adapter mode: in fused mode there are no LoRA layers.")
    elif engine.is_shared:
        info("SWIFT_LORA_FIX_KERNELS='dense' is for the servers: each takes it from its own environment and log.")
    elif not any(hasattr(module, "dense_rows") for module in engine.model.modules()):
        raise ContractError(
            "SWIFT_LORA_FIX_KERNELS='dense': no LoRA layer of this engine is dense. It was made before swift_lora_fix "
            f"was loaded, or vLLM {releases.installed_vllm()} makes its LoRA layers elsewhere. Load the plugin "
            "earlier, or unset the variable."
        )
