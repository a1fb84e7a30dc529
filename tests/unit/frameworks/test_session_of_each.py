"""The same session behind the port of each framework: what it sends, what it leaves alone, what it says afterwards.

The trainers are stand-ins that push weights as the frameworks do: merge, load, unmerge.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swift_lora_fix.frameworks.swift.port import SwiftTrainer
from swift_lora_fix.frameworks.trl import port as trl
from swift_lora_fix.session import Phase, Session
from tests.support.fakes.engine import Accelerator, FakeEngine, planned
from tests.support.peft_models import peft_model


class Trainer:
    """What both frameworks' trainers have. ``fails``: its engine takes no weight."""

    def __init__(self, engine: FakeEngine, folder: Path) -> None:
        self.model, self.accelerator, self.fails, self.merged = peft_model(), Accelerator(), False, False
        self.state, self._metrics = SimpleNamespace(global_step=0), {"train": defaultdict(list)}
        self.args = SimpleNamespace(output_dir=str(folder), resume_from_checkpoint=None)
        self.vllm = engine
        self.model.train()

    def push(self, load: Any) -> None:
        self.model.merge_adapter()
        self.merged = self.model.base_model.model.first.merged
        weights = {
            trl.trl_name(name): parameter.data
            for name, parameter in self.model.named_parameters()
            if "lora_" not in name and "original_module" not in name
        }
        if self.fails:
            raise RuntimeError("vLLM is out of memory")
        load(weights)
        self.model.unmerge_adapter()


class RolloutTrainerMixin:
    """Its module is where ms-swift has its kind of request."""


TensorLoRARequest = object


class OfSwift(RolloutTrainerMixin, Trainer):
    """By the names that ms-swift's trainer has."""

    vllm_mode, rollout_enable_lora, enable_offload, _last_loaded_step = "colocate", True, False, 0

    def __init__(self, engine: FakeEngine, folder: Path) -> None:
        super().__init__(engine, folder)
        vars(self.args).update(use_vllm=True, tuner_type="lora", sleep_level=0, async_generate=False)
        self.engine = SimpleNamespace(engine=engine, enable_lora=True)

    def _load_state_dict_to_vllm(self, weights: Any) -> None:
        self.vllm.model.load(weights)

    def _move_adapter_to_vllm(self) -> None:
        raise AssertionError("the adapter goes another way")

    def _move_full_model_to_vllm(self) -> None:
        self.push(self._load_state_dict_to_vllm)

    def port(self) -> Any:
        return SwiftTrainer(self)

    def syncs_again(self, port: Any) -> bool:
        return self._last_loaded_step == -1


class OfTrl(Trainer):
    """By the names that TRL's trainer and its ``VLLMGeneration`` have."""

    def __init__(self, engine: FakeEngine, folder: Path) -> None:
        super().__init__(engine, folder)
        trl.note_trainer(self)
        self.generation = Generation(self)

    def port(self) -> Any:
        return trl.TrlTrainer(self.generation)

    def syncs_again(self, port: Any) -> bool:
        return bool(port.must_sync)


class Generation:
    mode, enable_sleep_mode = "colocate", False

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self.model, self.accelerator = trainer, trainer.model, trainer.accelerator
        self.llm = SimpleNamespace(llm_engine=trainer.vllm)

    def sync_weights(self) -> None:
        self._trainer.push(lambda weights: self.llm.llm_engine.model.load_weights(weights.items()))


@pytest.fixture(params=[OfSwift, OfTrl], ids=["ms-swift", "TRL"])
def trainer(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.setenv("SWIFT_LORA_FIX_GATE_EVERY", "0")  # the model speaks no language
    made: Trainer = request.param(FakeEngine(), tmp_path)
    return made


def session_of(trainer: Any) -> Session:
    """With the writer's plan known, as after a first load through vLLM."""
    return planned(Session(trainer.port(), "adapter"))


def bits(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def roll_out(session: Session) -> None:
    session.before_rollout(SimpleNamespace(has_requests=True, has_media=False, most_tokens=1))  # type: ignore[arg-type]


def test_the_base_goes_once_and_unmerged_and_the_adapter_at_each_step(trainer: Trainer) -> None:
    session, before = session_of(trainer), bits(trainer)
    session.synchronize()
    first = session.slot.clone()  # type: ignore[attr-defined]
    base = trainer.vllm.model.first.weight
    assert torch.equal(base, before["base_model.model.first.base_layer.weight"]) and first.any()
    assert not trainer.merged and all(torch.equal(value, before[name]) for name, value in bits(trainer).items())
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                parameter.mul_(2)
        base.zero_()
    trainer.state.global_step = 1
    session.synchronize()
    assert not base.any() and session.base_pushes == 1, "not again"
    assert torch.equal(session.slot, 2 * first)  # type: ignore[attr-defined]
    assert (session.served_step, session.syncs) == (1, 2)


def test_what_is_found_goes_where_the_framework_logs(trainer: Trainer) -> None:
    session = session_of(trainer)
    session.synchronize()
    roll_out(session)
    assert session.phase is Phase.EXAMINED
    assert trainer._metrics["train"]["lora_sync/policy_step"] == [0]


def test_a_push_that_fails_leaves_the_trainer_as_it_was(trainer: Trainer) -> None:
    session, before, trainer.fails = session_of(trainer), bits(trainer), True
    with pytest.raises(RuntimeError, match="out of memory"):
        session.synchronize()
    assert not trainer.merged and all(torch.equal(value, before[name]) for name, value in bits(trainer).items())
    with pytest.raises(Exception, match="no sync has completed"):
        roll_out(session)


def test_after_a_sleep_whose_loss_nobody_could_tell_the_framework_syncs_again(trainer: Any) -> None:
    session = session_of(trainer)
    session.synchronize()
    assert not trainer.syncs_again(session.trainer)
    session.writer.slots.expected = None  # type: ignore[union-attr]  # vLLM's own loader wrote
    trainer.vllm.model_executor.is_sleeping = True
    session.invalidate_if_lost()
    assert session.phase is Phase.BASE_HELD and trainer.syncs_again(session.trainer)
