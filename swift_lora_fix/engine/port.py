"""What a session asks of an engine and of the writer that carries a policy to it. A new engine implements these.

What only some can do is an attribute that is None in the others, never a method that does nothing.
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
    """What one write did: ``path`` is the way it went; seconds by stage; bytes that the engine was given.

    digest: of the whole policy as the engine is to hold it, the same on every rank.
    """

    path: str
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_written: int = 0
    digest: str = ""


class BasePort(Protocol):
    """What engine and trainer hold of the base after it was sent."""

    def engine_differences(self) -> list[str]:
        """Names of the engine's parameters whose bits are not those that were sent."""

    def trainer_differences(self) -> list[str]:
        """Names of the trainer's parameters whose bits are not those that were sent."""

    @property
    def parameters(self) -> int:
        """How many of the engine's parameters are compared."""


class HeldPort(Protocol):
    """What lies in this process: it can be looked at, and it can be lost."""

    def forget(self) -> None:
        """The engine slept: what it holds is unknown."""

    def accept(self) -> None:
        """It was looked at and is what was written."""


class SlotsPort(HeldPort, Protocol):
    """The adapter in vLLM's LoRA slots. Checksums are 64-bit (common/digest.py), one a chunk of the adapter."""

    adapter: Adapter
    expected: list[int] | None  # None: vLLM's own loader wrote, and nobody knows where
    previous: list[int] | None  # of the write before

    def read_back(self) -> list[int]:
        """Of what the slots hold now, to be compared with ``expected``."""

    def staged(self) -> Iterator[tuple[Sequence[Any], Sequence[torch.Tensor]]]:
        """By chunk ``(copies, regions)``: where the adapter lies, and what should be there. Valid until the next."""

    def all_ranks(self, fine: bool) -> bool:
        """Whether it is fine on all ranks that hold parts of this adapter."""


class WeightsPort(HeldPort, Protocol):
    """The adapter folded into the engine's weights."""

    @property
    def is_known(self) -> bool:
        """Whether it is known where they lie."""

    def placed(self, part: int = 0, parts: int = 1) -> Iterator[Any]:
        """Each region and what should be in it (weights/fused.py, ``Placed``); of every ``parts``-th module."""

    def expected(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of each weight that the adapter changes ``(value, rounded, plain)``, from the trainer alone."""

    def all_ranks(self, fine: bool) -> bool: ...

    def note_audited(self) -> None:
        """All of it was found right: from now on the engine alone tells whether it changed."""

    @property
    def is_audited(self) -> bool: ...

    def engine_changed(self) -> bool:
        """Whether what lies there is no longer what the last whole audit found. Asks the engine alone."""


class ServingPort(Protocol):
    """How this engine serves the adapter, as a probe needs to know it."""

    @property
    def rounds(self) -> bool:
        """Whether the engine rounds what the trainer does not."""

    @property
    def copies(self) -> int:
        """How often a probe is asked, so that each engine gets all of it."""

    @property
    def reset_caches(self) -> Callable[[], None] | None:
        """Forgets what a probe leaves in the caches; None where that cannot be done from here."""

    def engine_without_adapter(self) -> AbstractContextManager[None]: ...

    def trainer_without_adapter(self) -> AbstractContextManager[None]: ...

    def trainer_as_rounded(self) -> AbstractContextManager[None]:
        """The trainer computing with what the engine should hold. Where ``rounds``."""

    @property
    def stand_ins(self) -> Collection[torch.nn.Module]:
        """Modules of the trainer that compute in place of their children in ``trainer_as_rounded`` and
        ``trainer_without_adapter``."""


class WriterPort(Protocol):
    """Carries one trainer's policy into one engine, again and again."""

    @property
    def adapter(self) -> Adapter: ...

    @property
    def mode(self) -> Literal["adapter", "fused"]:
        """Base and adapter apart, or folded into one."""

    @property
    def keeps_base(self) -> bool:
        """Whether the engine's base is still known when this object is made anew."""

    @property
    def slots(self) -> SlotsPort | None:
        """Where the adapter lies in this process's LoRA slots."""

    @property
    def weights(self) -> WeightsPort | None:
        """Where it lies in this process's weights."""

    @property
    def place(self) -> str:
        """Where the adapter ends up, in words."""

    @property
    def serving(self) -> ServingPort: ...

    def all_ranks(self, fine: bool) -> bool:
        """Whether it is fine on all ranks that this writer needs together."""

    def begin_validation(self) -> None:
        """Have the device begin with what ``validate`` asks; the trainer's values stay as they are until then."""

    def validate(self) -> None:
        """Before anything is written, so that the engine keeps its policy. Raises NonFiniteAdapterError, and
        EngineStateError while requests are running, which would mix two policies."""

    def send_base(self) -> BasePort | None:
        """Make the engine hold the trainer's unmerged base; None where the engine itself compares it."""

    def write(self) -> WriteReport:
        """Make the engine serve the policy as it is now; what it computed with the one before is forgotten."""

    def write_by_reference(self) -> WriteReport:
        """The same by vLLM's own loader, once."""

    def digest_of(self, held: dict[str, torch.Tensor]) -> str:
        """The policy digest of whole CPU values by PEFT key."""

    def what_is_missing(self) -> str | None:
        """What keeps the policy from being served, in words, or None."""

    def is_current(self) -> bool:
        """Whether nothing is known to have happened to what was written last."""

    def adapted_parameters(self) -> set[str]:
        """Names of the engine's base parameters in layers that have a LoRA beside them."""


class EnginePort(Protocol):
    """The engine, or engines, of one trainer."""

    @property
    def is_asleep(self) -> bool: ...

    @property
    def is_shared(self) -> bool:
        """One for all ranks, which the main rank alone talks to."""

    def is_of(self, trainer: Any) -> bool:
        """Whether it is (still) the engine of this ``TrainerPort``."""

    @property
    def cache_block(self) -> int:
        """Tokens of a block of the prefix cache."""

    def make_ready(self) -> bool:
        """Before rollouts: bring back what was lost elsewhere; whether anything was."""

    def generate(self, infer: Callable[[], Any]) -> Any:
        """Rollouts, by the framework's own way."""
