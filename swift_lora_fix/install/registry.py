"""Patches as records: resolved together, applied together, undone from what was recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any, Callable

import wrapt

from ..common.log import warning
from ..errors import ContractError, PatchConflictError

Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Patch:
    """One wrapped function.

    target: ``Class.method`` in the module that the patch is applied to.
    wrapper: wrapt's ``wrapper(wrapped, instance, args, kwargs)``.
    why: the symptom without it. goes_when: what must be true upstream before it can be removed.
    bypasses: functions of that module, dotted like ``target``, that our wrapper does not call when it does their work.
    """

    target: str
    wrapper: Wrapper
    why: str
    goes_when: str
    bypasses: tuple[str, ...] = ()


@dataclass
class Applied:
    patch: Patch
    parent: Any
    attribute: str
    own: bool  # the attribute was the parent's own, not inherited
    original: Any
    installed: Any


@dataclass
class PatchSet:
    """The patches of one module. ``apply`` and ``undo`` are idempotent."""

    name: str
    patches: tuple[Patch, ...]
    applied: list[Applied] = field(default_factory=list)
    module: ModuleType | None = None

    @property
    def is_applied(self) -> bool:
        return bool(self.applied)

    def plan(self, module: ModuleType) -> list[Applied]:
        """Resolve every target, change nothing. Raises ContractError naming all missing targets."""
        planned, missing = [], []
        for patch in self.patches:
            try:
                parent, attribute, original = wrapt.resolve_path(module, patch.target)
            except AttributeError:
                missing.append(patch.target)
                continue
            installed = wrapt.FunctionWrapper(original, patch.wrapper)
            planned.append(Applied(patch, parent, attribute, attribute in vars(parent), original, installed))
        if missing:
            raise ContractError(f"{module.__name__} has no {', '.join(missing)}; nothing was patched.")
        return planned

    def apply(self, module: ModuleType) -> None:
        """Patch ``module``, all or nothing. Warns about functions of somebody else's that our patches bypass."""
        if self.is_applied:
            return
        planned = self.plan(module)
        for patch in self.patches:
            for name in patch.bypasses:
                _warn_if_foreign(module, name, patch)
        for item in planned:
            setattr(item.parent, item.attribute, item.installed)
        self.applied, self.module = planned, module

    def beneath(self, target: str) -> Any:
        """The function that our applied wrapper of ``target`` calls, whoever wrapped that wrapper since."""
        return next(item.original for item in self.applied if item.patch.target == target)

    def check_removable(self) -> None:
        """Raise PatchConflictError when somebody has wrapped one of our wrappers since."""
        covered = [a.patch.target for a in self.applied if vars(a.parent).get(a.attribute) is not a.installed]
        if covered:
            raise PatchConflictError(
                f"{', '.join(covered)} was patched by somebody else after swift_lora_fix; undo that first. "
                "Nothing was removed."
            )

    def undo(self) -> None:
        """Restore the original objects. Raises PatchConflictError, and changes nothing, when that is impossible."""
        self.check_removable()
        for item in reversed(self.applied):
            if item.own:
                setattr(item.parent, item.attribute, item.original)
            else:
                delattr(item.parent, item.attribute)
        self.applied, self.module = [], None


def _warn_if_foreign(module: ModuleType, name: str, patch: Patch) -> None:
    """Warn if a function that ``patch`` bypasses is no longer the library's own, but a user plugin's."""
    owner = owner_of(wrapt.resolve_path(module, name)[2])
    if owner.partition(".")[0] != module.__name__.partition(".")[0]:
        warning(
            f"{owner} replaced {name} of {module.__name__} before swift_lora_fix was loaded. Where swift_lora_fix does "
            f"that work, {owner}'s function is not called. If you need it, have it wrap {patch.target}, and load "
            f"{owner} after swift_lora_fix (in ms-swift: later in --external_plugins)."
        )


def owner_of(function: Any) -> str:
    """The module whose code runs first in a call. (A wrapper shows the name and module of what it wraps.)"""
    if type(function) is FunctionType:  # not isinstance, which sees through a wrapper
        return str(function.__globals__["__name__"])
    for name in ("_self_wrapper", "__func__", "func"):  # of wrapt's wrappers; of class and bound methods; of partials
        inner = getattr(function, name, None)
        if inner is not None:
            return owner_of(inner)
    return type(function).__module__
