"""Does the installed ms-swift have what the patches hook and call? Asked of the code, whatever its version number."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from ..errors import ContractError
from . import releases


def check(module: ModuleType) -> None:
    """Raise ContractError listing every target that ``module`` lacks, or whose signature does not take our call."""
    problems = [problem for target in releases.HOOKS + releases.CALLS if (problem := _problem(module, target))]
    if problems:
        raise ContractError(f"{module.__name__} of {_release()}: {'; '.join(problems)}. {_what_to_do()}")


def not_found(modules: Sequence[str]) -> ContractError:
    """The error for a release that has none of the modules that held the rollout class so far."""
    return ContractError(f"{_release()} has none of {', '.join(modules)}. {_what_to_do()}")


def _problem(module: ModuleType, target: releases.Target) -> str | None:
    found: Any = module
    for part in target.attribute.split("."):
        found = getattr(found, part, None)
    if found is None:
        return f"{target.attribute} is missing"
    return target.mismatch(inspect.signature(found) if callable(found) else None)


def _release() -> str:
    return f"ms-swift {releases.installed_swift()}"


def _what_to_do() -> str:
    return (
        f"swift_lora_fix knows ms-swift {releases.OLDEST_SUPPORTED} to {releases.NEWEST_KNOWN}; nothing was patched. "
        "Upgrade swift-lora-fix, install an ms-swift that it knows, or set SWIFT_LORA_FIX=off to run without it."
    )
