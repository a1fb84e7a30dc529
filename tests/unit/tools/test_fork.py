"""Forks of real PEFT adapters: which source, whether it fits, what is written, and that a failure leaves nothing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from swift_lora_fix import cli, errors
from swift_lora_fix.policy import adapter
from swift_lora_fix.policy.files import check_fork, sha256_of
from swift_lora_fix.tools.fork import Fork, fork
from tests.support.environments import Environment
from tests.support.peft_models import Tiny, peft_model
from tests.unit.policy.test_origin import decide

WEIGHTS, CONFIG, STATE = "adapter_model.safetensors", "adapter_config.json", "trainer_state.json"
TRAINER_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def make_base(folder: Path, model: torch.nn.Module | None = None, **renamed: str) -> Path:
    """A base model's folder. ``renamed``: tensors under another name, as files have them."""
    folder.mkdir()
    tensors = {renamed.get(name, name): value for name, value in (model or Tiny()).state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def make_adapter(folder: Path, base: object, step: int | None = None, **config: Any) -> Path:
    """An adapter as PEFT and, with a step, the Trainer leave it."""
    peft_model(**{"seed": 1, **config}).save_pretrained(folder)
    update(folder / CONFIG, base_model_name_or_path=str(base))
    (folder / "args.json").write_text(json.dumps({"model": str(base), "model_dir": str(base)}))
    (folder / "additional_config.json").write_text(json.dumps({"lora_dtype": None, "lorap_lr_ratio": None}))
    if step is not None:
        (folder / STATE).write_text(json.dumps({"global_step": step}))
        for name in TRAINER_FILES:
            torch.save({"of": step}, folder / name)
    return folder


def update(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def rewrite(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """The weights file, each tensor changed."""
    tensors = {name: change(name, tensor).contiguous() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def words(made: Fork) -> str:
    return "\n".join(made.notes)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def run(tmp_path: Path, base: Path) -> Path:
    """An output folder with checkpoints 2, 4 and 10."""
    for step in (2, 4, 10):
        make_adapter(tmp_path / "run" / f"checkpoint-{step}", base, step, seed=step)
    (tmp_path / "run" / "last-checkpoint").symlink_to("checkpoint-10")
    return tmp_path / "run"


@pytest.fixture
def one(run: Path) -> Path:
    return run / "checkpoint-10"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "forks").mkdir()
    return tmp_path / "forks" / "new"


def assert_nothing_left(target: Path) -> None:
    assert list(target.parent.iterdir()) == []


def assert_refused(
    error: type[errors.SwiftLoraFixError], match: str, source: Path, target: Path, **options: Any
) -> None:
    before = sorted((path, path.lstat().st_mtime_ns) for path in source.rglob("*"))
    with pytest.raises(error, match=match):
        fork(source, target, **options)
    assert_nothing_left(target)
    assert sorted((path, path.lstat().st_mtime_ns) for path in source.rglob("*")) == before, "the source is only read"


# ---- which source --------------------------------------------------------------------------------------------------


def test_the_latest_checkpoint_of_a_run_byte_for_byte(run: Path, target: Path, base: Path) -> None:
    made = fork(run, target)
    source = run / "checkpoint-10"
    assert (made.source.folder, made.source.step, made.target) == (source, 10, target)
    for name in (WEIGHTS, CONFIG, "additional_config.json", "args.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes(), name
    assert sorted(path.name for path in target.iterdir()) == sorted(
        [WEIGHTS, CONFIG, "additional_config.json", "args.json", "fork_provenance.json"]
    )
    assert made.command == f"--model {base} --adapters {target}"
    assert "the shapes of 2 of 2 target modules agree" in words(made) and "float32" in words(made)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda folder: truncate(folder / WEIGHTS), f"{WEIGHTS} cannot be read, it is corrupt or half-written"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 500), "corrupt or half-written"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), "corrupt or half-written"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
        (lambda folder: (folder / CONFIG).unlink(), f"has no {CONFIG}"),
        (lambda folder: truncate(folder / CONFIG), f"{CONFIG} cannot be read"),
        (lambda folder: (folder / STATE).unlink(), f"has no {STATE}, which is written last"),
        (lambda folder: truncate(folder / STATE), f"{STATE} cannot be read"),
        (lambda folder: truncate(folder / "optimizer.pt"), "optimizer.pt cannot be read"),
    ],
)
def test_an_interrupted_save_is_passed_over_in_words_and_alone_an_error(
    run: Path, target: Path, damage: Callable[[Path], None], why: str
) -> None:
    damage(run / "checkpoint-10")
    assert_refused(errors.AdapterFileError, why, run / "checkpoint-10", target)
    assert_refused(errors.AdapterFileError, why, run, target, step=10)
    made = fork(run, target)
    assert made.source.step == 4
    assert f"passed over {run / 'checkpoint-10'}, which is incomplete: " in words(made) and why in words(made)


def test_a_run_with_nothing_complete_says_why_of_each(run: Path, target: Path) -> None:
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / STATE).unlink()
    with pytest.raises(errors.AdapterFileError) as caught:
        fork(run, target)
    assert all(f"checkpoint-{step}" in str(caught.value) for step in (2, 4, 10))
    assert_refused(errors.AdapterFileError, "does not exist", run / "nowhere", target)


def test_the_newest_run_that_has_a_complete_checkpoint(tmp_path: Path, base: Path, target: Path) -> None:
    output = tmp_path / "output"
    make_adapter(output / "v2-20260102-000000" / "checkpoint-30", base, 30)
    make_adapter(output / "v9-20260103-000000" / "checkpoint-20", base, 20)
    make_adapter(output / "v10-20260104-000000" / "checkpoint-5", base, 5)
    (output / "v11-20260105-000000").mkdir()
    truncate(output / "v10-20260104-000000" / "checkpoint-5" / WEIGHTS)
    made = fork(output, target)
    assert made.source.folder == output / "v9-20260103-000000" / "checkpoint-20"
    assert f"of 4 runs the newest with a complete checkpoint: {output / 'v9-20260103-000000'}" in words(made)
    assert "v10-20260104-000000/checkpoint-5, which is incomplete" in words(made)
    assert f"passed over {output / 'v11-20260105-000000'}: it has no checkpoint" in words(made)
    assert fork(output, target.with_name("step"), step=30).source.folder.parent.name == "v2-20260102-000000"


def test_checkpoints_in_two_places_must_be_named(run: Path, base: Path, target: Path) -> None:
    make_adapter(run / "v0-20260101-000000" / "checkpoint-1", base, 1)
    assert_refused(errors.ForkError, "name one", run, target)


def test_one_step(run: Path, target: Path) -> None:
    assert fork(run, target, step=4).source.step == 4
    assert fork(run / "checkpoint-2", target.with_name("same"), step=2).source.step == 2
    with pytest.raises(errors.ForkError, match="--step 3 was asked for, but .*checkpoint-2 is of step 2"):
        fork(run / "checkpoint-2", target.with_name("other"), step=3)
    with pytest.raises(errors.AdapterFileError, match="has no complete checkpoint-3"):
        fork(run, target.with_name("other"), step=3)


def test_a_link_to_a_checkpoint_is_that_checkpoint(run: Path, target: Path) -> None:
    assert fork(run / "last-checkpoint", target).source.folder == run / "checkpoint-10"


@pytest.fixture
def art(tmp_path: Path, base: Path) -> Path:
    """A model of ART's as its issue 651 describes it: register() made an empty 0000, a fork put 0686 beside it."""
    steps = tmp_path / ".art" / "project" / "models" / "mine" / "checkpoints"
    for name, empty in (("0000", True), ("0685", False), ("0686", False)):
        (make_adapter(steps / name, base, zero_b=empty, seed=int(name)) / "args.json").unlink()
    return steps.parent


def test_the_latest_step_of_arts_folders_and_never_the_empty_one(art: Path, target: Path) -> None:
    steps = art / "checkpoints"
    for number, source in enumerate((art, steps, steps / "0686")):
        made = fork(source, target.with_name(f"art{number}"))
        assert (made.source.folder, made.source.step) == (steps / "0686", 686)
        assert json.loads((made.target / "fork_provenance.json").read_text())["step"] == 686
    made = fork(art, target.with_name("one"), step=685)
    assert made.source.folder == steps / "0685" and made.source.sha256 == sha256_of(steps / "0685" / WEIGHTS)
    truncate(steps / "0686" / WEIGHTS)
    assert "0686, which is incomplete" in words(fork(art, target.with_name("interrupted")))


def test_an_empty_step_of_arts_is_named_and_not_taken(art: Path, target: Path) -> None:
    steps = art / "checkpoints"
    why = "0000: every lora_B in it is zero, the empty adapter that ART's register\\(\\) makes"
    assert_refused(errors.AdapterFileError, why, art, target, step=0)
    assert_refused(errors.ForkError, "Every lora_B of .*0000", steps / "0000", target)
    (steps / "0685").rename(steps.parent / "elsewhere")
    (steps / "0686").rename(steps / "0001")
    make_adapter(steps / "0002", art.parents[3] / "base", zero_b=True)
    made = fork(art, target)
    assert made.source.step == 1 and "passed over" in words(made) and "0002: every lora_B in it is zero" in words(made)
    shutil.rmtree(steps / "0001")
    shutil.rmtree(target)
    assert_refused(errors.AdapterFileError, why, art, target)


def test_any_peft_lora_folder(tmp_path: Path, base: Path, target: Path) -> None:
    source = make_adapter(tmp_path / "sft", base)
    (source / "args.json").unlink()
    assert fork(source, target).source.step is None
    assert check_fork(target / WEIGHTS, sha256_of(target / WEIGHTS)) == f"a fork of {source}"
    with pytest.raises(errors.ForkError, match="a bare adapter without a step"):
        fork(source, target.with_name("other"), step=1)


def test_a_torch_file_becomes_safetensors(tmp_path: Path, base: Path, target: Path) -> None:
    source = make_adapter(tmp_path / "sft", base)
    tensors = load_file(source / WEIGHTS)
    (source / WEIGHTS).unlink()
    torch.save(tensors, source / "adapter_model.bin")
    fork(source, target, dtype="bf16")
    forked = load_file(target / WEIGHTS)
    assert all(torch.equal(forked[name], tensor.bfloat16()) for name, tensor in tensors.items())
    truncate(source / "adapter_model.bin")
    with pytest.raises(errors.AdapterFileError, match="adapter_model.bin cannot be read"):
        fork(source, target.with_name("other"))


def test_what_is_no_lora(one: Path, target: Path) -> None:
    update(one / CONFIG, peft_type="ADALORA")
    assert_refused(errors.UnsupportedAdapterError, "'ADALORA', not 'LORA'", one, target)


# ---- does it fit the base ------------------------------------------------------------------------------------------


def test_a_foreign_architecture(one: Path, target: Path, tmp_path: Path) -> None:
    class Wider(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(8, 16, bias=False)
            self.second = torch.nn.Linear(16, 4, bias=False)

    wider = make_base(tmp_path / "wider", Wider())
    message = (
        r"first is for a weight of \[12, 8\], it has \[16, 8\]; second is for a weight of \[4, 12\], it has \[4, 16\]"
    )
    assert_refused(errors.ForkError, message, one, target, base=str(wider))
    other = make_base(tmp_path / "other", torch.nn.ModuleDict({"wholly": torch.nn.Linear(3, 3)}))
    assert_refused(errors.ForkError, "2 of 2 target modules disagree: first is not in it", one, target, base=str(other))


def test_the_base_is_found_by_its_name_and_by_its_headers(one: Path, target: Path, tmp_path: Path, base: Path) -> None:
    update(one / CONFIG, base_model_name_or_path="Qwen/Qwen2.5-7B")
    update(one / "args.json", model="Qwen/Qwen2.5-7B", model_dir=str(tmp_path / "gone"))
    made = fork(one, target)
    assert "the name agrees; no local folder, shapes not checked" in words(made)
    other = target.with_name("other")
    with pytest.raises(errors.ForkError, match="another name than the source's 'Qwen/Qwen2.5-7B' and no local folder"):
        fork(one, other, base="Qwen/Qwen2.5-14B")
    with pytest.raises(errors.ForkError, match="/nowhere/Qwen2.5-7B does not exist"):
        fork(one, other, base="/nowhere/Qwen2.5-7B")
    made = fork(one, other, base=str(base))
    assert "another name than the source's Qwen/Qwen2.5-7B; the shapes of 2 of 2 target modules agree" in words(made)
    assert json.loads((other / CONFIG).read_text())["base_model_name_or_path"] == str(base)
    assert json.loads((other / "args.json").read_text())["model"] == str(base)


@pytest.mark.parametrize(
    "folder",
    ["/hub/models--Qwen--Qwen2.5-7B/snapshots/0a1b", "/cache/Qwen/Qwen2___5-7B", "/mnt/Qwen2.5-7B/", "Qwen/Qwen2.5-7B"],
)
def test_a_models_name_in_the_caches(one: Path, target: Path, folder: str) -> None:
    update(one / CONFIG, base_model_name_or_path=folder)
    update(one / "args.json", model="Qwen/Qwen2.5-7B", model_dir=None)
    assert "the name agrees" in words(fork(one, target))


def test_a_source_that_names_two_bases(one: Path, target: Path) -> None:
    update(one / "args.json", model="Qwen/Qwen2.5-7B", model_dir=None)
    assert_refused(errors.ForkError, "names two base models", one, target)
    update(one / CONFIG, base_model_name_or_path=None)
    (one / "args.json").unlink()
    assert_refused(errors.ForkError, "does not say which base model", one, target)


def test_names_of_modules_that_files_have_otherwise(one: Path, target: Path, tmp_path: Path) -> None:
    """transformers' ``model.language_model.layers`` is ``model.layers`` in the files of a vision model."""
    key = "base_model.model.model.language_model.layers.3.first.lora_{}.weight"
    save_file({key.format("A"): torch.ones(4, 8), key.format("B"): torch.ones(12, 4)}, one / WEIGHTS)
    other = tmp_path / "vision"
    other.mkdir()
    save_file({"model.layers.3.first.weight": torch.ones(12, 8)}, other / "one.safetensors")
    save_file({"visual.blocks.3.first.weight": torch.ones(5, 5)}, other / "two.safetensors")
    index = {"model.layers.3.first.weight": "one.safetensors", "visual.blocks.3.first.weight": "two.safetensors"}
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert "the shapes of 1 of 1 target modules agree" in words(fork(one, target, base=str(other)))
    save_file({"model.layers.2.first.weight": torch.ones(12, 8)}, other / "one.safetensors")
    with pytest.raises(errors.ForkError, match="layers.3.first is for a weight of"):
        fork(one, target.with_name("other"), base=str(other))


def test_an_embedding(tmp_path: Path, base: Path, target: Path) -> None:
    source = make_adapter(tmp_path / "sft", base, target_modules=["embed", "first"])
    assert "2 of 2 target modules agree" in words(fork(source, target))


def test_weights_and_configuration_of_two_adapters(one: Path, target: Path) -> None:
    update(one / CONFIG, r=16)
    assert_refused(errors.AdapterFileError, "has rank 4 in first, .* says r=16", one, target)
    tensors = load_file(one / WEIGHTS)
    save_file({name: t for name, t in tensors.items() if "first.lora_B" not in name}, one / WEIGHTS)
    assert_refused(errors.AdapterFileError, "has only lora_A of first", one, target)
    save_file({"something": torch.ones(2)}, one / WEIGHTS)
    assert_refused(errors.AdapterFileError, "has no LoRA tensors", one, target)


def test_from_a_4_bit_base_onto_a_16_bit_one(one: Path, target: Path, tmp_path: Path, base: Path) -> None:
    packed = tmp_path / "tiny-4bit"
    packed.mkdir()
    halves = {name: torch.zeros(t.numel() // 2, 1, dtype=torch.uint8) for name, t in Tiny().state_dict().items()}
    save_file(halves, packed / "model.safetensors")
    update(one / CONFIG, base_model_name_or_path=str(packed))
    update(one / "args.json", model=str(packed), model_dir=str(packed), quant_method="bnb", quant_bits=4)
    rewrite(one, lambda name, tensor: tensor.half())
    made = fork(one, target)
    assert "2 of 2 target modules agree" in words(made)
    assert "add --quant_method bnb --quant_bits 4 to go on so" in words(made)
    onto = target.with_name("onto")
    made = fork(one, onto, base=str(base), dtype="bf16")
    assert "the source's base was quantised (--quant_method bnb --quant_bits 4), this one is taken as it is" in words(
        made
    )
    arguments = json.loads((onto / "args.json").read_text())  # --load_args would quantise the new base
    assert (arguments["quant_method"], arguments["quant_bits"], arguments["model"]) == (None, None, str(base))
    assert_trains(onto, torch.bfloat16)


def test_the_engines_room_is_said_where_it_must_be(tmp_path: Path, base: Path, target: Path) -> None:
    made = fork(make_adapter(tmp_path / "wide", base, r=12), target)
    assert made.command.endswith("--lora_rank 16"), "vLLM has no room of 12"
    made = fork(make_adapter(tmp_path / "pattern", base, r=2, rank_pattern={"first": 40}), target.with_name("pattern"))
    assert made.command.endswith("--lora_rank 64")


def test_an_adapter_of_stacked_experts(tmp_path: Path, target: Path) -> None:
    """PEFT's ``target_parameters``: the rank is that of one expert, and the wrappers of two parameters are nested."""
    place, one = tmp_path / "experts", tmp_path / "adapter"
    place.mkdir()
    save_file({"mlp.experts.gate_up_proj": torch.ones(3, 16, 12)}, place / "model.safetensors")
    one.mkdir()
    wide, name = 12 * 3, "base_model.model.mlp.experts"
    tensors = {f"{name}{inner}.lora_A.weight": torch.ones(wide, 12) for inner in ("", ".base_layer")}
    tensors |= {f"{name}{inner}.lora_B.weight": torch.ones(16, wide) for inner in ("", ".base_layer")}
    save_file(tensors, one / WEIGHTS)
    config = {"peft_type": "LORA", "r": 12, "lora_alpha": 12, "base_model_name_or_path": str(place)}
    config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    (one / CONFIG).write_text(json.dumps(config))
    made = fork(one, target)
    assert made.command.endswith("--lora_rank 16") and "2 cannot be told from the headers" in words(made)


def test_the_reference_policy_stays_the_sources(one: Path, target: Path) -> None:
    update(one / "args.json", beta=0.04, ref_adapters=[])
    made = fork(one, target)
    assert "the reference policy is the base model, as in the source" in words(made)
    assert "--ref_adapters" not in made.arguments
    update(one / "args.json", ref_adapters=["/sft/checkpoint-100"])
    assert fork(one, target.with_name("other")).arguments[-2:] == ("--ref_adapters", "/sft/checkpoint-100")


# ---- values and precision ------------------------------------------------------------------------------------------


def assert_trains(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """PEFT loads it onto a base of that dtype, and a step of the optimizer goes through."""
    model = PeftModel.from_pretrained(Tiny().to(dtype), folder, is_trainable=True)
    file = load_file(folder / WEIGHTS)
    for entry in adapter.bind(model).entries:
        assert torch.equal(entry.parameter.detach(), file[entry.key].to(entry.parameter.dtype)), entry.key
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.tensor([[1, 2, 3]])).float().sum().backward()
    optimizer.step()
    return model


@pytest.mark.parametrize("before", [torch.float16, torch.float32])
def test_a_cast_to_bf16_says_what_was_lost(one: Path, target: Path, before: torch.dtype) -> None:
    rewrite(one, lambda name, tensor: tensor.to(before))
    made = fork(one, target, dtype="bf16")
    source, forked = load_file(one / WEIGHTS), load_file(target / WEIGHTS)
    losses = {name: float((tensor.double() - forked[name].double()).abs().max()) for name, tensor in source.items()}
    assert all(torch.equal(forked[name], tensor.bfloat16()) for name, tensor in source.items())
    worst = max(losses, key=losses.__getitem__)
    assert made.cast is not None and (made.cast.tensor, made.cast.loss) == (worst, losses[worst]) and losses[worst] > 0
    kind = str(before).removeprefix("torch.")
    assert (
        f"cast 4 tensors from {kind} to bfloat16: the largest value lost is {losses[worst]:.3g}, in {worst}"
        in words(made)
    )
    assert_trains(target, torch.bfloat16)


def test_an_fp16_adapter_kept_on_a_bf16_base(one: Path, target: Path) -> None:
    rewrite(one, lambda name, tensor: tensor.half())
    made = fork(one, target)
    assert made.cast is None and (target / WEIGHTS).read_bytes() == (one / WEIGHTS).read_bytes()
    assert_trains(target, torch.bfloat16)


def test_a_cast_that_loses_nothing(one: Path, target: Path) -> None:
    rewrite(one, lambda name, tensor: tensor.bfloat16())
    assert "cast 4 tensors from bfloat16 to float32: nothing was lost" in words(fork(one, target, dtype="fp32"))
    made = fork(one, target.with_name("same"), dtype="bf16")
    assert made.cast is None and made.sha256 == made.source.sha256, "it is in bf16 already"


def test_a_value_that_fp16_cannot_hold(one: Path, target: Path) -> None:
    rewrite(one, lambda name, tensor: tensor * (1e6 if "first.lora_B" in name else 1))
    assert_refused(
        errors.ForkError, "first.lora_B.weight has values up to .* float16 cannot hold", one, target, dtype="fp16"
    )
    rewrite(one, lambda name, tensor: tensor * (1e-15 if "first.lora_B" in name else 1))
    assert "48 values became zero" in words(fork(one, target, dtype="fp16"))


def test_values_that_no_fork_can_start_from(one: Path, target: Path) -> None:
    good = load_file(one / WEIGHTS)
    rewrite(one, lambda name, tensor: tensor * ("lora_A" in name))
    assert_refused(errors.ForkError, "Every lora_B of .* is zero", one, target)
    save_file({**good, "base_model.model.first.lora_A.weight": torch.full((4, 8), float("nan"))}, one / WEIGHTS)
    assert_refused(errors.AdapterFileError, "NaN or infinity in base_model.model.first.lora_A.weight", one, target)


def test_lora_dtype_follows_the_cast(one: Path, target: Path) -> None:
    update(one / "additional_config.json", lora_dtype="float16")
    rewrite(one, lambda name, tensor: tensor.half())
    made = fork(one, target, dtype="bf16")
    assert "lora_dtype, in which ms-swift trains this adapter, set from float16 to bfloat16" in words(made)
    assert json.loads((target / "additional_config.json").read_text()) == {
        "lora_dtype": "bfloat16",
        "lorap_lr_ratio": None,
    }
    fork(one, target.with_name("kept"))
    assert json.loads((target.with_name("kept") / "additional_config.json").read_text())["lora_dtype"] == "float16"


# ---- the trainer's state -------------------------------------------------------------------------------------------


def test_with_the_trainers_state(run: Path, target: Path, base: Path) -> None:
    (run / "checkpoint-10" / "optimizer.pt").unlink()  # --save_only_model
    made = fork(run, target, with_trainer_state=True, dtype="bf16")
    assert made.source.step == 4 and "has no optimizer state" in words(made)
    for name in (*TRAINER_FILES, STATE):
        assert (target / name).read_bytes() == (run / "checkpoint-4" / name).read_bytes(), name
    assert made.command == f"--model {base} --resume_from_checkpoint {target}"
    with pytest.raises(errors.AdapterFileError, match="has no optimizer state"):
        fork(run / "checkpoint-10", target.with_name("other"), with_trainer_state=True)


def test_weights_that_deepspeed_resumes_from_elsewhere(one: Path, target: Path) -> None:
    (one / "global_step10").mkdir()
    (one / "global_step10" / "mp_rank_00_model_states.pt").write_bytes(b"...")
    assert_refused(errors.ForkError, "global_step10", one, target, with_trainer_state=True, dtype="bf16")
    fork(one, target, with_trainer_state=True)
    assert (target / "global_step10" / "mp_rank_00_model_states.pt").read_bytes() == b"..."


# ---- custody -------------------------------------------------------------------------------------------------------


def test_the_provenance_is_checked_at_the_first_sync(one: Path, target: Path) -> None:
    fork(one, target, dtype="bf16", with_trainer_state=True)
    made = json.loads((target / "fork_provenance.json").read_text())
    assert (made["source"], made["step"]) == (str(one), 10)
    assert (made["source_sha256"], made["sha256"]) == (sha256_of(one / WEIGHTS), sha256_of(target / WEIGHTS))
    assert (made["source_dtype"], made["dtype"], made["versions"]["peft"] is None) == (["float32"], ["bfloat16"], False)
    model = PeftModel.from_pretrained(Tiny(), target, is_trainable=True)
    found = decide(model, target, step=10)
    assert found.compared and f"{target} at step 10, a fork of {one} at step 10, SHA-256" in str(found)


def test_an_adapter_emptied_after_the_fork_is_caught(one: Path, target: Path) -> None:
    """File and trainer agree with each other then: only the digest tells."""
    made = fork(one, target, with_trainer_state=True)
    rewrite(target, lambda name, tensor: tensor * ("lora_A" in name))
    model = PeftModel.from_pretrained(Tiny(), target, is_trainable=True)
    with pytest.raises(errors.AdapterFileError) as caught:
        decide(model, target, step=10)
    assert made.sha256 in str(caught.value) and sha256_of(target / WEIGHTS) in str(caught.value)
    with pytest.raises(errors.AdapterFileError, match="it was changed afterwards"):
        fork(target, target.with_name("again"))


def test_a_fork_of_a_fork_knows_both(one: Path, target: Path) -> None:
    fork(one, target, dtype="fp16")
    fork(target, target.with_name("second"), dtype="bf16")
    made = json.loads((target.with_name("second") / "fork_provenance.json").read_text())
    assert made["source"] == str(target) and made["source_was_a_fork"]["source"] == str(one)


# ---- all of it or nothing ------------------------------------------------------------------------------------------


def test_targets_that_are_in_the_way(one: Path, target: Path) -> None:
    target.mkdir()
    fork(one, target)
    before = sorted((path, path.stat().st_mtime_ns) for path in target.rglob("*"))
    with pytest.raises(errors.ForkError, match="is not empty, it holds"):
        fork(one, target)
    assert sorted((path, path.stat().st_mtime_ns) for path in target.rglob("*")) == before
    with pytest.raises(errors.ForkError, match="is a file"):
        fork(one, target / CONFIG)
    with pytest.raises(errors.ForkError, match="does not exist, make it first"):
        fork(one, target.parent / "a" / "b")
    with pytest.raises(errors.ForkError, match="lies in the adapter folder"):
        fork(one, one / "new")
    assert not (one / "new").exists()


def test_a_dtype_that_is_none(one: Path, target: Path) -> None:
    assert_refused(errors.SettingsError, "'int8' is not understood: use one of keep", one, target, dtype="int8")


def console(*arguments: object, before: str = "") -> subprocess.Popen[str]:
    code = f"import sys; from swift_lora_fix import cli\n{before}\nsys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "fork", *map(str, arguments)]
    environment = {**os.environ, "SWIFT_LORA_FIX": "off"}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_nothing(one: Path, target: Path, number: signal.Signals) -> None:
    with (one / "long.bin").open("wb") as file:
        file.truncate(1 << 30)  # takes a while to copy
    # a shell starts what it puts into the background with SIGINT ignored, and that is inherited
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = console(one, target, "--with-trainer-state", before=listen)
    while not any(target.parent.iterdir()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 130 and said == "swift-lora-fix: interrupted, nothing was left of TARGET.\n"
    assert_nothing_left(target)


def test_a_disk_that_is_full_leaves_nothing(one: Path, target: Path) -> None:
    with (one / "long.bin").open("wb") as file:
        file.truncate(1 << 20)
    limit = f"import resource; resource.setrlimit({resource.RLIMIT_FSIZE}, (1 << 16, 1 << 16))"
    process = console(one, target, "--with-trainer-state", before=limit)
    _, said = process.communicate()
    assert process.returncode == 2 and "could not be written, nothing was left of it" in said
    assert_nothing_left(target)


def test_torch_is_not_loaded_for_a_mistake(run: Path, one: Path, target: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", torch.nn.ModuleDict({"wholly": torch.nn.Linear(3, 3)}))
    watch = "import atexit; atexit.register(lambda: print('torch' in sys.modules))"
    for mistake in ([one / "gone", target], [one, run], [one, target, "--dtype", "x"], [one, target, "--base", other]):
        process = console(*mistake, before=watch)
        printed, said = process.communicate()
        assert (process.returncode, printed) == (2, "False\n"), said
    printed, _ = console(one, target, before=watch).communicate()
    assert printed.endswith("True\n") and target.is_dir()


def test_the_package_alone(one: Path, target: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment").without("numpy", "torch", "torch-*")
    done = environment.run("fork", one, target)
    assert done.returncode == 2 and done.stdout == ""
    assert "numpy and torch are not installed in this environment: pip install numpy torch" in done.stderr
    assert_nothing_left(target)


def test_what_is_printed_is_what_was_done(
    one: Path, target: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fork", str(one), str(target), "--dtype", "bf16"]) == 0
    printed = capsys.readouterr().out
    assert f"Forked {one} (step 10)\n    to {target}, SHA-256 {sha256_of(target / WEIGHTS)}\n" in printed
    promise = "Go on with your swift rlhf command and these arguments:"
    assert f"{promise}\n    --model {base} --adapters {target}\n" in printed
    page = Path(__file__).parents[3] / "docs" / "forks.md"
    assert f"{promise} --model BASE --adapters TARGET" in " ".join(page.read_text().split())
    assert cli.main(["fork", str(one), str(target)]) == 2
    assert f"swift-lora-fix: TARGET {target} is not empty" in capsys.readouterr().err
