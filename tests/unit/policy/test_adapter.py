"""The trainer side, on real PEFT models: what is read, with which scaling, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from peft.utils.save_and_load import get_peft_model_state_dict

from swift_lora_fix import errors
from swift_lora_fix.engine.vllm.slots import loader
from swift_lora_fix.policy import adapter
from tests.support.peft_models import peft_model

CPU = torch.device("cpu")


def scales(model: torch.nn.Module) -> dict[str, float]:
    return {entry.key: entry.scale for entry in adapter.bind(model).entries}


def test_entries_are_the_trainers_own_parameters_under_pefts_keys() -> None:
    model = peft_model()
    bound = adapter.bind(model)
    assert {entry.key for entry in bound.entries} == set(get_peft_model_state_dict(model))
    own = {id(p) for n, p in model.named_parameters() if "lora_" in n}
    assert {id(entry.parameter) for entry in bound.entries} == own
    (chunk,) = bound.chunks
    with adapter.whole_values(bound, chunk, CPU) as values:
        assert all(value is entry.parameter for entry, value in zip(bound.entries, values, strict=True))
    for key, copy in adapter.read_to_host(bound, CPU).items():
        (entry,) = [entry for entry in bound.entries if entry.key == key]
        assert torch.equal(copy, entry.parameter) and copy.data_ptr() != entry.parameter.data_ptr()


def test_scaling_is_pefts_own_for_each_module() -> None:
    plain = scales(peft_model())
    assert {v for k, v in plain.items() if "lora_B" in k} == {2.0} and {
        v for k, v in plain.items() if "lora_A" in k
    } == {1.0}
    rslora = scales(peft_model(use_rslora=True))
    assert {v for k, v in rslora.items() if "lora_B" in k} == {8 / math.sqrt(4)}
    patterns = peft_model(rank_pattern={"first": 2}, alpha_pattern={"second": 3})
    bound = adapter.bind(patterns)
    by_key = {entry.key: (entry.scale, entry.rank) for entry in bound.entries}
    assert by_key["base_model.model.first.lora_B.weight"] == (8 / 2, 2)
    assert by_key["base_model.model.second.lora_B.weight"] == (3 / 4, 4)
    assert bound.max_rank == 4


def test_embeddings_are_served_and_another_adapter_is_not() -> None:
    model = peft_model(target_modules=["embed", "first"])
    from peft import LoraConfig

    model.add_adapter("ref_adapter", LoraConfig(r=4, lora_alpha=32, target_modules=["embed", "first"]))
    keys = scales(model)
    assert keys["base_model.model.embed.lora_embedding_A"] == 1.0
    assert keys["base_model.model.embed.lora_embedding_B"] == 2.0
    assert not any("ref_adapter" in key for key in keys) and len(keys) == 4


@pytest.mark.parametrize(
    "config, named",
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["second"], "target_modules": ["first"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_by_name(config: dict, named: str) -> None:
    with pytest.raises(errors.UnsupportedAdapterError, match="vLLM's LoRA cannot serve") as caught:
        adapter.bind(peft_model(**config))
    assert named in str(caught.value) and "Use an engine without LoRA layers (fused mode)" in str(caught.value)


def test_an_adapter_that_is_not_there() -> None:
    with pytest.raises(errors.UnsupportedAdapterError, match=r"no PEFT adapter 'policy'; it has \['default'\]"):
        adapter.bind(peft_model(), "policy")


def test_a_merged_trainer_is_an_error() -> None:
    model = peft_model()
    bound = adapter.bind(model)
    adapter.check_unmerged(bound)
    model.merge_adapter()
    with pytest.raises(errors.TrainerModifiedError, match="merged into its base in 2 of 2 modules"):
        adapter.check_unmerged(bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_staged_copies_share_nothing_and_scale_in_fp32(dtype: torch.dtype) -> None:
    model = peft_model(lora_alpha=5)  # 1.25 is no power of two
    bound = adapter.bind(model)
    before = {entry.key: entry.parameter.detach().clone() for entry in bound.entries}
    staged = loader.stage(bound, {entry.key: entry.parameter.detach() for entry in bound.entries}, dtype)
    for entry in bound.entries:
        copy = staged[entry.key]
        assert copy.dtype == dtype
        assert copy.untyped_storage().data_ptr() != entry.parameter.untyped_storage().data_ptr()
        assert torch.equal(copy, (before[entry.key] * entry.scale).to(dtype))
        copy.fill_(7.0)
        assert torch.equal(entry.parameter.detach(), before[entry.key])


def test_chunks_bound_what_is_gathered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "CHUNK_BYTES", 4 * 40)
    bound = adapter.bind(peft_model())  # four tensors of 32, 48, 48 and 16 values
    assert [entry.key for chunk in bound.chunks for entry in chunk.entries] == [entry.key for entry in bound.entries]
    assert len(bound.chunks) == 4
    monkeypatch.setattr(adapter, "CHUNK_BYTES", 4 * 80)
    assert [len(chunk.entries) for chunk in adapter.bind(peft_model()).chunks] == [2, 2]


@pytest.mark.parametrize("targets", [["first", "second"], ["embed", "first"]])
def test_a_parameter_that_was_replaced_is_noticed(targets: list[str]) -> None:
    model = peft_model(target_modules=targets)
    bound = adapter.bind(model)
    assert adapter.is_still_bound(bound)
    bound.entries[0].parameter.data = bound.entries[0].parameter.data.clone()
    assert adapter.is_still_bound(bound), "another storage is no other parameter"
    entry = bound.entries[0]
    entry.holder[entry.name] = torch.nn.Parameter(entry.parameter.detach().clone())
    assert not adapter.is_still_bound(bound)
    assert adapter.is_still_bound(adapter.bind(model))


def test_a_base_that_is_trained_is_refused() -> None:
    model = peft_model()
    model.base_model.model.embed.weight.requires_grad_(True)
    with pytest.raises(errors.UnsupportedAdapterError, match="1 parameters beside the LoRA are trained.*embed"):
        adapter.bind(model)
