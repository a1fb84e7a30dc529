"""A base that the engine holds quantised is proved from the model's files, and never sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from swift_lora_fix import errors
from swift_lora_fix.engine.vllm.colocated import AdapterModeWriter
from swift_lora_fix.engine.vllm.handle import EngineHandle
from swift_lora_fix.policy import adapter as adapters
from swift_lora_fix.policy import model_files
from tests.matrix import models
from tests.support.fakes.trainer import port_of
from tests.support.peft_models import peft_model
from tests.unit.test_session import FakeEngine

ROWS = 4  # of a block


@pytest.fixture
def model() -> torch.nn.Module:
    return peft_model().to(torch.bfloat16)


def in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In FP8, a scale for each block of rows, and what it stands for."""
    scales = torch.linspace(0.1, 0.3, len(weight) // ROWS)[:, None]
    rows = scales.repeat_interleave(ROWS, 0)
    held = (weight.float() / rows).to(torch.float8_e4m3fn)
    return held, scales, (held.float() * rows).to(torch.bfloat16)


def writer_of(model: torch.nn.Module, folder: Path, kind: str | None = "fp8", **changes: torch.Tensor) -> Any:
    """Its files hold the linear layers in blocks of FP8, and the trainer holds what these stand for."""
    held: dict[str, torch.Tensor] = {}
    for name, parameter in adapters.frozen_parameters(model):
        plain = name.replace(".base_layer", "").removeprefix("base_model.model.")
        if plain in ("first.weight", "second.weight"):
            held[plain], held[f"{plain}_scale_inv"], parameter.data = in_blocks(parameter.data)
        else:
            held[plain] = parameter.data.clone()
    save_file({**held, **changes}, folder / "model.safetensors")
    engine = FakeEngine()
    vars(engine.vllm_config.model_config).update(quantization=kind, model=str(folder), dtype=torch.bfloat16)
    sent: list[Any] = []
    trainer = port_of(model, llm=engine, take=sent.append)
    made = AdapterModeWriter(trainer, EngineHandle(engine), adapters.bind(model), True)
    made.sent, made.port, made.fake = sent, trainer, engine  # type: ignore[attr-defined]
    return made


def test_the_files_prove_it_and_nothing_is_sent(model: torch.nn.Module, tmp_path: Path) -> None:
    writer = writer_of(model, tmp_path)
    record = writer.send_base()
    assert not writer.sent and record.parameters == 3
    assert not record.engine_differences() and not record.trainer_differences()
    assert not writer.send_base().engine_differences(), "a repair finds it as it was"
    writer.fake.model.first.weight.data[0, 0] += 1
    assert record.engine_differences() == ["first.weight"]
    with pytest.raises(errors.EngineStateError, match="not what it loaded any more .first.weight.*sleep level"):
        writer.send_base()


def test_a_trainer_that_holds_fp8_is_compared_as_it_is(model: torch.nn.Module, tmp_path: Path) -> None:
    writer = writer_of(model, tmp_path)
    for name in ("first", "second"):
        layer = model.base_model.model.get_submodule(name).base_layer
        layer.weight = torch.nn.Parameter(in_blocks(layer.weight.data)[0], requires_grad=False)
    assert writer.send_base().parameters == 3


@pytest.mark.parametrize("kind", ["qwen2_fp8", "qwen2_int8"])
def test_what_transformers_makes_of_such_files_is_proved_before_and_after_its_first_forward(
    tmp_path: Path, kind: str
) -> None:
    """On a CPU it reads FP8 as bfloat16, and INT8 as it is until the first forward."""
    if not hasattr(transformers, "GgufConfig"):
        pytest.skip("older releases want a GPU for FP8")
    models.BASES[kind].make(tmp_path)
    files = model_files.base_sums(str(tmp_path), torch.bfloat16)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    made = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    for _ in range(2):
        sums = model_files.trainer_sums(made, adapters.bind(made), torch.device("cpu"))
        assert len(sums) >= 27 and model_files.compared(sums, files) == ([], [])
        made(torch.tensor([[1, 2, 3]]))
    layer = base.model.layers[1].mlp.up_proj
    layer.weight.data.view(torch.int16)[0, 0] ^= 1
    sums = model_files.trainer_sums(made, adapters.bind(made), torch.device("cpu"))
    assert len(model_files.compared(sums, files)[0]) == 1


@pytest.mark.parametrize(
    "name, change",
    [
        ("first.weight", torch.zeros(12, 8).to(torch.float8_e4m3fn)),
        ("second.weight_scale_inv", torch.ones(1, 1)),
        ("embed.weight", torch.zeros(10, 8, dtype=torch.bfloat16)),
    ],
)
def test_a_base_that_differs_is_refused_by_name(
    model: torch.nn.Module, tmp_path: Path, name: str, change: torch.Tensor
) -> None:
    writer = writer_of(model, tmp_path, **{name: change})
    with pytest.raises(errors.BaseMismatchError, match=rf"quantised \(fp8\).*cannot be sent.* 1 of .*{name[:5]}"):
        writer.send_base()
    assert not writer.sent


def test_files_in_which_nothing_can_be_compared_are_no_proof(model: torch.nn.Module, tmp_path: Path) -> None:
    writer = writer_of(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(errors.BaseMismatchError, match="cannot be sent"):
        writer.send_base()


def test_random_weights_are_refused(model: torch.nn.Module, tmp_path: Path) -> None:
    writer = writer_of(model, tmp_path)
    writer.fake.vllm_config.load_config.load_format = "dummy"
    with pytest.raises(errors.EngineStateError, match="random weights"):
        writer.send_base()


@pytest.mark.parametrize("kind", [None, "bitsandbytes"])
def test_any_other_base_is_sent(model: torch.nn.Module, tmp_path: Path, kind: str | None) -> None:
    writer = writer_of(model, tmp_path, kind)
    writer.send_base()
    assert writer.sent
