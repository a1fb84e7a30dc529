"""What the engine's weights become in fused mode, against PEFT's own merge; the real engines are in tests/real/vllm."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

from swift_lora_fix.policy import adapter, merging
from tests.support.peft_models import peft_model

CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"first": 2}, "alpha_pattern": {"second": 3}},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed", "first"]},
    "dora-embedding": {"target_modules": ["embed", "first"], "use_dora": True},
    "modules_to_save": {"target_modules": ["first"], "modules_to_save": ["second"]},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "conv1d": {"target_modules": ["first", "turned"], "fan_in_fan_out": True},
}


def trained(biased: bool = False, **config: Any) -> Any:
    """A PEFT model in which everything that can be trained has been."""
    model = peft_model(biased=biased, **config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_what_peft_merges_in_float32_and_the_trainer_is_only_read(name: str) -> None:
    model = trained(biased="bias" in name, **CONFIGS[name])
    before = {n: p.clone() for n, p in model.named_parameters()}
    reference = copy.deepcopy(model)
    reference.merge_adapter()
    merged = dict(reference.named_parameters())
    sources = []
    for module in merging.bind(model, "default"):
        for source, value in module.values(module.parameters).items():
            assert torch.equal(value, merged[source]), source
            sources.append(source)
        for source, value in module.plain_values(module.parameters).items():
            expected = source.replace("modules_to_save.default", "original_module")
            assert torch.equal(value, before[expected])
    changed = {n for n in before if "lora_" not in n and not torch.equal(before[n], merged[n])}
    assert changed <= set(sources) and len(sources) == len(set(sources))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_adapter_is_all_that_peft_would_save(name: str) -> None:
    model = trained(biased="bias" in name, **CONFIGS[name])
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    bound = adapter.bind(model, apart=False)
    assert {entry.key for entry in bound.entries} == set(saved)
    assert all(torch.equal(saved[entry.key], entry.parameter) for entry in bound.entries)
    assert {id(p) for p in bound.parameters} == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype, unit", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_the_rounding_is_within_the_stated_bound(dtype: torch.dtype, unit: float) -> None:
    model = trained()
    for module in merging.bind(model, "default"):
        ((source, value),) = module.values(module.parameters).items()
        w, a, b = (module.parameters[n].double() for n in (module.sent[source], *_names(module)))
        s, r = module.module.scaling["default"], a.shape[0]
        exact, size = w + s * (b @ a), abs(s) * (b.abs() @ a.abs()) + w.abs()
        rounded = value.to(dtype).double()
        assert bool(((rounded - exact).abs() <= unit * rounded.abs() + (r + 3) * 2**-24 * size).all())
        assert bool(((rounded - exact).abs() > 0.3 * unit * rounded.abs()).any()), "the bound is not idle"


def _names(module: merging.MergedModule) -> tuple[str, str]:
    return "lora_A.default.weight", "lora_B.default.weight"


@pytest.mark.parametrize("name", ["linear", "dora", "embedding"])
def test_autocast_around_it_changes_nothing(name: str) -> None:
    modules = merging.bind(trained(**CONFIGS[name]), "default")
    expected = [module.values(module.parameters) for module in modules]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [module.values(module.parameters) for module in modules]
    assert all(torch.equal(a[source], b[source]) for a, b in zip(expected, found) for source in a)


def test_a_merge_that_somebody_bound_to_the_trainers_layer_is_not_called() -> None:
    """ms-swift's patch_lora_merge leaves one behind on every layer."""
    model = trained(use_dora=True)
    (module, *_) = merging.bind(model, "default")

    def merge(layer: Any, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("this is the trainer's own layer")

    expected = module.values(module.parameters)
    module.module.merge = MethodType(merge, module.module)
    found = module.values(module.parameters)
    assert all(torch.equal(expected[source], found[source]) for source in expected)
    assert not module.module.merged


def test_another_adapter_beside_it_is_no_part_of_it() -> None:
    """--ref_adapters loads one, with modules of its own; whether its parameters ask for gradients or not."""
    config = {"target_modules": ["first"], "modules_to_save": ["second"]}
    model = trained(**config)
    alone = {source for module in merging.bind(model, "default") for source in module.sources}
    model.add_adapter("ref_adapter", LoraConfig(r=2, **config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "modules_to_save" in name)
    modules = merging.bind(model, "default")
    assert {source for module in modules for source in module.sources} == alone
    assert not any("ref_adapter" in name for module in modules for name in module.parameters)
    assert not any("ref_adapter" in entry.key for entry in adapter.bind(model, apart=False).entries)


def test_names_are_those_without_activation_checkpointing() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = trained()
    plain = [module.sources for module in merging.bind(model, "default")]
    model.base_model.model.first = checkpoint_wrapper(model.base_model.model.first)
    assert [module.sources for module in merging.bind(model, "default")] == plain


def test_a_tied_weight_that_only_one_side_adapts_is_named() -> None:
    apart = trained(target_modules=["embed", "first"])
    assert merging.tied(apart, merging.bind(apart, "default")) is None
    for config in ({"target_modules": ["tied"]}, {"target_modules": ["first"], "modules_to_save": ["tied"]}):
        model = peft_model(tie=True, **config)
        found = merging.tied(model, merging.bind(model, "default"))
        assert found is not None and "tied" in found[0] and "embed" in found[1], found
