"""The errors of this package. Each also subclasses the built-in error that fits it, so that ``except`` catches both."""

from __future__ import annotations

from typing import Any, ClassVar


class SwiftLoraFixError(Exception):
    """Base of every error that this package raises on purpose.

    place: where the docs say what it means and what to do. A traceback shows it below the message (as a note, from
    Python 3.11 on); ``str()`` is the message alone, because messages are quoted in other messages.
    """

    place: ClassVar[str] = "docs/errors.md"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__ == __name__:  # one of another module has its parent's place
            cls.place = f"{SwiftLoraFixError.place}#{cls.__name__.lower()}"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__notes__ = [f"What it means and what to do: {self.place}"]


class SettingsError(SwiftLoraFixError, ValueError):
    """An environment variable or argument of this package has an invalid value."""


class MissingPackageError(SwiftLoraFixError, ImportError):
    """ms-swift, vLLM, PEFT, or a package that a command line verb needs, is not installed."""


class UnsupportedReleaseError(SwiftLoraFixError, RuntimeError):
    """The installed release is older than the oldest that this package supports."""


class ContractError(SwiftLoraFixError, RuntimeError):
    """The installed release lacks something that the patches hook or call. Nothing was changed."""


class PatchConflictError(SwiftLoraFixError, RuntimeError):
    """Another package wrapped a patched function later, so our patch cannot be removed alone."""


class UnsupportedTrainerError(SwiftLoraFixError, NotImplementedError):
    """The trainer is of a kind whose LoRA sync this package does not cover (Megatron)."""


class RolloutServerError(SwiftLoraFixError, ConnectionError):
    """A rollout server refused something, failed, or did not answer in time. The message quotes the server.

    status: HTTP status of its answer; None without an answer, or when several servers answered differently.
    """

    status: int | None = None


class BaseMismatchError(SwiftLoraFixError, ValueError):
    """The trainer's base differs from the one that an engine loaded from its model folder, and cannot be sent."""


class UnsupportedAdapterError(SwiftLoraFixError, ValueError):
    """The adapter cannot be served as asked (DoRA in vLLM's LoRA layers, a rank above the engine's)."""


class AdapterFileError(SwiftLoraFixError, OSError):
    """An adapter folder is missing, incomplete or corrupt."""


class ForkError(SwiftLoraFixError, ValueError):
    """A fork cannot be made as asked: TARGET exists, adapter and base do not fit, a value does not fit the dtype."""


class RunLogError(SwiftLoraFixError, OSError):
    """A run's log is missing, unreadable, or has no lines of this package."""


class ChartError(SwiftLoraFixError, OSError):
    """A chart cannot be written to the given file."""


class ResumeMismatchError(SwiftLoraFixError, RuntimeError):
    """The trainer's LoRA differs from the checkpoint that the run says it starts from."""


class TrainerModifiedError(SwiftLoraFixError, RuntimeError):
    """The trainer's adapter is merged into its base, where a sync needs both apart."""


class NonFiniteAdapterError(SwiftLoraFixError, ValueError):
    """The trainer's adapter holds NaN, infinity, or values beyond the LoRA dtype's range. Nothing was written."""


class EngineStateError(SwiftLoraFixError, RuntimeError):
    """The engine does not hold the policy that the next rollout needs, or cannot be given one now."""


class CacheResetError(SwiftLoraFixError, RuntimeError):
    """vLLM reported that a cache computed with the previous policy was not reset."""


class VerificationError(SwiftLoraFixError, RuntimeError):
    """``swift-lora-fix verify`` cannot measure what it was asked to: no such adapter, or the run ended early."""


class PolicyMismatchError(EngineStateError):
    """An audit or the gate found that the engine serves another policy than the trainer's. finding: what they found."""

    def __init__(self, message: str, finding: object = None) -> None:
        super().__init__(message)
        self.finding = finding


class AdapterRequestError(SwiftLoraFixError, ValueError):
    """The parts of a `LoRATensorRequest` do not fit together, or are not an adapter."""


class AdapterConflictError(SwiftLoraFixError, ValueError):
    """The engine already holds another adapter under this id, and the request does not ask to replace it."""


class SegmentError(SwiftLoraFixError, OSError):
    """An adapter's bytes in shared memory are gone, truncated, changed or another user's, or there is no room."""


class ProtocolError(SwiftLoraFixError, ValueError):
    """Trainer and rollout server do not understand each other: an unknown field, header or answer."""


class AccessError(SwiftLoraFixError, PermissionError):
    """The caller may not do that on this rollout server: a wrong key, a path outside its root, a link."""


class StagingError(SwiftLoraFixError, ValueError):
    """A rollout server cannot serve this adapter; it keeps its policy. status: the HTTP status to answer."""

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status
