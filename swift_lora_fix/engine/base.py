"""The engine's base weights: the trainer's own frozen ones, unmerged, pushed by ms-swift's own full move.

ms-swift knows how its model's names map to vLLM's on each release, so its ``_move_full_model_to_vllm`` does the work.
What is wrong in it is what it does around that, and those three calls are shadowed on the two objects for its duration:
merging the adapter into the base, unmerging it, and sending the adapter as well. What it leaves out, a watch on the
engine's parameters finds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..adapter import Adapter, check_unmerged, frozen_parameters, local_part
from ..digest import checksum
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


def push(trainer: Any, engine: EngineHandle, adapter: Adapter) -> BaseRecord:
    """Push the trainer's unmerged base into the engine; the trainer is only read. Returns what both hold from now on.

    Raises EngineStateError naming the engine's parameters that were not written, where the engine was started with
    random weights (``load_format='dummy'``, ms-swift's default up to 4.1.1); where it read the model's files, which are
    then still in place there, one warning names them.
    """
    check_unmerged(adapter)
    with _WriteRecorder(engine.model) as recorder, _shadowed(trainer, "_move_adapter_to_vllm"):
        with _shadowed(trainer.model, "merge_adapter", "unmerge_adapter"):
            trainer._move_full_model_to_vllm()
    check_unmerged(adapter)
    _check_complete(engine, recorder.pointers)
    return BaseRecord(
        tuple(recorder.written()), tuple(frozen_parameters(trainer.accelerator.unwrap_model(trainer.model)))
    )


@dataclass(frozen=True)
class Piece:
    """A part of an engine parameter that the push wrote, and the checksum of what it wrote there (0-dim int64)."""

    name: str
    destination: torch.Tensor
    checksum: torch.Tensor


class BaseRecord:
    """What the engine and the trainer hold of the base after a push: checksums, to be compared with later ones.

    pieces cover the engine's parameters through its own packed layout: vLLM's ``load_weights`` was watched as it put
    the trainer's tensors where they belong, and each was summed up as it came.
    """

    def __init__(self, pieces: tuple[Piece, ...], frozen: tuple[tuple[str, torch.nn.Parameter], ...]) -> None:
        self.pieces, self._frozen = pieces, frozen
        self._trainer = self._trainer_checksums()

    @property
    def bytes_covered(self) -> int:
        return sum(p.destination.numel() * p.destination.element_size() for p in self.pieces)

    @torch.no_grad()
    def engine_differences(self) -> list[str]:
        """Names of the engine's parameters whose bits are not those that the trainer's base was pushed with."""
        if not self.pieces:
            return []
        now = torch.stack([checksum(piece.destination) for piece in self.pieces])
        same = (now == torch.stack([piece.checksum for piece in self.pieces])).tolist()
        return list(dict.fromkeys(piece.name for piece, fine in zip(self.pieces, same) if not fine))

    @torch.no_grad()
    def trainer_differences(self) -> list[str]:
        """Names of the trainer's base parameters whose bits (this rank's part) have changed since the push."""
        now = self._trainer_checksums()
        return [name for (name, _), was, now in zip(self._frozen, self._trainer, now) if was != now]

    def _trainer_checksums(self) -> list[int]:
        sums: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
        for index, (_, parameter) in enumerate(self._frozen):
            value = checksum(local_part(parameter))
            sums.setdefault(value.device, []).append((index, value))
        found = [0] * len(self._frozen)
        for pairs in sums.values():  # one transfer a device
            for (index, _), value in zip(pairs, torch.stack([value for _, value in pairs]).tolist()):
                found[index] = value
        return found


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


class _WriteRecorder(TorchDispatchMode):
    """Collects the storages that operators write to, and what copies put into the model's parameters."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.pointers: set[int] = set()
        self._names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters() if p.numel()}
        self._pieces: dict[int, dict[tuple[int, int], Piece]] = {}  # by storage, then by first and last byte

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and func._schema.is_mutable:
            pointer = first.untyped_storage().data_ptr()
            self.pointers.add(pointer)
            if pointer in self._names and first.numel():
                self._record(func, first, pointer)
        return result

    def _record(self, func: Any, destination: torch.Tensor, pointer: int) -> None:
        pieces = self._pieces.setdefault(pointer, {})
        start = destination.data_ptr()
        extent = sum((size - 1) * stride for size, stride in zip(destination.shape, destination.stride())) + 1
        end = start + extent * destination.element_size()
        # whatever was written there before is no longer what is there
        for span in [span for span in pieces if span[0] < end and start < span[1]]:
            del pieces[span]
        if func is torch.ops.aten.copy_.default:
            pieces[start, end] = Piece(self._names[pointer], destination.detach(), checksum(destination))

    def written(self) -> Iterator[Piece]:
        for pieces in self._pieces.values():
            yield from pieces.values()


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
