"""The engine's base weights: the trainer's own frozen ones, unmerged, pushed by ms-swift's own full move.

ms-swift knows how its model's names map to vLLM's on each release, so its ``_move_full_model_to_vllm`` does the work.
What is wrong in it is what it does around that, and those calls are shadowed on the two objects for its duration:
merging the adapter into the base, unmerging it, and sending the adapter as well. What it leaves out, a watch on the
engine's parameters finds; the same watch tells where in the engine each of the trainer's parameters went.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ....common.digest import checksum
from ....common.log import warning
from ....errors import EngineStateError
from ....policy.adapter import Adapter, check_unmerged, clean_name, frozen_parameters, local_part
from ..handle import EngineHandle
from ..slots.plan import Region


def name_parameters(trainer: Any) -> None:
    """Have ms-swift list the names that it pushes once more, after it prepared its engine and before training begins.

    Up to 4.1 it does so before it knows that the engine has LoRA layers, and then leaves every wrapped layer out when
    it moves in batches (--move_model_batches). Once training begins it is too late: the activation checkpointing of
    FSDP2 then puts a prefix into ``named_parameters()`` that the names in ``state_dict()`` lack.
    """
    trainer.parameter_groups, groups = trainer.split_batches()
    # these are compared with names that have lost "modules_to_save.default." already, so such modules were left out
    trainer.parameter_groups_no_lora = [
        group and [name.replace("modules_to_save.default.", "") for name in group] for group in groups
    ]


def push(trainer: Any, engine: EngineHandle, adapter: Adapter, changing: Collection[str] = ()) -> Pushed:
    """Push the trainer's unmerged base into the engine; the trainer is only read. Returns what both hold from now on.

    changing: names of the trainer's parameters whose place in the engine will get other values later.

    Raises EngineStateError naming the engine's parameters that were not written, where the engine was started with
    random weights (``load_format='dummy'``, ms-swift's default up to 4.1.1); where it read the model's files, which are
    then still in place there, one warning names them.
    """
    sources = _Sources(trainer)
    with _WriteRecorder(engine.model, sources, frozenset(changing)) as recorder:
        _move(trainer, adapter, sources, lambda state_dict: state_dict)
    _check_complete(engine, recorder.pointers)
    frozen = frozen_parameters(trainer.accelerator.unwrap_model(trainer.model))
    record, derived = BaseRecord(tuple(recorder.frozen()), tuple(frozen)), recorder.derived(engine.model)
    return Pushed(record, recorder.regions(), frozenset(derived))


def reload(
    trainer: Any, adapter: Adapter, changing: Collection[str], value_of: Callable[[str], torch.Tensor]
) -> set[str]:
    """Send the model again, by the same way as the base, with the values of ``value_of`` in place of the trainer's in
    ``changing``, made one at a time as vLLM takes them. All of it: ms-swift then has vLLM bring every weight into the
    layout of its kernels, which must not happen twice. Returns the names in ``changing`` that were sent."""
    sources, sent = _Sources(trainer), set[str]()

    def items(state_dict: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in state_dict.items():
            source = sources.name_of(value)
            if source is not None and source in changing:
                sent.add(source)
                value = value_of(source)
            yield name, value

    _move(trainer, adapter, sources, lambda state_dict: _Streamed(lambda: items(state_dict)))
    return sent


def send(trainer: Any, adapter: Adapter) -> None:
    """Send the trainer's unmerged base over ms-swift's own connections (server mode); the trainer is only read."""
    _move(trainer, adapter, _Sources(trainer), lambda state_dict: state_dict)


def _move(
    trainer: Any, adapter: Adapter, sources: _Sources, replace: Callable[[Mapping[str, torch.Tensor]], Any]
) -> None:
    """ms-swift's own full move without what is wrong in it; ``replace`` makes what vLLM loads of each group."""
    check_unmerged(adapter)
    load, note = trainer._load_state_dict_to_vllm, getattr(trainer, "_process_state_dict_for_vllm", None)

    def watched_load(state_dict: Mapping[str, torch.Tensor]) -> Any:
        with sources.of(state_dict):
            return load(replace(state_dict))

    def noting(raw: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        assert note is not None
        sources.note(raw)
        return note(raw, *args, **kwargs)

    shadows: dict[str, Callable[..., Any]] = {
        "_load_state_dict_to_vllm": watched_load,
        "_move_adapter_to_vllm": _do_nothing,
    }
    if note is not None:
        shadows["_process_state_dict_for_vllm"] = noting
    if hasattr(trainer, "_merge_lora_into_state_dict"):  # what FSDP2 does instead of merge_adapter
        shadows["_merge_lora_into_state_dict"] = _without_lora
    merges = {"merge_adapter": _do_nothing, "unmerge_adapter": _do_nothing}
    with _shadowed(trainer, **shadows), _shadowed(trainer.model, **merges):
        trainer._move_full_model_to_vllm()
    check_unmerged(adapter)


@dataclass(frozen=True)
class Pushed:
    """What a push left behind. regions: by name of the trainer's parameter, for those that were to change, where in the
    engine vLLM put which part of it; a name is missing where vLLM did not copy it as it was. derived: names of those
    out of whose place vLLM then made another tensor (the absorbed weights of MLA, say)."""

    record: BaseRecord
    regions: dict[str, tuple[Region, ...]]
    derived: frozenset[str]


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


class _Sources:
    """Which of the trainer's parameters a tensor is that ms-swift sends, or a part of it: told by its memory."""

    def __init__(self, trainer: Any) -> None:
        self._model = trainer.accelerator.unwrap_model(trainer.model)
        self._names: dict[int, str] = {}  # by address
        self._starts: list[int] = []
        self._spans: list[tuple[int, str, torch.Tensor]] = []

    def note(self, raw: Mapping[str, torch.Tensor]) -> None:
        """ms-swift is about to rename these; under FSDP2 they are whole copies that nothing else names."""
        self._names = {value.data_ptr(): clean_name(name) for name, value in raw.items()}

    @contextlib.contextmanager
    def of(self, state_dict: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """While vLLM loads these."""
        for name, parameter in self._model.named_parameters():
            if not hasattr(parameter, "to_local") and parameter.numel():
                self._names[parameter.data_ptr()] = clean_name(name)
        self._spans = sorted(
            (
                (value.data_ptr(), name, value)
                for value in state_dict.values()
                if value.is_contiguous() and (name := self._names.get(value.data_ptr()))
            ),
            key=lambda span: span[0],
        )
        self._starts = [start for start, _, _ in self._spans]
        try:
            yield
        finally:
            self._names, self._starts, self._spans = {}, [], []

    def name_of(self, value: torch.Tensor) -> str | None:
        return self._names.get(value.data_ptr())

    def locate(self, part: torch.Tensor) -> tuple[str, int] | None:
        """The parameter that ``part`` is a part of, and the offset in elements from its first."""
        index = bisect_right(self._starts, part.data_ptr()) - 1
        if index < 0:
            return None
        start, name, whole = self._spans[index]
        offset = (part.data_ptr() - start) // whole.element_size()
        inside = offset < whole.numel() and part.dtype == whole.dtype and part.device == whole.device
        return (name, offset) if inside else None


@dataclass(frozen=True)
class _Written:
    """What a copy put into an engine parameter: from which parameter of the trainer, or the checksum of it."""

    name: str
    destination: torch.Tensor
    source: str | None
    region: Region | None
    checksum: torch.Tensor | None


class _WriteRecorder(TorchDispatchMode):
    """Collects the storages that operators write to, and what copies put into the model's parameters."""

    def __init__(self, model: torch.nn.Module, sources: _Sources, changing: Collection[str]) -> None:
        super().__init__()
        self.pointers: set[int] = set()
        self._made: dict[int, tuple[StorageWeakRef, str]] = {}  # by storage: what was made out of a changing weight
        self._sources, self._changing = sources, changing
        self._changing_pointers: dict[int, str] = {}
        self._names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters() if p.numel()}
        self._written: dict[int, dict[tuple[int, int], _Written]] = {}  # by storage, then by first and last byte

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and func._schema.is_mutable:
            pointer = first.untyped_storage().data_ptr()
            self.pointers.add(pointer)
            if pointer in self._names and first.numel():
                self._record(first, pointer, args[1] if func is torch.ops.aten.copy_.default else None)
        if self._changing_pointers:
            self._note_reads(func, args, result)
        return result

    def _record(self, destination: torch.Tensor, pointer: int, value: torch.Tensor | None) -> None:
        written = self._written.setdefault(pointer, {})
        start = destination.data_ptr()
        extent = sum((size - 1) * stride for size, stride in zip(destination.shape, destination.stride())) + 1
        end = start + extent * destination.element_size()
        # whatever was written there before is no longer what is there
        for span in [span for span in written if span[0] < end and start < span[1]]:
            del written[span]
        if value is None:
            return
        destination = destination.detach()
        source, offset = self._sources.locate(value) or (None, 0)
        if self._changing and (source is None or source in self._changing):
            if source is not None:
                self._changing_pointers[pointer] = source
            if source is None or value.shape != destination.shape:
                return  # nobody can tell what it will hold later
            region = Region(destination, offset, tuple(value.stride()))
            written[start, end] = _Written(self._names[pointer], destination, source, region, None)
        else:
            written[start, end] = _Written(self._names[pointer], destination, None, None, checksum(destination))

    def _note_reads(self, func: Any, args: Any, result: Any) -> None:
        """A tensor made out of a weight that will change, at whatever remove, is made out of its values of now."""
        if func.is_view or not isinstance(result, torch.Tensor) or result.numel() < 2:
            return
        storage = result.untyped_storage()
        for value in args[func._schema.is_mutable :]:
            if isinstance(value, torch.Tensor) and value.numel() and not value.is_meta:
                pointer = value.untyped_storage().data_ptr()
                source = self._changing_pointers.get(pointer) or self._made_of(pointer)
                if source is not None and pointer != storage.data_ptr():
                    self._made[storage.data_ptr()] = StorageWeakRef(storage), source

    def _made_of(self, pointer: int) -> str | None:
        made, source = self._made.get(pointer, (None, None))
        return None if made is None or made.expired() else source

    def derived(self, model: torch.nn.Module) -> Iterator[str]:
        """Names of the trainer's parameters whose place in the engine is still in use, and so is something made out of
        it. (Where vLLM put what it made in its place, the place itself is gone.)"""
        used = {p.untyped_storage().data_ptr() for p in model.parameters()}
        in_use = {source for pointer, source in self._changing_pointers.items() if pointer in used}
        for made, source in self._made.values():
            if source in in_use and not made.expired():
                yield source

    def frozen(self) -> Iterator[Piece]:
        for written in self._all():
            if written.checksum is not None:
                yield Piece(written.name, written.destination, written.checksum)

    def regions(self) -> dict[str, tuple[Region, ...]]:
        found: dict[str, tuple[Region, ...]] = {}
        for written in self._all():
            if written.source is not None and written.region is not None:
                found[written.source] = (*found.get(written.source, ()), written.region)
        return found

    def _all(self) -> Iterator[_Written]:
        for written in self._written.values():
            yield from written.values()


class _Streamed:
    """The little of a dict that ms-swift and vLLM ask of weights, made as they are taken."""

    def __init__(self, make: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
        self.items = make


@contextlib.contextmanager
def _shadowed(target: Any, **replacements: Callable[..., Any]) -> Iterator[None]:
    """Replace methods of one object; the class and every other object keep theirs."""
    attributes = vars(target)
    taken = [name for name in replacements if name in attributes]
    if taken:
        raise AssertionError(f"{type(target).__name__} already shadows {taken}")
    attributes.update(replacements)
    try:
        yield
    finally:
        for name in replacements:
            del attributes[name]


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _without_lora(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state_dict.items() if "lora_" not in name}
