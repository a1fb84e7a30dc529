"""The hooks into ms-swift. No logic here: each calls the session of its trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

from ... import session as sessions
from ...install.registry import Patch, PatchSet
from ...policy.files import check_start
from ...server.trainer.remote import prepare_client
from .batch import SwiftBatch
from .port import SwiftTrainer
from .rollouts import SwiftRollout, probe_rollout, tag

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def _prepare_rollout(wrapped: Callable[..., Any], trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    prepare_client(SwiftTrainer(trainer).server_client_to_be)
    with SwiftTrainer(trainer).making_room():
        result = wrapped(*args, **kwargs)
    sessions.begin(trainer, SwiftTrainer(trainer))
    return result


def _fast_infer(wrapped: Callable[..., Any], trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    session = sessions.session_of(trainer)
    # with --async_generate the servers are busy now and answer nothing else: they are asked just before the next
    # rollout
    if session is not None and not session.trainer.is_asynchronous:
        session.invalidate_if_lost()
    result = wrapped(*args, **kwargs)
    session = sessions.session_of(trainer)
    if session is not None and session.after_rollout():
        result = wrapped(*args, **kwargs)
        session.after_rollout()
    return result


def _move_model_to_vllm(wrapped: Callable[..., Any], trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    if not sessions.is_known(trainer):
        sessions.begin(trainer, SwiftTrainer(trainer))
    session = sessions.session_of(trainer)
    if session is None:
        return wrapped(*args, **kwargs)
    port = session.trainer
    if port.is_asynchronous and not _skips_async_check(*args, **kwargs):
        port.wait_for_rollouts()  # as ms-swift's own does
    session.synchronize()
    if port.is_asynchronous:
        session.look_at_once(_probe_rollout(trainer) if port.is_main_rank else None)
    return None


def _probe_rollout(trainer: Any) -> SwiftRollout:
    """Beneath our own hook, as the probes of a rollout are asked, whoever wraps that hook."""
    infer = ROLLOUT.beneath("RolloutTrainerMixin._engine_infer")
    return probe_rollout(trainer, infer.__get__(trainer, type(trainer)))


def _skips_async_check(skip_async_check: bool = False) -> bool:
    return skip_async_check


def _engine_infer(wrapped: Callable[..., Any], trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    session = sessions.session_of(trainer)
    if session is None:
        return wrapped(*args, **kwargs)

    def infer(*args: Any, **kwargs: Any) -> Any:
        return session.engine.generate(lambda: wrapped(*args, **kwargs))

    try:
        session.before_rollout(SwiftRollout(SwiftTrainer(trainer), infer, *args, **kwargs))
        return tag(infer(*args, **kwargs), session.served_step, session.last_write.digest)
    except Exception as error:
        SwiftTrainer(trainer).rollout_failed(error)
        raise


def _prepare_batch_inputs(wrapped: Callable[..., Any], trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    batches = wrapped(*args, **kwargs)
    session = sessions.session_of(trainer)
    if session is not None:
        session.note_batch(SwiftBatch(trainer, *args, **kwargs, batches=batches))
    return batches


def _from_pretrained(wrapped: Callable[..., Any], instance: Any, args: Args, kwargs: Kwargs) -> Any:
    check_start(_start_folder(*args, **kwargs), "--resume_from_checkpoint, --adapters or --ref_adapters")
    return wrapped(*args, **kwargs)


def _start_folder(model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Path:
    return Path(model_id)


ROLLOUT = PatchSet(
    "ms-swift rollout",
    (
        Patch(
            "RolloutTrainerMixin.prepare_rollout",
            _prepare_rollout,
            why="vLLM refuses ranks not in its list, and leaves towers out; the scope is decided, and what the engine "
            "cannot serve refused, before training starts",
            goes_when="with the last of the others",
        ),
        Patch(
            "RolloutTrainerMixin._fast_infer",
            _fast_infer,
            why="after a sleep the engine may have lost base or slots, and nothing restores them within a step",
            goes_when="ms-swift syncs again after every wake-up",
        ),
        Patch(
            "RolloutTrainerMixin._move_model_to_vllm",
            _move_model_to_vllm,
            why="LoRA counted twice, first batch from the base, trainer's base drifting, its LoRA cast to bf16",
            goes_when="ms-swift pushes the unmerged base and reads the adapter without merging it",
            bypasses=("RolloutTrainerMixin._move_model_to_vllm", "RolloutTrainerMixin._move_adapter_to_vllm"),
        ),
        Patch(
            "RolloutTrainerMixin._engine_infer",
            _engine_infer,
            why="without the adapter in the engine, rollouts silently come from the base model",
            goes_when="ms-swift refuses a rollout whose adapter is not loaded",
        ),
    ),
)

TUNERS = PatchSet(
    "ms-swift tuners",
    (
        Patch(
            "Swift.from_pretrained",
            _from_pretrained,
            why="stock's errors name no folder: a bare AssertionError, or safetensors' own for a corrupt file",
            goes_when="ms-swift's own error names the folder and what it lacks",
        ),
    ),
)

SCORING = PatchSet(
    "ms-swift scoring",
    (
        Patch(
            "GRPOTrainer._prepare_batch_inputs",
            _prepare_batch_inputs,
            why="a mismatch that only real prompts show (images, tools, length) is in no number that users see",
            goes_when="ms-swift logs the distance of the rollouts' own logprobs by default",
        ),
    ),
)
