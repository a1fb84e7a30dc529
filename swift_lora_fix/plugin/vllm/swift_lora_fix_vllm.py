"""Entry point ``vllm.general_plugins``: vLLM calls it in every process that it starts, and in the one that starts them.

A module of its own beside the package, because importing the package arms it, and an installed package that nobody
asked for must change nothing. Where somebody did ask, that process says so in its environment, and those that vLLM
starts from it inherit the answer. The names are those of swift_lora_fix/install/instrumentor.py.
"""

import importlib
import os

ASKED_FOR = {
    "SWIFT_LORA_FIX_ARMED": "swift_lora_fix",
    "SWIFT_LORA_FIX_MEMORY": "swift_lora_fix.memory",
}


def register() -> None:
    """Import in this process what its parent asked for: importing is what arms it, and nothing else is needed."""
    for variable, module in ASKED_FOR.items():
        if os.environ.get(variable) == "1":
            importlib.import_module(module)
