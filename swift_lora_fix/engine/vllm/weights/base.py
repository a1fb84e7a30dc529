"""The engine's base weights: the trainer's frozen ones, unmerged, sent the way the framework sends a model.

The engine's parameters are watched during the push. That shows which were not written, and where each of the trainer's
parameters went.
"""

from __future__ import annotations

import contextlib
import weakref
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ....common.digest import checksum
from ....common.log import info, warning
from ....errors import EngineStateError
from ....policy.adapter import Adapter, check_unmerged, clean_name, frozen_parameters, local_part
from ....trainer import Load, TrainerPort, Weights
from ..handle import EngineHandle
from ..watch import Region, WriteRecorder
from .names import of_wrapped_layers, with_experts_as_they_are


def push(
    trainer: TrainerPort,
    engine: EngineHandle,
    adapter: Adapter,
    changing: Collection[str] = (),
    before: Pushed | None = None,
) -> Pushed:
    """Push the trainer's unmerged base into the engine; the trainer is only read. Returns what both hold from now on.

    changing: names of the trainer's parameters that later writes will overwrite in the engine. before: an earlier push,
    which the engine has lost. It is repeated, and returned, where that is possible; else the trainer's base should be
    still what it was then.

    Some of the engine's parameters may be left unwritten, or written only in part. Raises EngineStateError naming them
    when the engine started with random weights (``load_format='dummy'``, ms-swift's default up to 4.1.1). When it
    loaded the model's files, they still hold those values, and one warning names them.
    """
    if before is not None and repeat(trainer, adapter, before):
        return before
    sources = _Sources(trainer)
    recording = WriteRecorder(engine.model, sources.locate, frozenset(changing))
    with recording as recorder, with_experts_as_they_are(engine.model):
        _move(trainer, adapter, sources, of_wrapped_layers(engine))
    _check_complete(engine, recorder)
    pieces = tuple(
        Piece(w.name, w.destination, w.checksum, w.source, w.region)
        for w in recorder.frozen()
        if w.checksum is not None
    )
    known = before.record if before is not None else None
    record = BaseRecord(engine.model, pieces, tuple(frozen_parameters(trainer.model)), before=known)
    derived = set(recorder.derived(engine.model))
    can_repeat = adapter.sharding == "none" and not derived and recorder.are_all_copies(engine.model)
    return Pushed(record, recorder.regions(), frozenset(derived & set(changing)), can_repeat)


@torch.no_grad()
def repeat(trainer: TrainerPort, adapter: Adapter, pushed: Pushed) -> bool:
    """Copy the base, but for what changes, to where that push put it: an engine that slept at level 2 has lost it.
    Returns whether this is possible, and the engine then held the same bits as after the push."""
    if not pushed.can_repeat:
        return False
    held = {clean_name(name): parameter for name, parameter in trainer.model.named_parameters()}
    pieces = pushed.record.pieces
    if any(piece.source not in held for piece in pieces) or not pushed.is_alive():
        return False
    check_unmerged(adapter)
    for piece in pieces:
        assert piece.source is not None and piece.region is not None
        piece.destination.copy_(piece.region.region(held[piece.source].detach()))
    if pushed.record.engine_differences():
        return False
    if not pushed.record.repeats:
        info(f"the base goes straight to where vLLM's loader had put it before, {len(pieces)} copies.")
    pushed.record.repeats += 1
    return True


def reload(
    trainer: TrainerPort,
    engine: EngineHandle,
    adapter: Adapter,
    changing: Collection[str],
    value_of: Callable[[str], torch.Tensor],
) -> set[str]:
    """Send the whole model again as the base is sent, but with the values of ``value_of`` for the parameters in
    ``changing``. Each value is computed when vLLM takes it. Returns the names in ``changing`` that were sent.

    All of the model must go: ms-swift then has vLLM convert every weight to its kernels' layout, and a weight must not
    be converted twice."""
    sources, sent, rename = _Sources(trainer), set[str](), of_wrapped_layers(engine)

    def items(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in rename(weights).items():
            source = sources.name_of(value)
            if source is not None and source in changing:
                sent.add(source)
                value = value_of(source)
            yield name, value

    with with_experts_as_they_are(engine.model):
        _move(trainer, adapter, sources, lambda weights: _Streamed(lambda: items(weights)))
    return sent


def send(trainer: TrainerPort, adapter: Adapter) -> None:
    """Send the trainer's unmerged base over the framework's own connections (server mode); the trainer is only read."""
    _move(trainer, adapter, _Sources(trainer), lambda weights: weights)


def _move(
    trainer: TrainerPort, adapter: Adapter, sources: _Sources, replace: Callable[[Mapping[str, torch.Tensor]], Any]
) -> None:
    """Send the base. ``replace`` turns each group of weights into what vLLM is to load."""
    check_unmerged(adapter)

    def load(own: Load, weights: Weights) -> Any:
        with sources.of(weights):
            return own(replace(weights))

    trainer.send_base(load, sources.note)
    check_unmerged(adapter)


@dataclass(frozen=True)
class Pushed:
    """The result of a push.

    regions: for each changing parameter of the trainer, which part of it vLLM put where in the engine. A name is
        missing when vLLM did not copy the parameter unchanged.
    derived: names of the changing parameters from whose copy vLLM computed another tensor (MLA's absorbed weights).
    can_repeat: the push did nothing but copy, and it is known what to where.
    """

    record: BaseRecord
    regions: dict[str, tuple[Region, ...]]
    derived: frozenset[str]
    can_repeat: bool = False

    def is_alive(self) -> bool:
        """Whether the engine still computes with the tensors that the push wrote to."""
        changing = [region.destination for regions in self.regions.values() for region in regions]
        return self.record.are_alive([*changing, *(piece.destination for piece in self.record.pieces)])


@dataclass(frozen=True)
class Piece:
    """A part of an engine parameter that the push wrote, and the checksum of what it wrote there (0-dim int64). source
    and region: the trainer's parameter that it is a copy of, and which part; None where that is unknown."""

    name: str
    destination: torch.Tensor
    checksum: torch.Tensor
    source: str | None = None
    region: Region | None = None


class BaseRecord:
    """Checksums of the base in engine and trainer after a push, to compare with later ones.

    pieces: parts of the engine's parameters, in its own packed layout. vLLM's ``load_weights`` was watched as it put
        the trainer's tensors into place, and each piece was summed as it was written. Parameters that vLLM replaced
        before the push ended (with a layout for its kernels) are left out: their expected content is unknown.
    frozen: the trainer's parameters. packed: finds what else its base holds, in buffers, each time: moving a model to
        another device replaces these. One whose kernel packs it anew is no longer compared.
    before: an earlier record of the same trainer, whose checksums of it stay.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        pieces: tuple[Piece, ...],
        frozen: tuple[tuple[str, torch.nn.Parameter], ...],
        packed: Callable[[], list[tuple[str, torch.Tensor]]] = list,
        before: BaseRecord | None = None,
    ) -> None:
        self._model = weakref.ref(model)
        self._frozen, self._packed = frozen, packed
        self.repeats = 0  # how often the push was repeated
        alive = self._storages()
        self.pieces = tuple(piece for piece in pieces if _storage(piece.destination) in alive)
        # not what it is now: a base that has drifted would become the truth
        self._trainer: dict[tuple[Any, ...], int] = {
            **self._trainer_checksums(),
            **(before._trainer if before is not None else {}),
        }

    @property
    def parameters(self) -> int:
        """How many of the engine's parameters are compared."""
        return len({piece.name for piece in self.pieces})

    @property
    def bytes_covered(self) -> int:
        return sum(p.destination.numel() * p.destination.element_size() for p in self.pieces)

    @torch.no_grad()
    def engine_differences(self) -> list[str]:
        """Names of the engine's parameters whose bits differ from the push, or that have been replaced by other
        tensors, so that the engine no longer computes with what was pushed."""
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
        return [key[0] for key, was in self._trainer.items() if now.get(key, was) != was]

    def are_alive(self, destinations: Iterable[torch.Tensor]) -> bool:
        alive = self._storages()
        return all(_storage(destination) in alive for destination in destinations)

    def _storages(self) -> set[int]:
        model = self._model()
        return {_storage(parameter) for parameter in model.parameters()} if model is not None else set()

    def _trainer_checksums(self) -> dict[tuple[Any, ...], int]:
        """By name, and by the form of what is packed."""
        parts: dict[tuple[Any, ...], torch.Tensor] = {(name,): local_part(value) for name, value in self._frozen}
        parts.update({(name, value.dtype, value.shape): value for name, value in self._packed()})
        sums: dict[torch.device, list[tuple[tuple[Any, ...], torch.Tensor]]] = {}
        for key, part in parts.items():
            value = checksum(part)
            sums.setdefault(value.device, []).append((key, value))
        found: dict[tuple[Any, ...], int] = {}
        for pairs in sums.values():  # one transfer a device
            found.update(zip((key for key, _ in pairs), torch.stack([value for _, value in pairs]).tolist()))
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
    """Finds the trainer's parameter that a tensor from the framework is, or is a part of, by its memory address."""

    def __init__(self, trainer: TrainerPort) -> None:
        self._model = trainer.model
        self._names: dict[int, str] = {}  # by address
        self._starts: list[int] = []
        self._spans: list[tuple[int, str, torch.Tensor]] = []

    def note(self, raw: Mapping[str, torch.Tensor]) -> None:
        """Called before the framework renames these. Under FSDP2 they are gathered copies, which have no other name."""
        self._names = {value.data_ptr(): clean_name(name) for name, value in raw.items()}

    @contextlib.contextmanager
    def of(self, state_dict: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Context in which vLLM loads ``state_dict``."""
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
        """The parameter that ``part`` lies in, and its offset there in elements."""
        index = bisect_right(self._starts, part.data_ptr()) - 1
        if index < 0:
            return None
        start, name, whole = self._spans[index]
        offset = (part.data_ptr() - start) // whole.element_size()
        inside = offset < whole.numel() and part.dtype == whole.dtype and part.device == whole.device
        return (name, offset) if inside else None


class _Streamed:
    """Weights computed as they are taken: the one dict method that ms-swift and vLLM call on them."""

    def __init__(self, make: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
        self.items = make
