"""One library to patch: when its patches go in, how they come out, and what happens when they cannot go in."""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType

import wrapt

from ..common.log import warning
from ..errors import SwiftLoraFixError
from .registry import PatchSet

# Environment variables that tell processes that vLLM starts what was asked for in this one. They are ours, not
# settings. The entry point (entry_point/swift_lora_fix_vllm.py) reads them, and cannot import this module.
PARENT_ARMED = "SWIFT_LORA_FIX_ARMED"
PARENT_USES_MEMORY = "SWIFT_LORA_FIX_MEMORY"
INTERNAL = frozenset({PARENT_ARMED, PARENT_USES_MEMORY})


@dataclass
class Arming:
    """What was asked for in this process, about one library or several.

    variable: the environment variable that passes this on to the processes that vLLM starts.
    armed: the patches may go in.
    by_name: they were asked for explicitly, so failing to put them in is an error.
    reason: where they are, or why they are nowhere, in words.
    """

    variable: str
    armed: bool = False
    by_name: bool = False
    reason: str = "not armed"

    def arm(self, reason: str) -> None:
        self.armed, self.reason = True, reason
        os.environ[self.variable] = "1"

    def disarm(self, reason: str) -> None:
        self.armed, self.by_name, self.reason = False, False, reason
        os.environ.pop(self.variable, None)


class Instrumentor(ABC):
    """The patches of one library.

    After `watch` they go in automatically, when one of ``triggers`` is imported. If that fails, the library stays as it
    is and one warning says why; if they were asked for by name, it is raised instead. `instrument` always raises.

    triggers: names of modules.
    otherwise: what happens without the patches, for the warning.
    patch_sets: those that are loaded. `instrument` imports the hooks, because they import torch.
    """

    triggers: tuple[str, ...]
    otherwise: str

    def __init__(self, arming: Arming) -> None:
        self.arming = arming
        self.patch_sets: tuple[PatchSet, ...] = ()
        self.paused = False  # the importer of a trigger will call `instrument` itself
        self._watching = False

    @abstractmethod
    def instrument(self, module: ModuleType) -> None:
        """Patch the library, all or nothing. If it is patched already, do nothing.

        Args:
            module: the trigger that was imported.

        Raises:
            SwiftLoraFixError: why that is impossible, in words. Nothing was patched.
        """

    @property
    def is_instrumented(self) -> bool:
        return any(patch_set.is_applied for patch_set in self.patch_sets)

    @property
    def is_asked_for_by_name(self) -> bool:
        return self.arming.by_name

    def check_removable(self) -> None:
        """Raise PatchConflictError when somebody has wrapped one of our wrappers since."""
        for patch_set in self.patch_sets:
            patch_set.check_removable()

    def uninstrument(self) -> None:
        """Restore the library's own objects. Raises PatchConflictError, and changes nothing, if it cannot."""
        self.check_removable()
        for patch_set in self.patch_sets:
            patch_set.undo()

    def status(self) -> dict[str, str]:
        """For each patch ``applied`` or ``not applied``. Loads nothing."""
        return {
            f"{patch_set.name}: {patch.target}": "applied" if patch_set.is_applied else "not applied"
            for patch_set in self.patch_sets
            for patch in patch_set.patches
        }

    def watch(self) -> None:
        """Patch as soon as one of ``triggers`` is imported; at once if one already is."""
        for name in self.triggers:
            if not self._watching:  # wrapt cannot remove a hook, so each is registered once
                wrapt.register_post_import_hook(self._on_import, name)
            elif name in sys.modules:
                self._on_import(sys.modules[name])
        self._watching = True

    def step_aside(self, module: ModuleType, error: SwiftLoraFixError) -> None:
        """Leave the library as it is, and warn."""
        warning(f"stepping aside, {self.otherwise}: {error}")

    def _on_import(self, module: ModuleType) -> None:
        if not self.arming.armed or self.paused:
            return
        try:
            self.instrument(module)
        except SwiftLoraFixError as error:
            if self.is_asked_for_by_name:
                raise
            self.step_aside(module, error)
