"""The hooks into ms-swift and PEFT. No logic here: each hands over to the stage it belongs to."""

from __future__ import annotations

from typing import Any, Callable

from ... import sync
from ...install.registry import Patch, PatchSet
from ...policy import origin
from ...proof import guard
from ...server.trainer.remote import prepare_client

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def _prepare_rollout(wrapped: Callable[..., Any], trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    prepare_client(getattr(trainer, "vllm_client", None))
    result = wrapped(*args, **kwargs)
    sync.begin(trainer)
    return result


def _fast_infer(wrapped: Callable[..., Any], trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    state = sync.state_of(trainer)
    # with --async_generate servers are at work, and answer nothing else: they are asked just before the next rollout
    if state is not None and not getattr(trainer.args, "async_generate", False):
        sync.note_losses(trainer, state)
    return wrapped(*args, **kwargs)


def _move_model_to_vllm(wrapped: Callable[..., Any], trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    state = sync.state_to_sync(trainer)
    if state is None:
        return wrapped(*args, **kwargs)
    if getattr(trainer.args, "async_generate", False) and not _skips_async_check(*args, **kwargs):
        trainer._wait_queue()  # as ms-swift's own does
    return sync.synchronize(trainer, state)


def _skips_async_check(skip_async_check: bool = False) -> bool:
    return skip_async_check


def _engine_infer(wrapped: Callable[..., Any], trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    state = sync.state_of(trainer)
    if state is None:
        return wrapped(*args, **kwargs)

    def infer(*args: Any, **kwargs: Any) -> Any:
        engine = (sync.state_of(trainer) or state).engine  # a repair may have made another one
        return engine.generate(lambda: wrapped(*args, **kwargs))

    if state.engine.make_ready():
        state.proof.note_disturbance()
        state.proof.examined = False
    guard.before_rollout(trainer, state, infer, *_requests_and_config(*args, **kwargs))
    return guard.tag(sync.state_of(trainer) or state, infer(*args, **kwargs))


def _requests_and_config(infer_requests: Any, request_config: Any = None, **kwargs: Any) -> tuple[Any, Any]:
    return infer_requests, request_config


def _load_adapter(wrapped: Callable[..., Any], model: Any, args: Args, kwargs: Kwargs) -> Any:
    result = wrapped(*args, **kwargs)
    origin.record_load(model, *_adapter_and_folder(*args, **kwargs))
    return result


def _adapter_and_folder(model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> tuple[str, Any]:
    return adapter_name, model_id


ROLLOUT = PatchSet(
    "ms-swift rollout",
    (
        Patch(
            "RolloutTrainerMixin.prepare_rollout",
            _prepare_rollout,
            why="the scope is decided, and an adapter that the engine cannot serve refused, before training starts",
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

PEFT = PatchSet(
    "PEFT adapter loads",
    (
        Patch(
            "PeftModel.load_adapter",
            _load_adapter,
            why="nothing else tells at the first sync which file the trainer's adapter was read from",
            goes_when="ms-swift or PEFT keeps the folder an adapter was loaded from",
        ),
    ),
)
