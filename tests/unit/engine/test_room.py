"""What the engine is started with, so that vLLM's LoRA layers hold the adapter."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from swift_lora_fix.engine.vllm import room
from swift_lora_fix.engine.vllm.fitting import TOWER_OPTION
from swift_lora_fix.errors import UnsupportedAdapterError
from swift_lora_fix.frameworks.swift.port import SwiftTrainer
from swift_lora_fix.frameworks.swift.words import WORDS
from swift_lora_fix.install import releases
from tests.support.peft_models import peft_model


def test_each_rank_that_we_give_vllm_is_one_that_it_takes() -> None:
    from vllm.config import lora

    known = {int(rank) for rank in lora.MaxLoRARanks.__args__}
    assert set(releases.ENGINE_RANKS) <= known
    assert known - set(releases.ENGINE_RANKS) <= {1}


@pytest.mark.parametrize(
    "asked, config, expected",
    [
        (8, {"r": 8}, 8),
        (12, {"r": 12}, 16),  # no rank of vLLM's
        (8, {"r": 8, "rank_pattern": {"second": 12}}, 16),  # above --lora_rank
        (8, {"r": 40}, 64),  # loaded with --adapters
        (1, {"r": 1}, 8),
        (16, {"r": 4}, 16),  # more room than it needs, as its user asked
    ],
)
def test_the_rank_is_the_next_one_that_vllm_takes(asked: int, config: dict[str, Any], expected: int) -> None:
    assert room.needed(peft_model(**config), "default", asked, WORDS).rank == expected


def test_more_than_vllm_has_room_for_is_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedAdapterError, match="rank 512 at most.*has rank 600.*--vllm_enable_lora false"):
        room.needed(peft_model(r=600), "default", 8, WORDS)


class Sighted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "sighted"}
        self.visual = torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 8)})
        self.layer = torch.nn.Linear(8, 8)


def sighted(*targets: str) -> Any:
    return get_peft_model(Sighted(), LoraConfig(r=4, target_modules=list(targets)))


def test_towers_are_asked_for_where_the_adapter_reaches_them_and_vllm_can() -> None:
    from vllm.engine.arg_utils import EngineArgs

    can = TOWER_OPTION in {option.name for option in dataclasses.fields(EngineArgs)}
    assert room.needed(sighted("visual.proj", "layer"), "default", 8, WORDS).towers is can
    assert not room.needed(sighted("layer"), "default", 8, WORDS).towers


def trainer_of(model: Any, **arguments: Any) -> Any:
    args = SimpleNamespace(
        **{"tuner_type": "lora", "vllm_mode": "colocate", "vllm_enable_lora": True, "lora_rank": 12, **arguments}
    )
    accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    return type("Trainer", (), {})(), args, accelerator, model


def made(model: Any, **arguments: Any) -> tuple[Any, Any]:
    trainer, args, accelerator, model = trainer_of(model, vllm_engine_kwargs=None, **arguments)
    trainer.args, trainer.accelerator, trainer.model = args, accelerator, model
    return trainer, args


def test_ms_swift_reads_the_room_and_gets_its_own_arguments_back() -> None:
    trainer, args = made(sighted("visual.proj"))
    before = dict(vars(args))
    with SwiftTrainer(trainer).making_room():
        assert args.lora_rank == 16 and args.vllm_engine_kwargs == {TOWER_OPTION: True}
    assert vars(args) == before


def test_what_the_user_asked_for_stays() -> None:
    trainer, args = made(sighted("visual.proj"))
    args.vllm_engine_kwargs = {TOWER_OPTION: False, "block_size": 32}
    with SwiftTrainer(trainer).making_room():
        assert args.vllm_engine_kwargs == {TOWER_OPTION: False, "block_size": 32}


@pytest.mark.parametrize("off", [{"vllm_enable_lora": False}, {"vllm_mode": "server"}, {"tuner_type": "full"}])
def test_without_lora_layers_in_a_colocated_engine_nothing_is_changed(off: dict[str, Any]) -> None:
    trainer, args = made(sighted("visual.proj"), **off)
    before = dict(vars(args))
    with SwiftTrainer(trainer).making_room():
        assert vars(args) == before
