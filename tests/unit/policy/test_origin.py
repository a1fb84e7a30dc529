"""Where the adapter came from: real PEFT models and real checkpoint folders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from swift_lora_fix import errors
from swift_lora_fix.policy import adapter, files, origin
from tests.support.peft_models import Tiny, peft_model


def decide(model: torch.nn.Module, resume: Path | None = None, step: int = 0) -> origin.AdapterOrigin:
    bound = adapter.bind(model)
    claimed = str(resume) if resume else None
    return origin.determine(model, bound, adapter.read_to_host(bound, torch.device("cpu")), claimed, step)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-7"
    peft_model(seed=1).save_pretrained(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 7}))
    return folder


def test_from_scratch() -> None:
    found = decide(peft_model(zero_b=True))
    assert (found.kind, found.path, found.b_is_zero) == ("scratch", None, True)
    assert "LoRA weights from scratch" in str(found) and "every lora_B is zero" in str(found)


def test_from_scratch_with_an_embedding() -> None:
    """PEFT begins with A of zero there."""
    model = get_peft_model(Tiny(), LoraConfig(r=4, target_modules=["first", "embed"]))
    assert decide(model).kind == "scratch"
    with torch.no_grad():
        model.get_parameter("base_model.model.embed.lora_embedding_A.default").normal_()
    assert decide(model).kind == "memory"


def test_a_model_that_was_trained_since_it_was_loaded_need_not_hold_its_file(checkpoint: Path) -> None:
    """SFT, then GRPO of the same model: its trainer begins at step 0."""
    model = peft_model(seed=2)
    origin.record_load(model, "default", checkpoint)
    with pytest.raises(errors.ResumeMismatchError):
        decide(model)
    origin.note_trained(model)
    found = decide(model)
    assert found.kind == "adapters" and not found.compared and "not compared: already trained" in str(found)
    with pytest.raises(errors.ResumeMismatchError):
        decide(model, checkpoint, step=7)
    origin.record_load(model, "default", checkpoint)
    with pytest.raises(errors.ResumeMismatchError):
        decide(model)


def test_weights_that_no_file_explains() -> None:
    assert decide(peft_model()).kind == "memory"


def test_resume(checkpoint: Path) -> None:
    model = peft_model(seed=1)
    found = decide(model, checkpoint, step=7)
    expected = hashlib.sha256((checkpoint / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert (found.kind, found.step, found.sha256, found.compared) == ("resume", 7, expected, True)
    norm = torch.stack([p.detach().float().norm() for n, p in model.named_parameters() if "lora_" in n]).norm()
    assert found.norm == pytest.approx(float(norm)) and not found.b_is_zero


def test_adapters_is_what_peft_loaded(checkpoint: Path) -> None:
    model = peft_model(seed=1)
    origin.record_load(model, "default", checkpoint)
    origin.record_load(model, "ref_adapter", "/some/sft")
    found = decide(model)
    assert (found.kind, found.path, found.reference, found.compared) == ("adapters", str(checkpoint), "/some/sft", True)


def test_a_rollout_that_comes_after_training_steps_is_not_compared(checkpoint: Path) -> None:
    found = decide(peft_model(seed=2), checkpoint, step=9)
    assert not found.compared and "not compared: already trained" in str(found)


def test_a_bf16_file_for_an_fp32_adapter_is_equal(checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = checkpoint / "adapter_model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file)
    model = peft_model(seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(parameter.bfloat16())
    assert decide(model, checkpoint, step=7).compared


def test_an_empty_adapter_under_a_resume_is_an_error_that_names_both(checkpoint: Path) -> None:
    with pytest.raises(errors.ResumeMismatchError) as caught:
        decide(peft_model(seed=1, zero_b=True), checkpoint, step=7)
    text = str(caught.value)
    assert str(checkpoint) in text and "every lora_B zero" in text and "lora_B.weight differs" in text
    assert text.count("LoRA norm") == 2


def test_another_adapter_under_a_resume_is_an_error(checkpoint: Path) -> None:
    with pytest.raises(errors.ResumeMismatchError, match="4 of 4 tensors disagree"):
        decide(peft_model(seed=2), checkpoint, step=7)
    with pytest.raises(errors.ResumeMismatchError, match="is not in the file"):
        decide(peft_model(seed=1, target_modules=["embed", "first", "second"]), checkpoint, step=7)
    with pytest.raises(errors.ResumeMismatchError, match=r"is \(4, 8\) in the file, \(2, 8\) in the run"):
        decide(peft_model(seed=1, r=2), checkpoint, step=7)


def test_a_folder_that_is_missing_or_corrupt_is_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.AdapterFileError, match="does not exist"):
        decide(peft_model(), tmp_path / "nowhere")
    file = checkpoint / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(errors.AdapterFileError, match="adapter_model.safetensors cannot be read"):
        decide(peft_model(seed=1), checkpoint, step=7)
    file.unlink()
    with pytest.raises(errors.AdapterFileError, match="has no adapter_model.safetensors"):
        decide(peft_model(seed=1), checkpoint, step=7)
    (checkpoint / "adapter_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(errors.AdapterFileError, match="adapter_model.bin cannot be read"):
        decide(peft_model(seed=1), checkpoint, step=7)


def test_a_resume_that_loaded_nothing_at_all_is_an_error(checkpoint: Path) -> None:
    """Neither weights nor step: the trainer stands at step 0, the checkpoint at 7."""
    with pytest.raises(errors.ResumeMismatchError, match="every lora_B zero"):
        decide(peft_model(seed=1, zero_b=True), checkpoint, step=0)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"")

    def denied(self: Path, *_: object) -> object:  # root may read everything
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(errors.AdapterFileError, match=f"{file} cannot be read.*Permission denied"):
        files.sha256_of(file)
