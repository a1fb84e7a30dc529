"""One sync, from the trainer to the engine: the stages in order, and the state they leave behind."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass, field
from typing import Any

from . import adapter as adapters
from . import origin, scope
from .engine import base, loader
from .engine.handle import EngineHandle
from .engine.writer import AdapterWriter, WriteReport
from .errors import EngineStateError
from .log import info
from .settings import Settings


@dataclass
class SyncState:
    """What the engine holds of one trainer. ``served_step`` is None while it does not hold the trainer's adapter."""

    model: Any
    engine: EngineHandle
    adapter: adapters.Adapter
    writer: AdapterWriter
    origin: origin.AdapterOrigin | None = None
    base_is_current: bool = False
    served_step: int | None = None
    syncs: int = 0
    base_pushes: int = 0
    last_seconds: float = 0.0
    last_write: WriteReport = field(default_factory=lambda: WriteReport("none"))

    def summary(self) -> dict[str, Any]:
        """For ``swift_lora_fix.status()``."""
        return {
            "origin": str(self.origin) if self.origin else "not decided before the first sync",
            "served_step": self.served_step,
            "syncs": self.syncs,
            "base_pushes": self.base_pushes,
            "path": self.last_write.path,
            "adapter_bytes": self.last_write.bytes_written,
            "sync_seconds": self.last_seconds,
            **{f"{stage}_seconds": seconds for stage, seconds in self.last_write.seconds.items()},
        }


_states: weakref.WeakKeyDictionary[Any, SyncState] = weakref.WeakKeyDictionary()
_seen: weakref.WeakSet[Any] = weakref.WeakSet()  # trainers that ``begin`` has decided about


def begin(trainer: Any) -> None:
    """After ms-swift prepared its engine: take the sync over, or step aside and say so once."""
    decision = scope.decide(trainer)
    _seen.add(trainer)
    info(decision.reason)
    if decision.ours:
        state = _bind(trainer)
        loader.check_ranks(state.adapter, state.engine)
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

    Sleep level 2 throws the base away; LoRA slots may be lost at any level (vLLM issues 39934, 53888).
    """
    asleep = state.engine.is_asleep
    if asleep and trainer.args.sleep_level == 2:
        state.base_is_current = False
    lost = asleep or not state.writer.is_current()
    if not state.writer.everywhere(not lost):  # ranks that gather together sync together
        state.writer.forget_slots()
        state.served_step = None
        trainer._last_loaded_step = -1  # ms-swift then syncs, after waking the weights up


def synchronize(trainer: Any, state: SyncState) -> None:
    """Make the engine serve the trainer's policy: base (when it is not there), adapter, caches."""
    started = time.perf_counter()
    moved = not adapters.is_still_bound(state.adapter) or trainer.engine is not state.engine.engine
    if moved or not state.syncs:
        state = _states[trainer] = _bind_again(trainer, state)
    state.engine.check_idle()
    adapters.check_unmerged(state.adapter)
    if state.origin is None:
        held = adapters.read_to_host(state.adapter, trainer.accelerator.device)
        state.origin = origin.determine(state.model, state.adapter, held, trainer.args, trainer.state.global_step)
        info(str(state.origin))
    validated = time.perf_counter()
    state.writer.validate()  # before anything is written
    checked = time.perf_counter()
    if not state.base_is_current:
        base.push(trainer, state.engine, state.adapter)
        state.base_is_current = True
        state.base_pushes += 1
    state.served_step = None
    state.last_write = state.writer.write(keep_views=not getattr(trainer, "enable_offload", False))
    caches = time.perf_counter()
    state.engine.reset_caches()  # while the last copies run
    waited = time.perf_counter()
    state.writer.finish()
    ended = time.perf_counter()
    state.last_write.seconds.update(validate=checked - validated, caches=waited - caches, wait=ended - waited)
    state.last_seconds = ended - started
    state.served_step = trainer.state.global_step
    state.syncs += 1


def check_served(state: SyncState) -> None:
    """Before every rollout: raise EngineStateError unless the engine serves the policy of the last sync."""
    missing = state.engine.what_is_missing()
    if state.served_step is None:
        missing = "no sync has completed since the engine was started or slept"
    if missing is None and not state.writer.is_current():
        missing = "somebody wrote to its LoRA slots after the last sync"
    if missing:
        raise EngineStateError(
            f"The rollout would not use the trainer's LoRA adapter: {missing}. Nothing was generated. "
            "Sync first (trainer._move_model_to_vllm()), and keep other adapters out of this engine."
        )


def _bind(trainer: Any) -> SyncState:
    """A fresh state around the trainer's model and engine as they are now."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    engine, adapter = EngineHandle(trainer.engine), adapters.bind(model)
    direct = Settings.from_environment().writer == "direct"
    writer = AdapterWriter(engine, adapter, scope.request_class(trainer), trainer.accelerator.device, direct)
    return SyncState(model, engine, adapter, writer)


def _bind_again(trainer: Any, old: SyncState) -> SyncState:
    """ZeRO-3 and FSDP2 shard after ``begin``, FSDP2 into new parameters; and a new engine holds nothing yet."""
    state = _bind(trainer)
    loader.check_ranks(state.adapter, state.engine)
    state.origin, state.syncs, state.base_pushes = old.origin, old.syncs, old.base_pushes
    state.base_is_current = old.base_is_current and state.engine.engine is old.engine.engine
    if old.syncs:
        info("the trainer's LoRA parameters or its engine are new objects: bound again.")
    return state
