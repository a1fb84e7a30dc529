"""Entry point ``vllm.general_plugins``: vLLM calls it in every process it starts, engine core and workers included.

Having the package installed must change nothing by itself, so the worker side is armed only where the process that
started vLLM armed the package: that process says so in the environment, which its children inherit.
"""

from __future__ import annotations

import os

PARENT_ARMED = "SWIFT_LORA_FIX_ARMED"
PARENT_USES_MEMORY = "SWIFT_LORA_FIX_MEMORY"  # it imported swift_lora_fix.memory


def register() -> None:
    """Do in this vLLM process what its parent did. vLLM logs a plugin that fails to load and goes on without it."""
    if os.environ.get(PARENT_ARMED) == "1":
        import swift_lora_fix  # noqa: F401  importing it arms it
    if os.environ.get(PARENT_USES_MEMORY) == "1":
        import swift_lora_fix.memory  # noqa: F401  importing it installs its hooks
