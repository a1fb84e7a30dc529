"""What a session needs from an engine, and from the writer that carries a policy to it. A new engine implements these.

An optional capability is an attribute that is None when missing, never a method that does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from ..policy.adapter import Adapter


@dataclass
class WriteReport:
    """What one write did. path: the way it took. seconds: by stage. bytes_written: given to the engine.

    digest: of the whole policy as the engine should now hold it; the same on every rank.
    """

    path: str
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_written: int = 0
    digest: str = ""


class BasePort(Protocol):
    """The base as it was sent, to compare with what engine and trainer hold later."""

    def engine_differences(self) -> list[str]:
        """Names of the engine's parameters whose bits differ from what was sent."""

    def trainer_differences(self) -> list[str]:
        """Names of the trainer's parameters whose bits differ from what was sent."""

    @property
    def parameters(self) -> int:
        """How many of the engine's parameters are compared."""


class HeldPort(Protocol):
    """A written adapter in this process's engine: it can be compared, and it can be lost."""

    def forget(self) -> None:
        """The engine slept: what it holds is unknown now."""

    def accept(self) -> None:
        """The content was compared and is what was written."""


class SlotsPort(HeldPort, Protocol):
    """The adapter in vLLM's LoRA slots. Checksums are 64-bit (common/digest.py), one a chunk of the adapter."""

    adapter: Adapter
    expected: list[int] | None  # None: vLLM's own loader wrote, so the regions are unknown
    previous: list[int] | None  # of the write before the last

    def read_back(self) -> list[int]:
        """Checksums of what the slots hold now, to compare with ``expected``."""

    def are_finite(self) -> bool:
        """Whether the slots hold neither NaN nor infinity."""

    def clear(self) -> None:
        """Fill the slots with zeros: rollouts then come from the plain base."""

    def staged(self) -> Iterator[tuple[Sequence[Any], Sequence[torch.Tensor]]]:
        """``(copies, regions)`` by chunk: the adapter's places, and what they should hold. Valid until the next one."""

    def all_ranks(self, fine: bool) -> bool:
        """Whether ``fine`` is true on all ranks that hold a part of this adapter."""


class WeightsPort(HeldPort, Protocol):
    """The adapter folded into the engine's weights."""

    @property
    def is_known(self) -> bool:
        """Whether the regions of these weights in the engine are known."""

    def placed(self, part: int = 0, parts: int = 1) -> Iterator[Any]:
        """Each region and what it should hold (weights/fused.py, ``Placed``), for every ``parts``-th module."""

    def expected(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """``(value, rounded, plain)`` of each weight that the adapter changes, computed from the trainer alone."""

    def all_ranks(self, fine: bool) -> bool: ...

    def note_audited(self) -> None:
        """An audit has just run: remember checksums of what the engine holds, for ``engine_changed``."""

    @property
    def is_audited(self) -> bool: ...

    def engine_changed(self) -> bool:
        """Whether the weights differ from those at ``note_audited``. Reads the engine alone."""


class ServingPort(Protocol):
    """How this engine serves the adapter, as far as a probe has to know."""

    @property
    def rounds(self) -> bool:
        """Whether the engine rounds weights that the trainer does not, and the trainer can compute with them
        rounded."""

    @property
    def copies(self) -> int:
        """How many copies of a probe to send, so that each engine gets all of its prompts."""

    @property
    def reset_caches(self) -> Callable[[], None] | None:
        """Drops what a probe left in the caches; None when this process cannot do that."""

    @property
    def abort_unfinished(self) -> Callable[[], None] | None:
        """Drops the requests of a probe that failed; None when this process cannot do that."""

    def engine_without_adapter(self) -> AbstractContextManager[None]: ...

    def trainer_without_adapter(self) -> AbstractContextManager[None]: ...

    def trainer_as_rounded(self) -> AbstractContextManager[None]:
        """The trainer computes with the rounded weights that the engine should hold. Only if ``rounds``."""

    @property
    def dtype(self) -> torch.dtype | None:
        """What the engine computes in; None where that is the trainer's."""

    @property
    def stand_ins(self) -> Collection[torch.nn.Module]:
        """The trainer's modules that compute in place of their children in ``trainer_as_rounded`` and
        ``trainer_without_adapter``."""


class WriterPort(Protocol):
    """Carries one trainer's policy into one engine, at each sync."""

    @property
    def adapter(self) -> Adapter: ...

    @property
    def mode(self) -> Literal["adapter", "fused"]:
        """``adapter``: base and adapter are separate in the engine; ``fused``: folded into one weight."""

    @property
    def keeps_base(self) -> bool:
        """Whether a new writer for the same engine can rely on the base that an earlier one sent."""

    @property
    def slots(self) -> SlotsPort | None:
        """The adapter in this process's LoRA slots, in adapter mode."""

    @property
    def weights(self) -> WeightsPort | None:
        """The adapter in this process's weights, in fused mode."""

    @property
    def place(self) -> str:
        """Where the adapter ends up, in words for the log."""

    @property
    def serving(self) -> ServingPort: ...

    def all_ranks(self, fine: bool) -> bool:
        """Whether ``fine`` is true on all ranks that must write together."""

    def begin_validation(self) -> None:
        """Start the checks of ``validate`` on the device. The trainer's values must not change until ``validate``."""

    def validate(self) -> None:
        """Called before anything is written, so that an error leaves the engine its policy. Raises
        NonFiniteAdapterError; EngineStateError while requests are running, because they would mix two policies."""

    def send_base(self, straight: bool = False) -> BasePort | None:
        """Send the trainer's unmerged base to the engine. None when the engine itself compares it.

        straight: a base that was sent before and lost may be copied straight to where it went then."""

    def write(self) -> WriteReport:
        """Make the engine serve the trainer's current policy, and drop its caches of the previous one."""

    def write_by_reference(self) -> WriteReport:
        """The same, this once through vLLM's own loader."""

    def digest_of(self, held: dict[str, torch.Tensor]) -> str:
        """The policy digest of ``held``: whole tensors on the CPU, by PEFT key."""

    def what_is_missing(self) -> str | None:
        """Why the engine cannot serve the policy, in words, or None."""

    def is_current(self) -> bool:
        """Whether nothing is known to have changed what was written last."""

    def adapted_parameters(self) -> set[str]:
        """Names of the engine's base parameters whose layers hold a part of the adapter."""


class EnginePort(Protocol):
    """The engine, or engines, of one trainer."""

    @property
    def is_asleep(self) -> bool: ...

    @property
    def is_shared(self) -> bool:
        """Whether all ranks share it and only the main rank talks to it (rollout servers)."""

    def is_of(self, trainer: Any) -> bool:
        """Whether it is (still) the engine of this ``TrainerPort``."""

    @property
    def cache_block(self) -> int:
        """Tokens per block of the prefix cache."""

    @property
    def logits_processors(self) -> Sequence[str]:
        """Names of what changes the logits after the model: then its answers are not its own."""

    def make_ready(self) -> bool:
        """Called before rollouts: restore what an engine elsewhere lost. Returns whether anything was restored."""

    def generate(self, infer: Callable[[], Any]) -> Any:
        """Run ``infer``, the framework's own rollout call."""
