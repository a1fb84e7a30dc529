"""The engine's base weights: the trainer's own frozen ones, unmerged, pushed by ms-swift's own full move.

ms-swift knows how its model's names map to vLLM's on each release, so its ``_move_full_model_to_vllm`` does the work.
What is wrong in it is what it does around that, and those three calls are shadowed on the two objects for its duration:
merging the adapter into the base, unmerging it, and sending the adapter as well. What it leaves out, a watch on the
engine's parameters finds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..adapter import Adapter, check_unmerged
from ..errors import EngineStateError
from ..log import warning
from .handle import EngineHandle


def name_parameters(trainer: Any) -> None:
    """Have ms-swift list the names that it pushes once more, after it prepared its engine and before training begins.

    Up to 4.1 it does so before it knows that the engine has LoRA layers, and then leaves every wrapped layer out when
    it moves in batches (--move_model_batches). Once training begins it is too late: the activation checkpointing of
    FSDP2 then puts a prefix into ``named_parameters()`` that the names in ``state_dict()`` lack.
    """
    trainer.parameter_groups, trainer.parameter_groups_no_lora = trainer.split_batches()


def push(trainer: Any, engine: EngineHandle, adapter: Adapter) -> None:
    """Push the trainer's unmerged base into the engine; the trainer is only read.

    Raises EngineStateError naming the engine's parameters that were not written, where the engine was started with
    random weights (``load_format='dummy'``, ms-swift's default up to 4.1.1); where it read the model's files, which are
    then still in place there, one warning names them.
    """
    check_unmerged(adapter)
    with _WrittenStorages() as written, _shadowed(trainer, "_move_adapter_to_vllm"):
        with _shadowed(trainer.model, "merge_adapter", "unmerge_adapter"):
            trainer._move_full_model_to_vllm()
    check_unmerged(adapter)
    _check_complete(engine, written.pointers)


def _check_complete(engine: EngineHandle, written: set[int]) -> None:
    untouched = [
        name
        for name, parameter in engine.model.named_parameters()
        if parameter.numel() and parameter.untyped_storage().data_ptr() not in written
    ]
    if not untouched:
        return
    message = (
        f"The base sync left {len(untouched)} of the engine's parameters unwritten: {', '.join(untouched[:6])}"
        f"{' ...' if len(untouched) > 6 else ''}."
    )
    if engine.load_format == "dummy":
        raise EngineStateError(f"{message} The engine was started with random weights, so it would generate garbage.")
    warning(f"{message} They keep the values of the model's files.")


class _WrittenStorages(TorchDispatchMode):
    """Collects the storages that operators write to."""

    def __init__(self) -> None:
        super().__init__()
        self.pointers: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and func._schema.is_mutable:
            self.pointers.add(first.untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _shadowed(target: Any, *names: str) -> Iterator[None]:
    """Make methods of one object do nothing; the class and every other object keep theirs."""
    attributes = vars(target)
    taken = [name for name in names if name in attributes]
    if taken:
        raise AssertionError(f"{type(target).__name__} already shadows {taken}")
    for name in names:
        attributes[name] = _do_nothing
    try:
        yield
    finally:
        for name in names:
            del attributes[name]


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None
