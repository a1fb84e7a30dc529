"""Records how vLLM loads weights: which of our tensors it copies, and to where in its own.

Both recorders are PyTorch dispatch modes. vLLM does the packing, slicing and name mapping; we replay its copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...common.digest import checksum

Locate = Callable[[torch.Tensor], "tuple[str, int] | None"]


@dataclass(frozen=True)
class Region:
    """A region (offset, size, stride) of a trainer's tensor, and ``destination``, the engine's view that it is copied
    to.

    offset: in elements from the first of the tensor, which is contiguous.
    """

    destination: torch.Tensor
    offset: int
    stride: tuple[int, ...]

    def region(self, value: torch.Tensor) -> torch.Tensor:
        """This region of ``value``, a whole contiguous tensor."""
        return value.as_strided(self.destination.shape, self.stride, value.storage_offset() + self.offset)


class CopyRecorder(TorchDispatchMode):
    """Records copies out of the staged tensors, and LoRA slots that vLLM fills with a constant."""

    def __init__(self, staged: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.keys = {tensor.untyped_storage().data_ptr(): key for key, tensor in staged.items()}
        self.copies: list[tuple[str, torch.Tensor, int, tuple[int, ...]]] = []
        self.cleared: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].untyped_storage().data_ptr() not in self.keys:
            destination, source = args[0], args[1]
            key = self.keys.get(source.untyped_storage().data_ptr())
            if key is not None and destination.shape == source.shape:
                self.copies.append((key, destination, source.storage_offset(), tuple(source.stride())))
            elif key is None and source.numel() == 1:  # slot[index] = 0
                self.cleared.append(destination)
        elif func in (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default):
            self.cleared.append(args[0])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Written:
    """What one copy wrote to an engine parameter.

    source: the trainer's parameter. region: its part that was copied; None where that is unknown. checksum: of the
    written bytes, 0-dim int64; None for what will be overwritten with other values.
    """

    name: str
    destination: torch.Tensor
    source: str | None
    region: Region | None
    checksum: torch.Tensor | None


class WriteRecorder(TorchDispatchMode):
    """Records what is written to the parameters of ``model``.

    locate: maps a tensor that vLLM loads to the trainer's parameter that it is a part of, and its offset there in
        elements; None for any other tensor.
    changing: the trainer's parameters that later writes will overwrite with other values.
    """

    def __init__(self, model: torch.nn.Module, locate: Locate, changing: Collection[str]) -> None:
        super().__init__()
        self._pointers: set[int] = set()  # all storages written to
        self._covered: dict[int, dict[tuple[int, Any, Any], int]] = {}  # by storage: bytes of each view copied into
        self._made: dict[int, tuple[StorageWeakRef, str]] = {}  # by storage: tensors made of an engine's weight
        self._elsewhere: dict[int, StorageWeakRef] = {}  # by storage: whatever else holds anything of a weight
        self._buffers = {b.untyped_storage().data_ptr() for b in model.buffers() if b.numel()}
        self._locate, self._changing = locate, changing
        self._sources: dict[int, str] = {}  # by storage: the trainer's parameter that went there
        held = {name: p for name, p in model.named_parameters() if p.numel()}
        self._names = {p.untyped_storage().data_ptr(): name for name, p in held.items()}
        # of the parameter itself: its storage may hold more (dense LoRA layers put A below W)
        self._sizes = {p.untyped_storage().data_ptr(): p.numel() * p.element_size() for p in held.values()}
        self._written: dict[int, dict[tuple[int, int], Written]] = {}  # by storage, then by first and last byte

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and func._schema.is_mutable:
            pointer = first.untyped_storage().data_ptr()
            self._pointers.add(pointer)
            if pointer in self._names and first.numel():
                self._cover(first, pointer, func is torch.ops.aten.copy_.default)
                self._record(first, pointer, args[1] if func is torch.ops.aten.copy_.default else None)
        if self._sources:
            self._note_reads(func, args, result)
        if not func.is_view:
            self._note_elsewhere(args, kwargs, result)
        return result

    def _cover(self, destination: torch.Tensor, pointer: int, is_copy: bool) -> None:
        """Count bytes as loaded: copies, and constant padding. Filling a whole parameter does not load it."""
        size = destination.numel() * destination.element_size()
        if is_copy or size < self._sizes[pointer]:
            view = (destination.storage_offset(), destination.shape, destination.stride())
            self._covered.setdefault(pointer, {})[view] = size

    def unwritten(self, model: torch.nn.Module) -> dict[str, float]:
        """The parameters that were not fully written, with the share of their bytes that was. A parameter that vLLM
        created while loading counts as fully written if anything wrote to its storage."""
        found = {}
        for name, parameter in model.named_parameters():
            pointer = parameter.untyped_storage().data_ptr()
            size = parameter.numel() * parameter.element_size()
            covered = sum(self._covered.get(pointer, {}).values())
            if pointer not in self._names:
                covered = size if pointer in self._pointers else 0
            if covered < size:
                found[name] = covered / size
        return found

    def _record(self, destination: torch.Tensor, pointer: int, value: torch.Tensor | None) -> None:
        written = self._written.setdefault(pointer, {})
        start = destination.data_ptr()
        extent = sum((size - 1) * stride for size, stride in zip(destination.shape, destination.stride())) + 1
        end = start + extent * destination.element_size()
        # this write replaces whatever overlapping writes put there
        for span in [span for span in written if span[0] < end and start < span[1]]:
            del written[span]
        if value is None:
            return
        destination = destination.detach()
        source, offset = self._locate(value) or (None, 0)
        region = None
        if source is not None:
            # of several in one storage, one that will change
            self._sources[pointer] = max(source, self._sources.get(pointer, source), key=self._changing.__contains__)
            if value.shape == destination.shape:
                region = Region(destination, offset, tuple(value.stride()))
        changes = bool(self._changing) and (source is None or source in self._changing)
        if changes and region is None:
            return  # its later values are unknown
        total = None if changes else checksum(destination)
        written[start, end] = Written(self._names[pointer], destination, source, region, total)

    def _note_reads(self, func: Any, args: Any, result: Any) -> None:
        """Remember tensors computed, directly or transitively, from a weight: of one that changes they would go stale,
        of one that is lost they would be lost too."""
        if func.is_view or not isinstance(result, torch.Tensor) or result.numel() < 2:
            return
        for made, at in _in_memory(result):
            for _, pointer in _in_memory([v for v in args[func._schema.is_mutable :] if isinstance(v, torch.Tensor)]):
                source = self._sources.get(pointer) or self._made_of(pointer)
                if source is not None and pointer != at:
                    self._made[at] = StorageWeakRef(made.untyped_storage()), source

    def _note_elsewhere(self, args: Any, kwargs: Any, result: Any) -> None:
        if not any(self._is_of_a_weight(value, pointer) for value, pointer in _in_memory((args, kwargs))):
            return
        for value, pointer in _in_memory((result, args[:1])):  # what is written to comes first
            if pointer not in self._names and pointer not in self._buffers and self._locate(value) is None:
                self._elsewhere[pointer] = StorageWeakRef(value.untyped_storage())

    def _is_of_a_weight(self, value: torch.Tensor, pointer: int) -> bool:
        made = self._elsewhere.get(pointer)
        return pointer in self._sources or (made is not None and not made.expired()) or self._locate(value) is not None

    def _made_of(self, pointer: int) -> str | None:
        made, source = self._made.get(pointer, (None, None))
        return None if made is None or made.expired() else source

    def derived(self, model: torch.nn.Module) -> Iterator[str]:
        """Names of the trainer's parameters whose copy in the engine is in use beside a tensor computed from it. (Where
        vLLM replaced the copy by the computed tensor, the copy itself is no longer in use.)"""
        used = {p.untyped_storage().data_ptr() for p in model.parameters()}
        in_use = {source for pointer, source in self._sources.items() if pointer in used}
        for made, source in self._made.values():
            if source in in_use and not made.expired():
                yield source

    def frozen(self) -> Iterator[Written]:
        """Everything written that will not change."""
        return (written for written in self._all() if written.checksum is not None)

    def are_all_copies(self, model: torch.nn.Module) -> bool:
        """Whether each byte of the model's parameters is a copy of a known part of the trainer's, and nothing beside
        them holds anything of a weight, but for buffers, which vLLM itself keeps through a sleep."""
        if any(not made.expired() for made in self._elsewhere.values()):
            return False
        sizes: dict[int, int] = {}
        for pointer, written in self._written.items():
            known = (w.destination for w in written.values() if w.region is not None)
            sizes[pointer] = sum(destination.numel() * destination.element_size() for destination in known)
        return all(
            sizes.get(p.untyped_storage().data_ptr(), 0) >= p.numel() * p.element_size() for p in model.parameters()
        )

    def regions(self) -> dict[str, tuple[Region, ...]]:
        """Of the parameters that will be overwritten."""
        found: dict[str, tuple[Region, ...]] = {}
        for written in self._all():
            if written.checksum is None and written.source is not None and written.region is not None:
                found[written.source] = (*found.get(written.source, ()), written.region)
        return found

    def _all(self) -> Iterator[Written]:
        for written in self._written.values():
            yield from written.values()


def _in_memory(values: Any) -> Iterator[tuple[torch.Tensor, int]]:
    """The tensors among these, in lists too, and where their storages begin; but for those without memory of their own
    (on ``meta``, a DTensor, what a collective has not finished)."""
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor) and not value.is_meta and value.numel():
            with contextlib.suppress(RuntimeError, NotImplementedError):
                yield value, value.untyped_storage().data_ptr()
