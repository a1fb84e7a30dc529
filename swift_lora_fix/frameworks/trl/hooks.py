"""The hooks into TRL, vLLM's ``LLM`` and transformers' ``Trainer``. No logic here: each calls the session.

The order of a step: ``VLLMGeneration.sync_weights``, where TRL sees a new step; ``VLLMGeneration.generate``, and inside
it ``LLM.generate``, when prompts are gathered and the engine is awake.
"""

from __future__ import annotations

import inspect
import typing
from contextvars import ContextVar
from typing import Any, Callable

from ... import session as sessions
from ...common.log import info
from ...common.settings import Settings
from ...install.registry import Patch, PatchSet
from ...policy import origin
from . import port as ports
from . import starting
from .batch import TrlBatch
from .port import TrlTrainer
from .rollouts import TrlChat, TrlRollout, TrlServerRollout

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
_chats: ContextVar[bool] = ContextVar("chats", default=False)  # within ``LLM.chat`` of a trainer's engine


def _make_generation(wrapped: Callable[..., Any], generation: Any, args: Args, kwargs: Kwargs) -> Any:
    given = inspect.signature(wrapped).bind(*args, **kwargs)
    given.apply_defaults()
    model, mode = given.arguments["model"], given.arguments["mode"]
    asked, seen = Settings.from_environment().mode, None
    if mode == "server":
        seen = starting.server_of(model, given.arguments["accelerator"], asked)
    with starting.making_engine(_engine_arguments(model) if mode == "colocate" else {}, seen):
        result = wrapped(*args, **kwargs)
    port = TrlTrainer(generation)
    problem = port.told_by_main_rank(seen.problem) if seen is not None else _why_not(port)
    port.takes_folders = seen is not None and not problem
    if problem:
        if seen is None or not seen.is_said:
            _say_aside(problem)
        return result
    port.note_engine()
    sessions.begin(generation, port)
    return result


def _say_aside(why: str) -> None:
    info(f"stepping aside: {why}. TRL's own weight sync runs unchanged.")


def _engine_arguments(model: Any) -> dict[str, Any]:
    """LoRA layers, where the user asked for a mode that needs them."""
    if Settings.from_environment().mode not in ("adapter", "auto") or starting.tuner_of(model) != "lora":
        return {}
    from vllm.config.lora import MaxLoRARanks

    from ...memory import hooks as memory

    memory.install()
    return starting.lora_arguments(model, typing.get_args(MaxLoRARanks))


def _why_not(port: TrlTrainer) -> str:
    if port.tuner == "lora" and port.sharding not in ("", "FSDP2"):
        return f"the model is sharded by {port.sharding}, and a sync from there is not tried yet under TRL"
    return ""


def _make_engine(wrapped: Callable[..., Any], llm: Any, args: Args, kwargs: Kwargs) -> Any:
    return wrapped(*args, **{**kwargs, **(starting.engine_arguments.get() or {})})


def _connect(wrapped: Callable[..., Any], client: Any, args: Args, kwargs: Kwargs) -> Any:
    """Without a connection for weights to a server that takes adapters as folders: it gets nothing else."""
    seen = starting.server_seen.get()
    if seen is not None and seen.look(client):
        return None
    if seen is not None:  # before TRL's own way, which may fail
        _say_aside(seen.problem)
        seen.is_said = True
    return wrapped(*args, **kwargs)


def _sync_weights(wrapped: Callable[..., Any], generation: Any, args: Args, kwargs: Kwargs) -> Any:
    session = sessions.session_of(generation)
    if session is None or _port(session).is_pushing:
        return wrapped(*args, **kwargs)
    session.invalidate_if_lost()
    _port(session).wake_weights()
    session.synchronize()
    _port(session).note_synced()
    return None


def _generate(wrapped: Callable[..., Any], generation: Any, args: Args, kwargs: Kwargs) -> Any:
    session = sessions.session_of(generation)
    if session is None:
        return wrapped(*args, **kwargs)
    port = _port(session)

    def rollouts() -> Any:
        if port.lacks_policy:
            generation.sync_weights()
        with port.keeping_weights():
            try:
                return wrapped(*args, **kwargs)
            finally:
                port.note_generated()

    if not port.lacks_policy and not port.sleep_level:
        session.invalidate_if_lost()
    result = rollouts()
    if session.after_rollout():
        result = rollouts()
        session.after_rollout()
    return result


def _server_generate(wrapped: Callable[..., Any], client: Any, args: Args, kwargs: Kwargs) -> Any:
    session = _session_of_engine(client)
    if session is None:
        return wrapped(*args, **kwargs)
    port = _port(session)

    def infer(*args: Any, **kwargs: Any) -> Any:
        return session.engine.generate(lambda: wrapped(*args, **kwargs))

    session.before_rollout(TrlServerRollout(port, infer, *args, **kwargs))
    return infer(*args, **kwargs)


def _engine_generate(wrapped: Callable[..., Any], llm: Any, args: Args, kwargs: Kwargs) -> Any:
    session = _session_of_engine(llm)
    if session is None:
        return wrapped(*args, **kwargs)
    port = _port(session)
    if _chats.get():
        return wrapped(*args, **port.completed(kwargs))

    def infer(*args: Any, **kwargs: Any) -> Any:
        return session.engine.generate(lambda: wrapped(*args, **port.completed(kwargs)))

    rollout = TrlRollout(port, infer, *args, **kwargs)
    session.before_rollout(rollout)
    outputs = infer(*args, **kwargs)
    rollout.check_prompts(outputs)
    return outputs


def _engine_chat(wrapped: Callable[..., Any], llm: Any, args: Args, kwargs: Kwargs) -> Any:
    """In newer releases of vLLM it does not come by ``LLM.generate``. The gate's own questions do."""
    session = _session_of_engine(llm)
    if session is None:
        return wrapped(*args, **kwargs)
    port = _port(session)
    generate = GENERATION.beneath("LLM.generate")

    def ask(*args: Any, **kwargs: Any) -> Any:
        return session.engine.generate(lambda: generate(llm, *args, **port.completed(kwargs)))

    def chat(*args: Any, **kwargs: Any) -> Any:
        token = _chats.set(True)
        try:
            return session.engine.generate(lambda: wrapped(*args, **port.completed(kwargs)))
        finally:
            _chats.reset(token)

    session.before_rollout(TrlChat(port, ask, chat, *args, **kwargs))
    return chat(*args, **kwargs)


def _score_completions(wrapped: Callable[..., Any], trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    batch = wrapped(*args, **kwargs)
    session = _session_of(trainer)
    if session is not None:
        session.note_batch(TrlBatch(trainer, batch))
    return batch


def _make_accelerator(wrapped: Callable[..., Any], trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    result = wrapped(*args, **kwargs)
    ports.note_trainer(trainer)
    return result


def _train(wrapped: Callable[..., Any], trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    """Of each of transformers' trainers: one that has trained the model before has a part in what it holds."""
    claim = inspect.signature(wrapped).bind(*args, **kwargs).arguments.get("resume_from_checkpoint")
    ports.note_claim(trainer, claim)
    session = _session_of(trainer)
    if claim and session is not None:
        session.forget_origin()  # an evaluation has served what was there before
    try:
        return wrapped(*args, **kwargs)
    finally:
        origin.note_trained(trainer.accelerator.unwrap_model(trainer.model))


def _session_of(trainer: Any) -> sessions.Session | None:
    """None, too, for trainers without vLLM, and ms-swift's, which are TRL's and have no such generation."""
    return sessions.session_of(trainer.vllm_generation) if hasattr(trainer, "vllm_generation") else None


def _session_of_engine(engine: Any) -> sessions.Session | None:
    """Of the trainer whose ``LLM``, or whose servers' client, this is."""
    port = ports.port_of_engine(engine)
    return sessions.session_of(port.generation) if port is not None else None


def _port(session: sessions.Session) -> TrlTrainer:
    assert isinstance(session.trainer, TrlTrainer)
    return session.trainer


GENERATION = PatchSet(
    "TRL generation",
    (
        Patch(
            "VLLMGeneration.__init__",
            _make_generation,
            why="the scope is decided, and an adapter that cannot be served refused, before training starts",
            goes_when="with the last of the others",
        ),
        Patch(
            "VLLMGeneration.sync_weights",
            _sync_weights,
            why="the trainer's frozen base drifts, and a push that fails leaves the adapter merged into it",
            goes_when="TRL sends the adapter, or merged weights, without merging into the trainer's model",
            bypasses=("VLLMGeneration.sync_weights",),
        ),
        Patch(
            "VLLMGeneration.generate",
            _generate,
            why="up to TRL 1.9 a sleeping engine wakes up with the weights of the model's files",
            goes_when="TRL 1.9 is no longer supported",
        ),
        Patch(
            "LLM.__init__",
            _make_engine,
            why="TRL has no argument for an engine with LoRA layers",
            goes_when="GRPOConfig has one",
        ),
        Patch(
            "LLM.generate",
            _engine_generate,
            why="TRL's requests name no adapter, and nothing checks what the engine holds",
            goes_when="TRL's requests name the adapter, and a missing one is refused",
        ),
        Patch(
            "LLM.chat",
            _engine_chat,
            why="a rollout_func may call it, and TRL up to 0.29 does: it names no adapter, and nothing is checked",
            goes_when="with that of LLM.generate",
        ),
    ),
)

SERVER = PatchSet(
    "TRL server",
    (
        Patch(
            "VLLMClient.init_communicator",
            _connect,
            why="TRL sends a LoRA to a vLLM server as merged weights, over NCCL",
            goes_when="TRL's synchronous trainers send the adapter, as its asynchronous one does",
        ),
        Patch(
            "VLLMClient.generate",
            _server_generate,
            why="requests ask for the base model's name, and nothing checks what the server answers with",
            goes_when="TRL's requests name the policy",
        ),
    ),
)

SCORING = PatchSet(
    "TRL scoring",
    (
        Patch(
            "GRPOTrainer._generate_and_score_completions",
            _score_completions,
            why="a mismatch that only real prompts show (images, tools, length) is in no number of the proof",
            goes_when="TRL logs the distance over all tokens and ranks, and without dropout",
        ),
    ),
)

TRANSFORMERS = PatchSet(
    "transformers trainer",
    (
        Patch(
            "Trainer.create_accelerator_and_postprocess",
            _make_accelerator,
            why="VLLMGeneration does not know its trainer: step, metrics and checkpoint would be unknown",
            goes_when="VLLMGeneration keeps its trainer, or is told the step",
        ),
        Patch(
            "Trainer._inner_training_loop",
            _train,
            why="nothing else tells which checkpoint a run claims to resume from",
            goes_when="transformers keeps it (TrainingArguments.resume_from_checkpoint is not it)",
        ),
    ),
)
