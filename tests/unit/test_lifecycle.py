"""The parts of a sync that a CPU engine cannot show: sleep, refused resets, running requests. The engine is a fake."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swift_lora_fix import errors, scope, sync
from swift_lora_fix.engine.vllm.handle import ADAPTER_ID, EngineHandle
from swift_lora_fix.engine.vllm.slots import loader
from swift_lora_fix.engine.vllm.slots.writer import AdapterWriter
from swift_lora_fix.engine.vllm.weights import base
from swift_lora_fix.install import releases
from swift_lora_fix.policy import adapter
from swift_lora_fix.proof import guard
from tests.support.peft_models import peft_model, trainer_of


class FakeEngine:
    """The surface of ms-swift's GRPOVllmEngine that the handle touches."""

    def __init__(self) -> None:
        self.busy = False
        self.prefix_reset: Any = True
        self.loaded: set[int] = {ADAPTER_ID}
        self.slots: list[int | None] = [ADAPTER_ID]
        manager = SimpleNamespace(lora_index_to_id=self.slots)
        worker = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager)))
        driver = SimpleNamespace(worker=worker)
        self.inner_model = torch.nn.Linear(2, 2)
        self.inner_model_executor = SimpleNamespace(is_sleeping=False, driver_worker=driver)
        self.engine = SimpleNamespace(
            has_unfinished_requests=lambda: self.busy,
            reset_prefix_cache=lambda: self.prefix_reset,
            reset_encoder_cache=lambda: None,
            list_loras=lambda: self.loaded,
            vllm_config=SimpleNamespace(lora_config=SimpleNamespace(max_lora_rank=4, lora_dtype=torch.bfloat16)),
        )


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def state(engine: FakeEngine) -> sync.SyncState:
    handle, bound = EngineHandle(engine), adapter.bind(peft_model())
    writer = AdapterWriter(handle, bound, request_class=None, device=torch.device("cpu"))
    return sync.SyncState(None, handle, bound, writer, base_is_current=True, served_step=3)


def roll_out(state: sync.SyncState) -> None:
    """What happens before a rollout of a sync that was examined already."""
    state.proof.examined = True
    trainer = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1))
    guard.before_rollout(trainer, state, lambda requests, config: [], [], None)


@pytest.mark.parametrize("level, base_survives", [(1, True), (2, False)])
def test_after_a_sleep_everything_that_was_lost_is_sent_again(
    state: sync.SyncState, engine: FakeEngine, level: int, base_survives: bool
) -> None:
    trainer = SimpleNamespace(_last_loaded_step=3, args=SimpleNamespace(sleep_level=level))
    sync.note_losses(trainer, state)
    assert trainer._last_loaded_step == 3 and state.served_step == 3, "an engine that is awake keeps its weights"
    engine.inner_model_executor.is_sleeping = True
    sync.note_losses(trainer, state)
    assert trainer._last_loaded_step == -1, "ms-swift then syncs although no step was taken"
    assert state.served_step is None and state.base_is_current is base_survives
    with pytest.raises(errors.EngineStateError, match="no sync has completed since the engine was started or slept"):
        roll_out(state)


def test_a_rollout_needs_the_adapter_loaded_and_in_a_slot(state: sync.SyncState, engine: FakeEngine) -> None:
    roll_out(state)
    engine.slots[0] = None
    with pytest.raises(errors.EngineStateError, match="in no LoRA slot"):
        roll_out(state)
    engine.loaded.clear()
    with pytest.raises(errors.EngineStateError, match="adapter 111 .* is not loaded; loaded are none"):
        roll_out(state)


def test_a_reset_that_was_not_done_is_an_error(engine: FakeEngine) -> None:
    handle = EngineHandle(engine)
    handle.reset_caches()
    engine.prefix_reset = None  # vLLM 0.11 answers nothing
    handle.reset_caches()
    engine.prefix_reset = False
    with pytest.raises(errors.CacheResetError, match=r"reset_prefix_cache\(\) reported that it was not done"):
        handle.reset_caches()


def test_running_requests_keep_their_policy(engine: FakeEngine) -> None:
    engine.busy = True
    with pytest.raises(errors.EngineStateError, match="unfinished requests"):
        EngineHandle(engine).check_idle()


def test_a_rank_above_the_engines_is_refused_with_the_way_out(engine: FakeEngine) -> None:
    loader.check_ranks(adapter.bind(peft_model(r=4)), EngineHandle(engine))
    with pytest.raises(errors.UnsupportedAdapterError, match="has rank 8 .*max_lora_rank=4.*--lora_rank 8"):
        loader.check_ranks(adapter.bind(peft_model(r=8)), EngineHandle(engine))


def test_a_push_that_fails_leaves_the_trainer_as_it_was() -> None:
    model = peft_model()

    def fail() -> None:
        model.merge_adapter()  # what stock does; shadowed, it does nothing
        raise RuntimeError("vLLM is out of memory")

    trainer = trainer_of(model, _move_full_model_to_vllm=fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        base.push(trainer, EngineHandle(FakeEngine()), adapter.bind(model))
    assert not model.base_model.model.first.merged
    assert "merge_adapter" not in vars(model) and "_move_adapter_to_vllm" not in vars(trainer)


class Trainer(SimpleNamespace):
    __hash__ = object.__hash__


def given(**changes: Any) -> Any:
    args = {
        "use_vllm": True,
        "tuner_type": "lora",
        **{k: v for k, v in changes.items() if k in ("use_vllm", "tuner_type")},
    }
    trainer = {"vllm_mode": "colocate", "rollout_enable_lora": True, **changes}
    return Trainer(args=SimpleNamespace(**args), **{k: trainer[k] for k in ("vllm_mode", "rollout_enable_lora")})


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"use_vllm": False}, "rollouts do not use vLLM"),
        ({"tuner_type": "full"}, "the tuner is 'full'"),
        ({"vllm_mode": "server", "rollout_enable_lora": False}, "the rollout servers have no LoRA layers"),
        ({"vllm_mode": "other"}, "vllm_mode is 'other'"),
    ],
)
def test_whatever_is_not_ours_is_left_alone_and_said_once(
    changes: dict, reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("swift"), "propagate", True)
    trainer = given(**changes)
    with caplog.at_level(logging.INFO, logger="swift.lora_fix"):
        sync.begin(trainer)
    assert len(caplog.messages) == 1 and reason in caplog.messages[0] and "unchanged" in caplog.messages[0]
    assert sync.state_of(trainer) is None


def test_the_old_name_of_the_tuner_argument() -> None:
    trainer = given()
    del trainer.args.tuner_type
    trainer.args.train_type = "lora"
    assert scope.decide(trainer).ours


def test_release_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    import swift_lora_fix

    monkeypatch.setattr(releases, "installed_swift", lambda: "3.9.3")
    with pytest.raises(errors.UnsupportedReleaseError, match="3.9.3 is older than 3.10.0"):
        swift_lora_fix.apply()
    monkeypatch.setattr(releases, "installed_swift", lambda: None)
    with pytest.raises(errors.MissingPackageError, match="ms-swift is not installed"):
        swift_lora_fix.apply()


def test_a_rollout_in_the_background_leaves_the_trainer_alone(state: sync.SyncState) -> None:
    """With --async_generate true the trainer takes its next step meanwhile: no probe, no talk with other ranks."""
    trainer = SimpleNamespace(accelerator=SimpleNamespace(num_processes=2))  # whatever else is asked of it fails

    def roll_out() -> None:
        guard.before_rollout(trainer, state, lambda requests, config: [], [object()], None)

    state.adapter.layers[0].scaling["default"] = 7.0
    with ThreadPoolExecutor(1) as thread:
        with pytest.raises(errors.PolicyMismatchError, match="2 -> 7"):
            thread.submit(roll_out).result()
        state.adapter.layers[0].scaling["default"] = 2.0
        thread.submit(roll_out).result()
    assert state.proof.examined and state.proof.verdict is None
    state.proof.examined = False
    with pytest.raises(AttributeError):
        roll_out()
