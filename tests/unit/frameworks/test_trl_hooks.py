"""The order in which TRL's hooks call the session, with an engine that sleeps after rollouts and one that does not."""

from __future__ import annotations

from typing import Any

import pytest

from swift_lora_fix.frameworks.trl import hooks
from swift_lora_fix.frameworks.trl.port import TrlTrainer


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
