"""Does the installed ms-swift have what the patches hook and call? This inspects the code, not the version number."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import ContractError
from . import releases


def check(module: ModuleType) -> None:
    """Raise ContractError listing every target that ``module`` lacks or that does not take our call, and every name
    that the port uses but ms-swift's own trainer does not: reading a renamed attribute would silently find nothing."""
    problems = [problem for target in releases.HOOKS + releases.CALLS if (problem := _problem(module, target))]
    wanted = releases.attributes_of(releases.installed_swift())
    problems += [f"{name} is not used by its trainer any more" for name in unused(_sources(module.__name__), wanted)]
    if problems:
        raise ContractError(f"{module.__name__} of {_release()}: {'; '.join(problems)}. {_what_to_do()}")


def check_scoring(module: ModuleType) -> None:
    """Raise ContractError as ``check`` does, for the patches of the trainer's scoring."""
    problems = [problem for target in releases.SCORING_HOOKS if (problem := _problem(module, target))]
    if problems:
        raise ContractError(f"{module.__name__} of {_release()}: {'; '.join(problems)}. {_what_to_do()}")


def check_trl(module: ModuleType) -> None:
    """Raise ContractError as ``check`` does, for TRL's ``VLLMGeneration`` and the names that TRL's port uses."""
    serves = releases.trl_talks_to_vllm_serve(releases.installed_trl() or releases.OLDEST_TRL)
    targets = releases.TRL_HOOKS + (releases.TRL_SERVER_HOOKS if serves else ())
    problems = [problem for target in targets if (problem := _problem(module, target))]
    sources = [_source(name) for name in (module.__name__, releases.TRL_TRAINER_MODULE)]
    problems += [f"{name} is not used by it any more" for name in unused(sources, releases.TRL_ATTRIBUTES)]
    if problems:
        raise ContractError(f"{module.__name__} of TRL {releases.installed_trl()}: {'; '.join(problems)}. {_no_trl()}")


def check_trl_scoring(module: ModuleType) -> None:
    """Raise ContractError as ``check`` does, for the trainer's scoring of its rollouts."""
    problems = [problem for target in releases.TRL_SCORING_HOOKS if (problem := _problem(module, target))]
    sources = [_source(name) for name in (module.__name__, releases.TRL_MODULE)]
    problems += [f"{name} is not used by it any more" for name in unused(sources, releases.TRL_SCORING_ATTRIBUTES)]
    if problems:
        raise ContractError(f"{module.__name__} of TRL {releases.installed_trl()}: {'; '.join(problems)}. {_no_trl()}")


def no_trl_module() -> ContractError:
    """The error for a TRL whose generation with vLLM lies elsewhere."""
    return ContractError(f"TRL {releases.installed_trl()} has no {releases.TRL_MODULE}. {_no_trl()}")


def _no_trl() -> str:
    return (
        f"swift_lora_fix knows TRL {releases.OLDEST_TRL} to {releases.NEWEST_TRL}; nothing was patched. Upgrade "
        "swift-lora-fix, install a TRL that it knows, or set SWIFT_LORA_FIX=off to run without it."
    )


def not_found(modules: Sequence[str]) -> ContractError:
    """The error for a release with none of the modules that have held the rollout class so far."""
    return ContractError(f"{_release()} has none of {', '.join(modules)}. {_what_to_do()}")


def unused(sources: Iterable[ast.Module], names: Sequence[str]) -> list[str]:
    """Those of ``names`` that none of the parsed modules uses, as an attribute, a name, a parameter or a string."""
    used = {name for tree in sources for node in ast.walk(tree) if (name := _name_of(node)) is not None}
    return [name for name in names if name not in used]


def _name_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.alias)):
        return node.name
    if isinstance(node, (ast.arg, ast.keyword)):
        return node.arg
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _sources(rollout_module: str) -> Iterator[ast.Module]:
    return map(_source, releases.trainer_modules(rollout_module))


def _source(name: str) -> ast.Module:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise not_found((name,))
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


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
