"""Patches as records: resolved all together, applied all together, undone from what was recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Callable

import wrapt

from ..errors import ContractError, PatchConflictError

Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Patch:
    """One wrapped function.

    target: ``Class.method`` in the module that the patch is applied to.
    wrapper: wrapt's ``wrapper(wrapped, instance, args, kwargs)``.
    why: the symptom without it. goes_when: what must be true upstream before it can be removed.
    """

    target: str
    wrapper: Wrapper
    why: str
    goes_when: str


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
        """Resolve every target; change nothing. Raises ContractError naming all targets that are not there."""
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
        """Patch ``module``, all or nothing."""
        if self.is_applied:
            return
        planned = self.plan(module)
        for item in planned:
            setattr(item.parent, item.attribute, item.installed)
        self.applied, self.module = planned, module

    def check_removable(self) -> None:
        """Raise PatchConflictError when somebody has wrapped one of ours since."""
        covered = [a.patch.target for a in self.applied if vars(a.parent).get(a.attribute) is not a.installed]
        if covered:
            raise PatchConflictError(
                f"{', '.join(covered)} was patched by somebody else after swift_lora_fix; undo that first. "
                "Nothing was removed."
            )

    def undo(self) -> None:
        """Put the very objects back. Raises PatchConflictError, changing nothing, where that is not possible."""
        self.check_removable()
        for item in reversed(self.applied):
            if item.own:
                setattr(item.parent, item.attribute, item.original)
            else:
                delattr(item.parent, item.attribute)
        self.applied, self.module = [], None
