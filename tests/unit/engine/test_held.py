"""A base that the engine holds quantised is proved from the model's files, and never sent."""

from __future__ import annotations

import importlib.util
import json
import logging
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


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("swift"), "propagate", True)
    caplog.set_level(logging.INFO, logger="swift.lora_fix")
    return caplog


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
    return writer_with(model, folder, {**held, **changes}, kind)


def writer_with(model: torch.nn.Module, folder: Path, held: dict[str, torch.Tensor], kind: str | None) -> Any:
    save_file(held, folder / "model.safetensors")
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


class Packed(torch.nn.Module):
    """A linear layer as gptqmodel has it: all in buffers, the zeros one higher than GPTQ's files have them, floats in
    the files' dtype, whatever the model's."""

    def __init__(self, held: dict[str, torch.Tensor], raised: bool) -> None:
        super().__init__()
        for name, value in held.items():
            value = value + 0x11111111 if raised and name == "qzeros" else value.clone()
            self.register_buffer(name, value)
        self.register_buffer("shifts", torch.arange(0, 32, 4), persistent=False)


def packed_writer_of(model: torch.nn.Module, folder: Path, how: str = "gptq", **changes: torch.Tensor) -> Any:
    """Its files hold the linear layers packed, and the trainer what gptqmodel makes of these."""
    held: dict[str, torch.Tensor] = {}
    for name in ("first", "second"):
        layer = model.base_model.model.get_submodule(name)
        width, inputs = layer.base_layer.weight.shape
        packed = {
            "qweight": torch.randint(-(2**31), 2**31, (inputs // 4, width)).int(),
            "qzeros": torch.randint(0, 2**27, (2, width)).int(),
            "scales": torch.rand(2, 8 * width).half(),
            "bias": torch.rand(width).half(),
        }
        held.update({f"{name}.{kind}": value for kind, value in packed.items()})
        layer.base_layer = Packed(packed, how == "gptq")
    for name, parameter in adapters.frozen_parameters(model):
        held[name.removeprefix("base_model.model.")] = parameter.data.clone()
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": how}}))
    return writer_with(model, folder, {**held, **changes}, f"auto_{how}")


@pytest.mark.parametrize("how", ["gptq", "awq"])
def test_packed_weights_are_compared_as_a_trainer_holds_them(
    model: torch.nn.Module, tmp_path: Path, how: str, said: pytest.LogCaptureFixture
) -> None:
    record = packed_writer_of(model, tmp_path, how).send_base()
    count = len(adapters.frozen_parameters(model)) + 8
    assert f"{count} of the trainer's {count} base tensors bit for bit" in said.text
    assert not record.trainer_differences()
    model.base_model.model.second.base_layer.qweight[0, 0] ^= 1
    assert [name.split(".")[-1] for name in record.trainer_differences()] == ["qweight"]


@pytest.mark.parametrize("how", ["gptq", "awq"])
@pytest.mark.parametrize("kind", ["qweight", "qzeros", "scales", "bias"])
def test_packed_weights_that_differ_are_refused_by_name(
    model: torch.nn.Module, tmp_path: Path, how: str, kind: str
) -> None:
    writer = packed_writer_of(model, tmp_path, how)
    value = getattr(model.base_model.model.first.base_layer, kind)
    value.view(torch.int16)[0] ^= 1
    with pytest.raises(errors.BaseMismatchError, match=rf"quantised \(auto_{how}\).* 1 of .*first.*{kind}"):
        writer.send_base()


@pytest.mark.parametrize("field", ["checkpoint_format", "format"])
def test_zeros_are_one_lower_in_the_first_format_alone(model: torch.nn.Module, tmp_path: Path, field: str) -> None:
    writer = packed_writer_of(model, tmp_path)
    how = {"quant_method": "gptq", field: "gptq_v2"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": how}))
    with pytest.raises(errors.BaseMismatchError, match=" 2 of .*qzeros"):
        writer.send_base()


def test_a_name_that_trainer_and_files_share_stands_for_both_forms_of_a_weight() -> None:
    answer = {"w": ["int8", [2], 1], "w*": ["bfloat16", [2], 2]}
    found = [model_files.compared({"w": (torch.bfloat16, (2,), value)}, answer) for value in (1, 2, 3)]
    assert found == [([], []), ([], []), (["w"], [])]


def test_a_layer_that_its_kernel_packed_anew_is_not_compared(
    model: torch.nn.Module, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    """As gptqmodel does for a CPU, in the first forward of an evaluation."""
    writer = packed_writer_of(model, tmp_path)
    layer = model.base_model.model.first.base_layer
    layer.qweight, layer.qzeros = layer.qweight.view(torch.uint8), torch.zeros_like(layer.scales)
    record = writer.send_base()
    assert "2 of 11 base tensors have another layout" in said.text
    layer = model.base_model.model.second.base_layer
    layer.qweight, layer.qzeros = layer.qweight.view(torch.uint8), torch.zeros_like(layer.scales)
    assert not record.trainer_differences()


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed")
@pytest.mark.parametrize("kind, tensors", [("qwen2_gptq", 69), ("qwen2_awq", 55)])
def test_what_gptqmodel_makes_of_such_files_is_proved(tmp_path: Path, kind: str, tensors: int) -> None:
    models.BASES[kind].make(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    made = get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"]))
    files = model_files.base_sums(str(tmp_path), torch.bfloat16)
    sums = model_files.trainer_sums(made, adapters.bind(made), torch.device("cpu"))
    assert len(sums) == tensors and model_files.compared(sums, files) == ([], [])
    with torch.no_grad():
        made.eval()(torch.tensor([[1, 2, 3]]))
    sums = model_files.trainer_sums(made, adapters.bind(made), torch.device("cpu"))
    differing, elsewhere = model_files.compared(sums, files)
    assert not differing and len(elsewhere) >= 2 * 14
