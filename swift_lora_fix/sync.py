"""One sync, from the trainer to the engine: the stages in order, and the state they leave behind."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass
from typing import Any

from . import adapter as adapters
from . import origin, scope
from .engine import base, loader
from .engine.handle import EngineHandle
from .errors import EngineStateError
from .log import info


@dataclass
class SyncState:
    """What the engine holds of one trainer. ``served_step`` is None while it does not hold the trainer's adapter."""

    engine: EngineHandle
    adapter: adapters.Adapter
    origin: origin.AdapterOrigin | None = None
    base_is_current: bool = False
    served_step: int | None = None
    syncs: int = 0
    last_seconds: float = 0.0
    base_pushes: int = 0

    def summary(self) -> dict[str, Any]:
        """For ``swift_lora_fix.status()``."""
        return {
            "origin": str(self.origin) if self.origin else "not decided before the first sync",
            "served_step": self.served_step,
            "syncs": self.syncs,
            "base_pushes": self.base_pushes,
            "last_seconds": self.last_seconds,
        }


_states: weakref.WeakKeyDictionary[Any, SyncState] = weakref.WeakKeyDictionary()


def begin(trainer: Any) -> None:
    """After ms-swift prepared its engine: take the sync over, or step aside and say so once."""
    decision = scope.decide(trainer)
    info(decision.reason)
    if decision.ours:
        state = SyncState(EngineHandle(trainer.engine), adapters.bind(_model(trainer)))
        loader.check_ranks(state.adapter, state.engine)
        _states[trainer] = state


def state_of(trainer: Any) -> SyncState | None:
    """The state of a trainer whose sync is ours, else None."""
    return _states.get(trainer)


def latest() -> SyncState | None:
    """The state of the trainer that began last in this process."""
    return list(_states.values())[-1] if _states else None


def note_sleep(trainer: Any, state: SyncState) -> None:
    """Before a rollout: an engine that slept is given its weights again, whatever the step.

    Sleep level 2 throws the base away; LoRA slots may be lost at any level (vLLM issues 39934, 53888).
    """
    if state.engine.is_asleep:
        state.served_step = None
        trainer._last_loaded_step = -1  # ms-swift then syncs after waking the weights up
        if trainer.args.sleep_level == 2:
            state.base_is_current = False


def synchronize(trainer: Any, state: SyncState) -> None:
    """Make the engine serve the trainer's policy: base (when it is not there), adapter, caches."""
    started = time.perf_counter()
    state.engine.check_idle()
    adapters.check_unmerged(_model(trainer))
    state.served_step = None
    with adapters.whole_values(state.adapter, trainer) as values:
        if state.origin is None:
            step = trainer.state.global_step
            state.origin = origin.determine(_model(trainer), state.adapter, values, trainer.args, step)
            info(str(state.origin))
        staged = loader.stage(state.adapter, values, state.engine.lora_dtype)
    if not state.base_is_current:
        base.push(trainer, state.engine)
        state.base_is_current = True
        state.base_pushes += 1
    loader.load(state.engine, state.adapter, staged, scope.request_class(trainer))
    state.engine.reset_caches()
    state.served_step = trainer.state.global_step
    state.syncs += 1
    state.last_seconds = time.perf_counter() - started


def check_served(state: SyncState) -> None:
    """Before every rollout: raise EngineStateError unless the engine serves the policy of the last sync."""
    missing = "no sync of this trainer has completed" if state.served_step is None else state.engine.what_is_missing()
    if missing:
        raise EngineStateError(
            f"The rollout would not use the trainer's LoRA adapter: {missing}. Nothing was generated. "
            "Sync first (trainer._move_model_to_vllm()), and keep other adapters out of this engine."
        )


def _model(trainer: Any) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model)
