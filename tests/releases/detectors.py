"""Find each defect of the table in ms-swift's source: what a sync does, not what the release is called.

The sync is followed through the code (`walk.py`) for a LoRA run with the engine's LoRA on, colocated, one process group
without FSDP2, and the number of times that the engine then counts the LoRA is added up.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Hashable, Iterator
from functools import lru_cache
from typing import Any, Literal, Protocol

from swift_lora_fix.install import releases
from swift_lora_fix.install.releases import ENGINE_CLASS, ROLLOUT_CLASS

from .walk import Call, FunctionNode, calls_of, find_class, methods_of


class Source(Hashable, Protocol):
    """Parsed modules of a release."""

    @property
    def rollout(self) -> ast.Module: ...
    @property
    def utils(self) -> ast.Module: ...
    @property
    def engine(self) -> ast.Module: ...
    @property
    def server(self) -> ast.Module: ...


# ---- the sync ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def sync(source: Source, *, first: bool, resume: bool = False, sleep_level: int = 0) -> list[Call]:
    """The calls of one sync of a colocated LoRA run with the engine's LoRA on."""
    facts: dict[str, Any] = {
        "args.train_type": "lora",
        "args.tuner_type": "lora",
        "args.sleep_level": sleep_level,
        "args.resume_from_checkpoint": "checkpoint-1" if resume else None,
        "args.async_generate": False,
        "self.base_sync_done": not first,
        "self.rollout_enable_lora": True,
        "self.vllm_mode": "colocate",
        "self._is_fsdp2": False,
        "is_peft_model(self.model)": True,
        "is_torch_npu_available()": False,
    }
    return calls_of(source.rollout, ROLLOUT_CLASS, "_move_model_to_vllm", facts)


def times_counted(source: Source, *, resume: bool = False, sleep_level: int = 0) -> list[int | None]:
    """How many times the engine counts the LoRA after syncs 1, 2, 3; None where it has no base model."""
    counts: list[int | None] = []
    base = merged = adapter = False
    for number in range(3):
        if sleep_level == 2:  # the engine has thrown its weights away
            base = merged = adapter = False
        calls = sync(source, first=number == 0, resume=resume, sleep_level=sleep_level)
        if any(call.name == "load_weights" for call in calls):
            base, merged = True, any(_merges(call) and not _in_adapter_move(call) for call in calls)
        adapter = adapter or any(call.name == "add_lora" for call in calls)
        counts.append(merged + adapter if base else None)
    return counts


def _merges(call: Call) -> bool:
    return call.name == "merge_adapter"


def _in_adapter_move(call: Call) -> bool:
    return "_move_adapter_to_vllm" in call.where


# ---- the defects ---------------------------------------------------------------------------------------------------


def first_batch_base(source: Source) -> bool:
    return times_counted(source)[:2] == [0, 1]


def double_count(source: Source) -> bool:
    return 2 in times_counted(source)


def double_count_on_resume(source: Source) -> bool:
    return 2 in times_counted(source, resume=True) and not double_count(source)


def sleep_2_loses_base(source: Source) -> bool:
    return None in times_counted(source, sleep_level=2)


def sleep_2_plain_base(source: Source) -> bool:
    return times_counted(source, sleep_level=2) == [0, 0, 0]


def base_drift(source: Source) -> bool:
    return any(map(_merges, sync(source, first=False)))


def lora_downcast(source: Source) -> bool:
    """The sync merges under patch_lora_merge, whose merge moves (and casts) the adapter whatever its dtype."""
    names = {call.name for first in (True, False) for call in sync(source, first=first)}
    if not {"patch_lora_merge", "merge_adapter"} <= names:
        return False
    patch = next(n for n in source.utils.body if isinstance(n, ast.FunctionDef) and n.name == "patch_lora_merge")
    merge = next(n for n in ast.walk(patch) if isinstance(n, ast.FunctionDef) and n.name == "merge")
    return any(
        isinstance(n, ast.Call)
        and isinstance(n.func, ast.Attribute)
        and n.func.attr == "_move_adapter_to_device_of_base_layer"
        for n in _unconditional(merge)
    )


def _unconditional(node: ast.AST) -> list[ast.AST]:
    """What runs in a function whenever it gets there: not under an if, a with or a try."""
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.If, ast.IfExp, ast.With, ast.Try)):
            found += [child, *_unconditional(child)]
    return found


def fails_open(source: Source) -> bool:
    """With no adapter in the engine, infer still generates."""
    facts: dict[str, Any] = {"self.enable_lora": True, "adapter_request": None, "self.engine.list_loras()": []}
    return any(call.name == "infer" for call in calls_of(source.engine, ENGINE_CLASS, "infer", facts))


def stale_encoder_cache(source: Source) -> bool:
    return not any(call.name == "reset_encoder_cache" for call in sync(source, first=False))


def unchecked_cache_reset(source: Source) -> bool:
    """The adapter keeps its name, so blocks of an older policy match, and nobody looks whether they were dropped."""
    resets = [call for call in sync(source, first=False) if call.name == "reset_prefix_cache"]
    return adapter_id(source) == "fixed" and (not resets or any(call.dropped for call in resets))


def batched_move_incomplete(source: Source) -> bool:
    """The names are split into batches before the trainer knows that the engine wraps its layers, so that those
    layers are left out, and the engine has nothing but random weights in them."""
    if load_format(source) != "dummy":
        return False
    events = list(_preparation(methods_of(find_class(source.rollout, ROLLOUT_CLASS)), "prepare_rollout", ()))
    return "split" in events and "lora" in events[events.index("split") :]


def _preparation(methods: dict[str, FunctionNode], name: str, where: tuple[str, ...]) -> Iterator[str]:
    """``split`` and ``lora`` (rollout_enable_lora becomes true) in the order in which the code runs."""

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            yield from visit(child)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = node.func.attr
            if called == "split_batches":
                yield "split"
            elif called in methods and called not in where:
                yield from _preparation(methods, called, (*where, called))
        elif isinstance(node, ast.Assign) and ast.unparse(node) == "self.rollout_enable_lora = True":
            yield "lora"

    yield from visit(methods[name])


def server_swallows_errors(source: Source) -> bool:
    """In the worker's command loop an exception is neither raised again nor sent back."""
    worker = next(n for n in source.server.body if isinstance(n, ast.FunctionDef) and n.name == "llm_worker")
    loop = next(n for n in ast.walk(worker) if isinstance(n, ast.While))
    handlers = [
        handler
        for node in ast.walk(loop)
        if isinstance(node, ast.Try)
        for handler in node.handlers
        if isinstance(handler.type, ast.Name) and handler.type.id in ("Exception", "BaseException")
    ]
    return any(not _reports(handler) for handler in handlers)


def _reports(handler: ast.ExceptHandler) -> bool:
    return any(
        isinstance(node, ast.Raise)
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "send")
        for node in ast.walk(handler)
    )


DETECTORS: dict[str, Callable[[Source], bool]] = {
    releases.FIRST_BATCH_BASE.key: first_batch_base,
    releases.DOUBLE_COUNT.key: double_count,
    releases.DOUBLE_COUNT_ON_RESUME.key: double_count_on_resume,
    releases.BASE_DRIFT.key: base_drift,
    releases.LORA_DOWNCAST.key: lora_downcast,
    releases.FAILS_OPEN.key: fails_open,
    releases.SLEEP_2_LOSES_BASE.key: sleep_2_loses_base,
    releases.SLEEP_2_PLAIN_BASE.key: sleep_2_plain_base,
    releases.STALE_ENCODER_CACHE.key: stale_encoder_cache,
    releases.UNCHECKED_CACHE_RESET.key: unchecked_cache_reset,
    releases.BATCHED_MOVE_INCOMPLETE.key: batched_move_incomplete,
    releases.SERVER_SWALLOWS.key: server_swallows_errors,
}


def defects_in(source: Source) -> set[str]:
    return {key for key, detect in DETECTORS.items() if detect(source)}


# ---- the other columns ---------------------------------------------------------------------------------------------


def tuner_argument(source: Source) -> str:
    """The argument that the sync asks whether this is a LoRA run."""
    method = methods_of(find_class(source.rollout, ROLLOUT_CLASS))["_move_model_to_vllm"]
    names = {n.attr for n in ast.walk(method) if isinstance(n, ast.Attribute)} & {"train_type", "tuner_type"}
    assert len(names) == 1, names
    return names.pop()


def adapter_id(source: Source) -> Literal["random", "fixed"]:
    if any(call.name == "time_ns" for call in sync(source, first=False)):
        return "random"
    values = [
        n.value.value
        for n in source.utils.body
        if isinstance(n, ast.Assign)
        and isinstance(n.value, ast.Constant)
        and [ast.unparse(t) for t in n.targets] == ["VLLM_LORA_INT_ID"]
    ]
    assert values == [releases.FIXED_ADAPTER_ID], values
    return "fixed"


def load_format(source: Source) -> str:
    """Default of the colocated engine."""
    method = methods_of(find_class(source.rollout, ROLLOUT_CLASS))["_prepare_vllm_engine"]
    found = []
    for node in ast.walk(method):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr == "pop" and len(node.args) == 2:
            if ast.unparse(node.args[0]) == "'load_format'":
                found.append(node.args[1])
        found += [k.value for k in node.keywords if k.arg == "load_format" and isinstance(k.value, ast.Constant)]
    assert len(found) == 1 and isinstance(found[0], ast.Constant), found
    return str(found[0].value)


# ---- the contract --------------------------------------------------------------------------------------------------


def broken_targets(tree: ast.Module, targets: tuple[releases.Target, ...]) -> list[str]:
    """What is missing from a rollout module, or cannot be called as we call it."""
    problems = []
    for target in targets:
        found = _lookup(tree, target.attribute)
        if found is None:
            problems.append(f"{target.attribute}: not there")
        elif target.is_function and isinstance(found, (ast.FunctionDef, ast.AsyncFunctionDef)):
            problem = target.mismatch(signature(found))
            problems += [problem] if problem else []
        elif target.is_function:
            problems.append(f"{target.attribute}: not a function")
    return problems


def _lookup(tree: ast.Module, attribute: str) -> ast.AST | None:
    if "." in attribute:
        cls, _, method = attribute.partition(".")
        found = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls]
        return methods_of(found[0]).get(method) if found else None
    for node in tree.body:
        if isinstance(node, (ast.ImportFrom, ast.Import)):
            if attribute in [alias.asname or alias.name for alias in node.names]:
                return node
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == attribute:
            return node
    return None


def signature(node: FunctionNode) -> inspect.Signature:
    """The signature of a function that is only source."""
    a = node.args
    parameters = []
    positional = [*a.posonlyargs, *a.args]
    without_default = len(positional) - len(a.defaults)
    for index, argument in enumerate(positional):
        only = index < len(a.posonlyargs)
        kind = inspect.Parameter.POSITIONAL_ONLY if only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        default = inspect.Parameter.empty if index < without_default else ...
        parameters.append(inspect.Parameter(argument.arg, kind, default=default))
    if a.vararg:
        parameters.append(inspect.Parameter(a.vararg.arg, inspect.Parameter.VAR_POSITIONAL))
    for argument, value in zip(a.kwonlyargs, a.kw_defaults):
        default = inspect.Parameter.empty if value is None else ...
        parameters.append(inspect.Parameter(argument.arg, inspect.Parameter.KEYWORD_ONLY, default=default))
    if a.kwarg:
        parameters.append(inspect.Parameter(a.kwarg.arg, inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters)
