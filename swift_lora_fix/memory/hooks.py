"""When the hooks into vLLM go in: at the import of ``swift_lora_fix.memory``, each once its module is loaded."""

from __future__ import annotations

import importlib.util
import os

import wrapt

from ..errors import ContractError
from ..install import releases
from ..install.registry import PatchSet
from ..vllm_plugin import PARENT_USES_MEMORY


def install() -> None:
    """Patch vLLM in this process, and in the processes that it starts (they load the entry point).

    Each module is patched whole or not at all. Raises ContractError naming what this vLLM lacks: here where its module
    is loaded already, else out of that module's import. Calling it again changes nothing.
    """
    missing = [patch_set.name for patch_set in _patch_sets() if importlib.util.find_spec(patch_set.name) is None]
    if missing:
        raise ContractError(
            f"vLLM {releases.installed_vllm()} has no {', '.join(missing)}, so it cannot take adapters from memory; "
            f"nothing was patched. Tested are {', '.join(t.version for t in releases.TESTED_VLLM if t.memory)}."
        )
    os.environ[PARENT_USES_MEMORY] = "1"
    for patch_set in _patch_sets():
        wrapt.register_post_import_hook(patch_set.apply, patch_set.name)


def is_installed() -> dict[str, bool]:
    """For each module of vLLM that is hooked into, whether it is patched."""
    return {patch_set.name: patch_set.is_applied for patch_set in _patch_sets()}


def uninstall() -> None:
    """Put vLLM's very functions back and leave the processes it starts from now on alone."""
    os.environ.pop(PARENT_USES_MEMORY, None)
    for patch_set in _patch_sets():
        patch_set.undo()


def _patch_sets() -> tuple[PatchSet, ...]:
    from . import patches as vllm

    return vllm.MEMORY
