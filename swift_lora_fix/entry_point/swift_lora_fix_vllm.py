"""Entry point ``vllm.general_plugins``: vLLM calls it in every process that it starts, and in the one that starts them.

It is a module outside the package, because importing the package arms it, and an installed package that nobody asked
for must change nothing. A process that did ask says so in its environment, which the processes that vLLM starts
inherit. The variables are those of swift_lora_fix/install/instrumentor.py.
"""

import importlib
import os

ASKED_FOR = {
    "SWIFT_LORA_FIX_ARMED": "swift_lora_fix",
    "SWIFT_LORA_FIX_MEMORY": "swift_lora_fix.memory",
}


def register() -> None:
    """Import what the parent process asked for. Importing arms it; nothing else is needed."""
    for variable, module in ASKED_FOR.items():
        if os.environ.get(variable) == "1":
            importlib.import_module(module)
