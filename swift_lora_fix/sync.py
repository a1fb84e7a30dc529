"""One sync, from the trainer to the engine: the stages in order, and the state they leave behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from . import scope
from .common.log import info
from .common.settings import Settings
from .engine.vllm.handle import EngineHandle
from .engine.vllm.slots import loader
from .engine.vllm.slots.writer import AdapterWriter, Clock
from .engine.vllm.weights import base
from .engine.vllm.weights.fused import FusedWriter
from .errors import ResumeMismatchError
from .policy import adapter as adapters
from .policy import merging, origin
from .server.trainer.remote import RemoteEngine
from .server.trainer.writer import RemoteWriter
from .state import SyncState

_states: weakref.WeakKeyDictionary[Any, SyncState] = weakref.WeakKeyDictionary()
_seen: weakref.WeakSet[Any] = weakref.WeakSet()  # trainers that ``begin`` has decided about


def begin(trainer: Any) -> None:
    """After ms-swift prepared its engine: take the sync over, or step aside and say so once."""
    decision = scope.decide(trainer)
    _seen.add(trainer)
    info(decision.reason)
    if decision.ours:
        state = _bind(trainer, decision.mode)
        state.auto = decision.is_open
        if decision.mode == "fused":
            trainer.engine.enable_lora = False  # ms-swift's engine then adds no LoRA request to rollouts
        base.name_parameters(trainer)
        _states[trainer] = state


def state_of(trainer: Any) -> SyncState | None:
    """The state of a trainer whose sync is ours, else None."""
    return _states.get(trainer)


def state_to_sync(trainer: Any) -> SyncState | None:
    """The same before a sync; a trainer that prepared its engine before the patches went in begins here."""
    if trainer not in _seen:
        begin(trainer)
    return _states.get(trainer)


def forget() -> None:
    """The patches are gone: whatever happens to the engines from now on is not known here."""
    _states.clear()
    _seen.clear()


def latest() -> SyncState | None:
    """The state of the trainer that began last in this process."""
    return list(_states.values())[-1] if _states else None


def note_losses(trainer: Any, state: SyncState) -> None:
    """Before a rollout: an engine that slept, or whose slots somebody wrote to, is synced again, whatever the step.

    Sleep level 2 throws the base away; LoRA slots may be lost at any level (vLLM issues 39934, 53888). Rollout servers
    are asked by the sync itself, and just before each rollout.
    """
    if state.engine.is_remote:
        return
    asleep = state.engine.is_asleep
    if asleep and trainer.args.sleep_level == 2:
        state.base_is_current = False
    if asleep:
        state.proof.note_disturbance(sleep=True)
    lost = asleep or not state.writer.is_current()
    if not state.writer.everywhere(not lost):  # ranks that gather together sync together
        state.writer.forget()
        state.served_step = None
        trainer._last_loaded_step = -1  # ms-swift then syncs, after waking the weights up


def synchronize(trainer: Any, state: SyncState) -> None:
    """Make the engine serve the trainer's policy: base (when it is not there), adapter, caches."""
    clock = Clock()
    started = clock.last
    if state.syncs:
        state.writer.begin_validation()  # the device looks at the values while the rest is looked at here
        clock.lap("validate")
    moved = not adapters.is_still_bound(state.adapter) or not _has_engine(trainer, state.engine)
    if moved or not state.syncs:
        state = _states[trainer] = _bind_again(trainer, state)
        state.writer.begin_validation()
    state.engine.check_idle()
    state.proof.begin_sync()
    adapters.check_unmerged(state.adapter)
    came_from = _find_origin(trainer, state) if state.origin is None else None
    clock.lap("check")
    state.writer.validate()  # before anything is written
    clock.lap("validate")
    if not state.base_is_current:
        _push_base(trainer, state)
    state.served_step = None
    state.last_write = state.writer.write(keep_views=not getattr(trainer, "enable_offload", False))
    clock.start()
    state.engine.reset_caches()  # while the last copies run
    clock.lap("caches")
    state.writer.finish()
    clock.lap("wait")
    if came_from is not None and came_from != state.last_write.digest:
        raise ResumeMismatchError(
            f"What was sent to the engine (digest {state.last_write.digest}) is not the adapter that the run starts "
            f"from (digest {came_from}): {state.origin}. Report this with your versions (swift-lora-fix doctor)."
        )
    state.last_write.seconds.update(clock.laps)
    state.last_seconds = clock.last - started
    state.served_step = trainer.state.global_step
    state.syncs += 1


def restore(trainer: Any, state: SyncState) -> SyncState:
    """Repair: send base and adapter again, through the reference path. The state to go on with."""
    if adapters.changed_scalings(state.adapter):
        served, state = state.served_step, _bind_again(trainer, state)
        state.served_step, _states[trainer] = served, state
    served, state.served_step = state.served_step, None
    _push_base(trainer, state)
    state.last_write = state.writer.write_by_reference()
    state.engine.reset_caches()
    state.writer.finish()
    state.served_step = served
    state.proof.note_disturbance()
    return state


def change_mode(trainer: Any, state: SyncState, mode: str) -> None:
    """Serve the same policy in the other mode: base and adapter are sent anew. The engine must be awake and idle."""
    changed = _bind(trainer, mode)
    changed.inherit(state)
    changed.custody_is_said = False  # it ends at another place now
    trainer.engine.enable_lora = mode == "adapter"
    _states[trainer] = changed
    synchronize(trainer, changed)


def fused_writer(trainer: Any) -> FusedWriter:
    """A writer of the fused mode beside the one in use, which does not know the engine yet."""
    writer = _bind(trainer, "fused").writer
    assert isinstance(writer, FusedWriter)
    return writer


def learn_places(trainer: Any, writer: FusedWriter) -> None:
    """Let it know the engine, which holds the trainer's plain base afterwards."""
    writer.accept_base(base.push(trainer, writer.engine, writer.adapter, writer.changing))


def what_is_missing(state: SyncState) -> str | None:
    """Before every rollout: why the engine cannot serve the policy of the last sync at all, or None."""
    if state.served_step is None:
        return "no sync has completed since the engine was started or slept"
    return state.writer.what_is_missing()


def _push_base(trainer: Any, state: SyncState) -> None:
    if isinstance(state.writer, RemoteWriter):
        state.writer.prove_base(state.model)
        state.base_is_current = True
        return
    assert isinstance(state.engine, EngineHandle)
    pushed = base.push(trainer, state.engine, state.adapter, state.writer.changing)
    state.writer.accept_base(pushed)
    state.base_record, state.base_is_current = pushed.record, True
    state.base_pushes += 1


def _find_origin(trainer: Any, state: SyncState) -> str:
    """Where the adapter came from, checked against its file; the digest that the engine must therefore get."""
    held = adapters.read_to_host(state.adapter, trainer.accelerator.device)
    state.origin = origin.determine(state.model, state.adapter, held, trainer.args, trainer.state.global_step)
    info(str(state.origin))
    return state.writer.digest_of(held)


def _bind(trainer: Any, mode: str) -> SyncState:
    """A fresh state around the trainer's model and engine as they are now."""
    model, device = trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator.device
    adapter = adapters.bind(model, apart=mode == "adapter")
    if trainer.vllm_mode == "server":
        servers = RemoteEngine(trainer)
        return SyncState(model, servers, adapter, RemoteWriter(trainer, servers, adapter))
    engine = EngineHandle(trainer.engine)
    writer: AdapterWriter | FusedWriter
    if mode == "adapter":
        loader.check_ranks(adapter, engine)
        direct = Settings.from_environment().writer == "direct"
        writer = AdapterWriter(engine, adapter, scope.request_class(trainer), device, direct)
    else:
        modules = merging.bind(model, adapter.name)
        writer = FusedWriter(engine, adapter, modules, device, partial(_reload, weakref.ref(trainer), adapter))
    return SyncState(model, engine, adapter, writer)


def _has_engine(trainer: Any, engine: EngineHandle | RemoteEngine) -> bool:
    """Whether it is (still) the trainer's. Of rollout servers only the main rank has a client."""
    now = getattr(trainer, "vllm_client" if engine.is_remote else "engine", None)
    return engine.engine is None or now is engine.engine


def _reload(trainer: Callable[[], Any], adapter: adapters.Adapter, *what: Any) -> set[str]:
    return base.reload(trainer(), adapter, *what)


def _bind_again(trainer: Any, old: SyncState) -> SyncState:
    """ZeRO-3 and FSDP2 shard after ``begin``, FSDP2 into new parameters; and a new engine holds nothing yet."""
    state = _bind(trainer, old.mode)
    state.inherit(old)
    engine_is_the_same = _has_engine(trainer, old.engine)
    # in fused mode the places in the engine are learnt by the push; what servers were sent, the old writer knows
    is_known = old.mode == "adapter" and not state.engine.is_remote
    state.base_is_current = is_known and old.base_is_current and engine_is_the_same
    state.base_record = old.base_record if state.base_is_current else None
    if old.syncs:
        info("the trainer's LoRA parameters or its engine are new objects: bound again.")
    return state
