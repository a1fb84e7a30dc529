"""When the hooks into vLLM go in: after ``swift_lora_fix.memory`` is imported, each as its module is loaded."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from ..errors import ContractError
from ..install import releases
from ..install.instrumentor import PARENT_USES_MEMORY, Arming, Instrumentor
from . import patches


class Vllm(Instrumentor):
    """vLLM, for adapters from memory. Each module is patched completely or not at all, when it is loaded."""

    triggers = tuple(patch_set.name for patch_set in patches.MEMORY)
    is_asked_for_by_name = True  # by an import

    def __init__(self) -> None:
        super().__init__(Arming(PARENT_USES_MEMORY))
        self.patch_sets = patches.MEMORY

    def instrument(self, module: ModuleType) -> None:
        for patch_set in self.patch_sets:
            if patch_set.name == module.__name__:
                patch_set.apply(module)


_vllm = Vllm()


def install() -> None:
    """Patch vLLM in this process, and in the processes that it starts (they load the entry point).

    A second call changes nothing. Raises ContractError naming what this vLLM lacks: here for modules that are loaded
    already, otherwise when the module is imported.
    """
    missing = [name for name in _vllm.triggers if importlib.util.find_spec(name) is None]
    if missing:
        raise ContractError(
            f"vLLM {releases.installed_vllm()} has no {', '.join(missing)}, so it cannot take adapters from memory; "
            f"nothing was patched. Tested are {', '.join(t.version for t in releases.TESTED_VLLM if t.memory)}."
        )
    _vllm.arming.arm("installed")
    _vllm.watch()


def is_installed() -> dict[str, bool]:
    """For each hooked module of vLLM, whether it is patched."""
    return {patch_set.name: patch_set.is_applied for patch_set in _vllm.patch_sets}


def uninstall() -> None:
    """Restore vLLM's own functions, and leave processes that it starts later unpatched.

    Raises PatchConflictError, and changes nothing, when another package has wrapped a patched function since.
    """
    _vllm.uninstrument()
    _vllm.arming.disarm("uninstalled")
