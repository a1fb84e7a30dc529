"""One exception tree. Each error also subclasses the built-in that fits it, so that an ``except`` of that works."""

from __future__ import annotations


class SwiftLoraFixError(Exception):
    """Base of every error that this package raises on purpose."""


class SettingsError(SwiftLoraFixError, ValueError):
    """An environment variable or argument of this package has a value it cannot have."""


class MissingPackageError(SwiftLoraFixError, ImportError):
    """ms-swift, vLLM, PEFT, or what a verb of the command line needs besides, is not installed."""


class UnsupportedReleaseError(SwiftLoraFixError, RuntimeError):
    """The installed release is older than the oldest one this package knows."""


class ContractError(SwiftLoraFixError, RuntimeError):
    """The installed release lacks something that the patches hook or call; nothing was changed."""


class PatchConflictError(SwiftLoraFixError, RuntimeError):
    """Somebody else wrapped a patched function afterwards, so it cannot be taken out alone."""


class UnsupportedTrainerError(SwiftLoraFixError, NotImplementedError):
    """The trainer is of a kind whose LoRA sync this package does not cover (Megatron)."""


class RolloutServerError(SwiftLoraFixError, ConnectionError):
    """A rollout server refused something, failed, or did not answer in time; the message has its own words.

    status: of its answer, None where there was none or several servers gave different ones.
    """

    status: int | None = None


class BaseMismatchError(SwiftLoraFixError, ValueError):
    """The trainer's base is not the one that a rollout server has read from its model folder."""


class UnsupportedAdapterError(SwiftLoraFixError, ValueError):
    """The adapter has something that vLLM's LoRA cannot serve (DoRA, modules_to_save, a rank above the engine's)."""


class AdapterFileError(SwiftLoraFixError, OSError):
    """An adapter folder is missing, incomplete or corrupt."""


class ForkError(SwiftLoraFixError, ValueError):
    """A fork cannot be made as asked: TARGET exists, adapter and base do not fit, a value does not fit the dtype."""


class RunLogError(SwiftLoraFixError, OSError):
    """A run's log is missing, unreadable, or has nothing of this package."""


class ChartError(SwiftLoraFixError, OSError):
    """A chart cannot be written to the file that was named for it."""


class ResumeMismatchError(SwiftLoraFixError, RuntimeError):
    """The trainer's LoRA is not the one of the checkpoint that the run claims to start from."""


class TrainerModifiedError(SwiftLoraFixError, RuntimeError):
    """The trainer's adapter is merged into its base while it should only be read."""


class NonFiniteAdapterError(SwiftLoraFixError, ValueError):
    """The trainer's adapter holds NaN or infinity, or values that the LoRA dtype cannot hold; nothing was written."""


class EngineStateError(SwiftLoraFixError, RuntimeError):
    """The engine does not hold the policy that a rollout is about to be generated from."""


class CacheResetError(SwiftLoraFixError, RuntimeError):
    """vLLM reported that a cache computed with the previous policy was not reset."""


class VerificationError(SwiftLoraFixError, RuntimeError):
    """``swift-lora-fix verify`` cannot measure what it was asked to: no such adapter, or a run that ends early."""


class PolicyMismatchError(EngineStateError):
    """An audit or the gate found that the engine serves another policy than the trainer's; ``finding`` says which."""

    def __init__(self, message: str, finding: object = None) -> None:
        super().__init__(message)
        self.finding = finding


class AdapterRequestError(SwiftLoraFixError, ValueError):
    """A `LoRATensorRequest` is made of things that do not go together, or of what is not an adapter."""


class AdapterConflictError(SwiftLoraFixError, ValueError):
    """The engine holds another adapter under the id of a request that does not ask to replace it."""


class SegmentError(SwiftLoraFixError, OSError):
    """An adapter's bytes in shared memory are gone, truncated, changed or somebody else's, or there is no room."""


class ProtocolError(SwiftLoraFixError, ValueError):
    """Trainer and rollout server do not speak the same language: a field, a header or an answer is not understood."""


class AccessError(SwiftLoraFixError, PermissionError):
    """The rollout server may not do that for whoever asked: a wrong key, a path outside its root, a link."""


class StagingError(SwiftLoraFixError, ValueError):
    """An adapter is not one that a rollout server can serve; it keeps the policy that it has. ``status``: HTTP's."""

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status
