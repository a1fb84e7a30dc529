"""The order in which TRL's hooks call the session, with an engine that sleeps after rollouts and one that does not."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch

from swift_lora_fix import arming
from swift_lora_fix import session as sessions
from swift_lora_fix.errors import UnsupportedReleaseError
from swift_lora_fix.frameworks.trl import hooks, starting
from swift_lora_fix.frameworks.trl.port import TrlTrainer
from tests.support.peft_models import peft_model


class Llm:
    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {tags[0]}")

    def collective_rpc(self, method: str) -> None:
        self.calls.append(method)


class Generation:
    """TRL's ``VLLMGeneration`` as 1.9 has it: it reads weights from files as it wakes up, and sleeps at the end."""

    mode = "colocate"

    def __init__(self, sleeps: bool) -> None:
        self.enable_sleep_mode, self.calls = sleeps, []
        self.llm = Llm(self.calls)

    def sync_weights(self) -> None:
        hooks._sync_weights(lambda: self.calls.append("stock sync"), self, (), {})

    def generate(self) -> Any:
        return hooks._generate(self._generate, self, (), {})

    def _generate(self) -> str:
        if self.enable_sleep_mode:
            self.llm.collective_rpc("reload_weights")
        self.calls.append("rollout")
        return "rollouts"


class Session:
    """repairs: how often ``after_rollout`` asks for the rollouts again."""

    def __init__(self, generation: Generation) -> None:
        self.calls, self.trainer, self.repairs, self.lost = generation.calls, TrlTrainer(generation), 0, False

    def invalidate_if_lost(self) -> None:
        self.calls.append("invalidate")
        if self.lost:
            self.trainer.sync_again()
            self.lost = False

    def synchronize(self) -> None:
        self.calls.append("sync")

    def after_rollout(self) -> bool:
        self.calls.append("judge")
        self.repairs -= 1
        if self.repairs >= 0:
            self.trainer.sync_again()
        return self.repairs >= 0


@pytest.fixture(params=[False, True], ids=["awake", "sleeps"])
def generation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Generation:
    made = Generation(request.param)
    made.session = Session(made)  # type: ignore[attr-defined]
    monkeypatch.setattr(hooks.sessions, "session_of", lambda trainer: trainer.session)
    return made


def test_a_step(generation: Generation) -> None:
    generation.sync_weights()
    assert generation.generate() == "rollouts"
    wakes = ["wake weights"] if generation.enable_sleep_mode else []
    looks = [] if generation.enable_sleep_mode else ["invalidate"]
    assert generation.calls == ["invalidate", *wakes, "sync", *looks, "rollout", "judge"]


def test_a_second_rollout_of_the_step_is_synced_again_only_after_a_sleep(generation: Generation) -> None:
    generation.sync_weights()
    generation.generate()
    generation.calls.clear()
    generation.generate()
    again = ["invalidate", "wake weights", "sync"] if generation.enable_sleep_mode else ["invalidate"]
    assert generation.calls == [*again, "rollout", "judge"]


def test_what_was_lost_is_sent_before_the_rollout(generation: Generation) -> None:
    if generation.enable_sleep_mode:
        pytest.skip("it is sent in any case")
    generation.sync_weights()
    generation.calls.clear()
    generation.session.lost = True  # type: ignore[attr-defined]
    generation.generate()
    assert generation.calls == ["invalidate", "invalidate", "sync", "rollout", "judge"]


def test_a_repair_makes_the_rollouts_again(generation: Generation) -> None:
    generation.sync_weights()
    generation.session.repairs = 1  # type: ignore[attr-defined]
    generation.generate()
    assert generation.calls.count("rollout") == generation.calls.count("judge") == 2
    assert generation.calls.count("sync") == 2 and generation.calls.index("judge") < generation.calls.index("sync", 3)


def test_trls_own_sync_inside_of_ours_is_let_through(generation: Generation) -> None:
    generation.session.trainer.is_pushing = True  # type: ignore[attr-defined]
    generation.sync_weights()
    assert generation.calls == ["stock sync"]


def test_without_a_session_stock_trl_runs(generation: Generation) -> None:
    generation.session = None  # type: ignore[attr-defined]
    generation.sync_weights()
    assert generation.generate() == "rollouts"
    assert generation.calls == ["stock sync", *["reload_weights"] * generation.enable_sleep_mode, "rollout"]


@pytest.mark.parametrize(
    "mode, kind, reason",
    [
        ("server", "MULTI_GPU", "before TRL 1.11 servers are TRL's own, which have no LoRA layers"),
        ("server", "FSDP2", "the model is sharded by FSDP2"),
        ("colocate", "FSDP1", "the model is sharded by FSDP1"),
        ("colocate", "DEEPSPEED", "the model is sharded by DeepSpeed ZeRO-3"),
    ],
)
def test_what_is_not_tried_is_left_alone_and_said(
    mode: str, kind: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("swift"), "propagate", True)
    plugin = SimpleNamespace(zero_stage=3) if kind == "DEEPSPEED" else None
    made = Generation(sleeps=False)
    made.mode, made.model = mode, peft_model()  # type: ignore[attr-defined]
    fsdp = SimpleNamespace(fsdp_version=2 if kind == "FSDP2" else 1)
    state = SimpleNamespace(deepspeed_plugin=plugin, fsdp_plugin=fsdp)
    kind_of_accelerate = SimpleNamespace(name=kind.rstrip("12"))
    made.accelerator = SimpleNamespace(distributed_type=kind_of_accelerate, state=state)  # type: ignore[attr-defined]

    def construct(model: Any, accelerator: Any = None, mode: str = "colocate") -> None: ...

    with caplog.at_level(logging.INFO, logger="swift.lora_fix"):
        hooks._make_generation(construct, made, (made.model, made.accelerator), {"mode": mode})  # type: ignore[attr-defined]
    assert len(caplog.messages) == 1 and reason in caplog.messages[0] and "TRL's own weight sync" in caplog.messages[0]
    assert sessions.session_of(made) is None


def test_an_engine_gets_lora_layers_only_while_trl_makes_it_and_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def construct(**kwargs: Any) -> None:
        made.append(kwargs)

    with starting.making_engine({"enable_lora": True}):
        hooks._make_engine(construct, None, (), {"model": "m"})
    hooks._make_engine(construct, None, (), {"model": "m"})
    assert made == [{"model": "m", "enable_lora": True}, {"model": "m"}]
    monkeypatch.setenv("SWIFT_LORA_FIX_MODE", "fused")
    assert hooks._engine_arguments(peft_model()) == {}
    monkeypatch.setenv("SWIFT_LORA_FIX_MODE", "adapter")
    assert hooks._engine_arguments(torch.nn.Linear(2, 2)) == {}, "nothing is served to full-parameter training"


@pytest.mark.parametrize(
    "loaded, swift, trl, patched",
    [
        ((), "4.6.0", "0.29.1", "swift trl"),
        (("trl",), "4.6.0", "0.29.1", "trl"),
        (("trl", "swift"), "4.6.0", "0.29.1", "swift"),
        ((), None, "1.16.0", "trl"),
        ((), "4.6.0", None, "swift"),
        ((), None, None, "swift"),  # which says that ms-swift is missing
    ],
)
def test_apply_patches_whichever_this_script_uses(
    loaded: tuple[str, ...], swift: str | None, trl: str | None, patched: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = applying(loaded, swift, trl, monkeypatch)
    arming.apply()
    assert done == patched.split()


def applying(
    loaded: tuple[str, ...],
    swift: str | None,
    trl: str | None,
    monkeypatch: pytest.MonkeyPatch,
    fails: Mapping[str, Exception] = MappingProxyType({}),
) -> list[str]:
    """A process with these modules and releases. Returns a list of what will be patched. fails: with what, by name."""
    done: list[str] = []

    def patch(name: str) -> None:
        if name in fails:
            raise fails[name]
        done.append(name)

    for name in ("trl", "swift"):
        if name in loaded:
            monkeypatch.setitem(sys.modules, name, sys)
        else:
            monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(arming.releases, "installed_swift", lambda: swift)
    monkeypatch.setattr(arming.releases, "installed_trl", lambda: trl)
    monkeypatch.setattr(arming._trainer, "apply", lambda: patch("swift"))
    monkeypatch.setattr(arming._trl, "apply", lambda: patch("trl"))
    monkeypatch.setattr(arming, "arm", lambda: None)
    return done


def test_an_ms_swift_that_cannot_be_imported_does_not_keep_trl_from_being_patched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ms-swift 4.6.0 beside TRL 1.16.0, which has no trl.experimental.ppo any more."""
    broken = ImportError("cannot import name 'PPOConfig' from 'trl.experimental'")
    done = applying((), "4.6.0", "1.16.0", monkeypatch, {"swift": broken})
    monkeypatch.setattr(logging.getLogger("swift"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="swift.lora_fix"):
        arming.apply()
    assert done == ["trl"] and "TRL alone is patched" in caplog.text
    # what is left of the import that failed is no sign of ms-swift
    monkeypatch.setitem(sys.modules, "swift", sys)
    monkeypatch.setattr(type(arming._trl), "is_instrumented", property(lambda self: self is arming._trl))
    arming.apply()
    assert done == ["trl", "trl"]


def test_where_neither_can_be_patched_the_error_is_ms_swifts(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = ModuleNotFoundError("No module named 'no_such_dependency'")
    without_vllm = UnsupportedReleaseError("LLM.generate is missing")
    applying((), "4.0.1", "0.28.0", monkeypatch, {"swift": broken, "trl": without_vllm})
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        arming.apply()


def test_a_trl_that_is_too_old_does_not_keep_ms_swift_from_being_patched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    too_old = UnsupportedReleaseError("TRL 0.24.0 is older than 0.28.0")
    done = applying((), "3.10.3", "0.24.0", monkeypatch, {"trl": too_old})
    monkeypatch.setattr(logging.getLogger("swift"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="swift.lora_fix"):
        arming.apply()
    assert done == ["swift"] and "TRL's own trainers, if this script has any, are not patched" in caplog.text
