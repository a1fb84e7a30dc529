"""The engine's base weights: the trainer's own frozen ones, unmerged, in the framework's own way of sending a model.

A watch on the engine's parameters finds what was left out; the same watch tells where in the engine each of the
trainer's parameters went.
"""

from __future__ import annotations

import contextlib
import weakref
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ....common.digest import checksum
from ....common.log import warning
from ....errors import EngineStateError
from ....policy.adapter import Adapter, check_unmerged, clean_name, frozen_parameters, local_part
from ....trainer import Load, TrainerPort, Weights
from ..handle import EngineHandle
from ..watch import Region, WriteRecorder
from .names import of_wrapped_layers


def push(trainer: TrainerPort, engine: EngineHandle, adapter: Adapter, changing: Collection[str] = ()) -> Pushed:
    """Push the trainer's unmerged base into the engine; the trainer is only read. Returns what both hold from now on.

    changing: names of the trainer's parameters whose place in the engine will get other values later.

    Raises EngineStateError naming the engine's parameters that were not written, or not whole, where the engine was
    started with random weights (``load_format='dummy'``, ms-swift's default up to 4.1.1); where it read the model's
    files, which are then still in place there, one warning names them.
    """
    sources = _Sources(trainer)
    with WriteRecorder(engine.model, sources.locate, frozenset(changing)) as recorder:
        _move(trainer, adapter, sources, of_wrapped_layers(engine))
    _check_complete(engine, recorder)
    pieces = tuple(Piece(w.name, w.destination, w.checksum) for w in recorder.frozen() if w.checksum is not None)
    record = BaseRecord(engine.model, pieces, tuple(frozen_parameters(trainer.model)))
    return Pushed(record, recorder.regions(), frozenset(recorder.derived(engine.model)))


def reload(
    trainer: TrainerPort,
    engine: EngineHandle,
    adapter: Adapter,
    changing: Collection[str],
    value_of: Callable[[str], torch.Tensor],
) -> set[str]:
    """Send the model again, by the same way as the base, with the values of ``value_of`` in place of the trainer's in
    ``changing``, made one at a time as vLLM takes them. All of it: ms-swift then has vLLM bring every weight into the
    layout of its kernels, which must not happen twice. Returns the names in ``changing`` that were sent."""
    sources, sent, rename = _Sources(trainer), set[str](), of_wrapped_layers(engine)

    def items(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in rename(weights).items():
            source = sources.name_of(value)
            if source is not None and source in changing:
                sent.add(source)
                value = value_of(source)
            yield name, value

    _move(trainer, adapter, sources, lambda weights: _Streamed(lambda: items(weights)))
    return sent


def send(trainer: TrainerPort, adapter: Adapter) -> None:
    """Send the trainer's unmerged base over the framework's own connections (server mode); the trainer is only read."""
    _move(trainer, adapter, _Sources(trainer), lambda weights: weights)


def _move(
    trainer: TrainerPort, adapter: Adapter, sources: _Sources, replace: Callable[[Mapping[str, torch.Tensor]], Any]
) -> None:
    """``replace`` makes what vLLM loads of each group of weights."""
    check_unmerged(adapter)

    def load(own: Load, weights: Weights) -> Any:
        with sources.of(weights):
            return own(replace(weights))

    trainer.send_base(load, sources.note)
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
    the trainer's tensors where they belong, and each was summed up as it came. Those that vLLM had replaced by the end
    of the push (a layout for its kernels) are left out: nobody knows what they should hold.
    """

    def __init__(
        self, model: torch.nn.Module, pieces: tuple[Piece, ...], frozen: tuple[tuple[str, torch.nn.Parameter], ...]
    ) -> None:
        self._model = weakref.ref(model)
        self._frozen = frozen
        alive = self._storages()
        self.pieces = tuple(piece for piece in pieces if _storage(piece.destination) in alive)
        self._trainer = self._trainer_checksums()

    @property
    def parameters(self) -> int:
        """How many of the engine's parameters are compared."""
        return len({piece.name for piece in self.pieces})

    @property
    def bytes_covered(self) -> int:
        return sum(p.destination.numel() * p.destination.element_size() for p in self.pieces)

    @torch.no_grad()
    def engine_differences(self) -> list[str]:
        """Names of the engine's parameters whose bits are not those that the trainer's base was pushed with, or that
        are other tensors by now: what was pushed is then no longer what the engine computes with."""
        if not self.pieces:
            return []
        alive = self._storages()
        now = torch.stack([checksum(piece.destination) for piece in self.pieces])
        equal = (now == torch.stack([piece.checksum for piece in self.pieces])).tolist()
        same = [fine and _storage(piece.destination) in alive for piece, fine in zip(self.pieces, equal)]
        return list(dict.fromkeys(piece.name for piece, fine in zip(self.pieces, same) if not fine))

    @torch.no_grad()
    def trainer_differences(self) -> list[str]:
        """Names of the trainer's base parameters whose bits (this rank's part) have changed since the push."""
        now = self._trainer_checksums()
        return [name for (name, _), was, now in zip(self._frozen, self._trainer, now) if was != now]

    def _storages(self) -> set[int]:
        model = self._model()
        return {_storage(parameter) for parameter in model.parameters()} if model is not None else set()

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


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _check_complete(engine: EngineHandle, recorder: WriteRecorder) -> None:
    unwritten = recorder.unwritten(engine.model)
    if not unwritten:
        return
    parts = [name if not share else f"{name} (only {share:.0%} of it)" for name, share in unwritten.items()]
    message = (
        f"The base sync left {len(parts)} of the engine's parameters unwritten: {', '.join(parts[:6])}"
        f"{' ...' if len(parts) > 6 else ''}."
    )
    if engine.load_format == "dummy":
        raise EngineStateError(f"{message} The engine was started with random weights, so it would generate garbage.")
    warning(f"{message} They keep the values of the model's files.")


class _Sources:
    """Which of the trainer's parameters a tensor is that the framework sends, or a part of it: told by its memory."""

    def __init__(self, trainer: TrainerPort) -> None:
        self._model = trainer.model
        self._names: dict[int, str] = {}  # by address
        self._starts: list[int] = []
        self._spans: list[tuple[int, str, torch.Tensor]] = []

    def note(self, raw: Mapping[str, torch.Tensor]) -> None:
        """The framework is about to rename these; under FSDP2 they are whole copies that nothing else names."""
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


class _Streamed:
    """The little of a dict that ms-swift and vLLM ask of weights, made as they are taken."""

    def __init__(self, make: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
        self.items = make
