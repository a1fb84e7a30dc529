"""The allow-list against the installed PEFT: an option is served, with parity on real models, or refused by name."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import re
import subprocess
import sys
import typing
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, NamedTuple

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from transformers.pytorch_utils import Conv1D

from swift_lora_fix.common.words import PLAIN
from swift_lora_fix.errors import UnsupportedAdapterError
from swift_lora_fix.policy import adapter, kinds, merging

FIELDS = {field.name: field for field in dataclasses.fields(LoraConfig)}
PEFT = f"PEFT {peft.__version__}"


class Experts(torch.nn.Module):
    """Weights of three experts in one parameter, as transformers keeps them: (experts, out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 16, 12))
        self.down_proj = torch.nn.Parameter(torch.randn(3, 12, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ self.gate_up_proj.mT).chunk(2, dim=-1)
        return (gate * up) @ self.down_proj.mT


class Kitchen(torch.nn.Module):
    """One module of every class that PEFT's LoRA wraps; they are run one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "kitchen"}
        self.embed = torch.nn.Embedding(16, 8)
        self.first = torch.nn.Linear(8, 12)
        self.second = torch.nn.Linear(12, 8, bias=False)
        self.turned = Conv1D(6, 8)  # its weight is (in, out)
        self.conv1 = torch.nn.Conv1d(4, 6, 3)
        self.conv2 = torch.nn.Conv2d(4, 6, 3)
        self.conv3 = torch.nn.Conv3d(4, 6, 3)
        self.experts = Experts()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(2)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.embed(ids)))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed


def built(prepare: Callable[[Any, Any], None] | None = None, **config: Any) -> Any:
    """A PEFT model with this config, in float64, in which everything that is trained has been."""
    torch.manual_seed(0)
    base, settings = Kitchen(), {"r": 4, "lora_alpha": 10, "target_modules": ["first", "second"], **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of options that do not go together; all we look at is the result
        made = LoraConfig(**settings)
        if prepare:
            prepare(base, made)
        model = get_peft_model(base, made).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def corda(base: Any, config: Any) -> None:
    from peft.tuners.lora.corda import preprocess_corda

    preprocess_corda(base, config, run_model=lambda: [base(torch.arange(16)[None]) for _ in range(4)])


def lora_ga(base: Any, config: Any) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    def step() -> None:
        with torch.enable_grad():
            base(torch.arange(16)[None]).pow(2).sum().backward()

    preprocess_loraga(base, config, step)


class Case(NamedTuple):
    """config: of the model. modes: that serve it. built: the values that only a PEFT which knows them can make.
    prepare: is called with the base and the config first. said: what the config says once the model is built."""

    config: dict[str, Any]
    modes: tuple[str, ...] = kinds.BOTH
    built: Callable[[], dict[str, Any]] = dict
    prepare: Callable[[Any, Any], None] | None = None
    said: dict[str, Any] = {}

    @property
    def known(self) -> bool:
        """Whether the installed PEFT has these fields and, of init_lora_weights, the value."""
        return self.config.keys() <= FIELDS.keys() and self.init in {None, *INITS}

    @property
    def init(self) -> Any:
        return {**self.config, **self.said}.get("init_lora_weights")

    def model(self) -> Any:
        model = built(self.prepare, **{**self.config, **self.built()})
        for name, value in self.said.items():
            setattr(model.peft_config["default"], name, value)
        return model


# all that PEFT declares, and what its source takes beside: lora_ga where there is a config for it
_DECLARED = typing.get_type_hints(LoraConfig)["init_lora_weights"]
INITS: set[Any] = {value for kind in typing.get_args(_DECLARED) for value in typing.get_args(kind)} | {True, False}
INITS |= {"pissa_niter_4"} | ({"lora_ga"} if "lora_ga_config" in FIELDS else set())
PATTERN = "pissa_niter_[number of iters]"

SERVED: dict[str, Case] = {
    "plain": Case({"r": 3, "lora_alpha": 7}),
    "rslora": Case({"use_rslora": True}),
    "rank_pattern": Case({"rank_pattern": {"first": 2}}),
    "alpha_pattern": Case({"alpha_pattern": {"second": 3}}),
    "dropout": Case({"lora_dropout": 0.5}),
    "embedding": Case({"target_modules": ["embed", "first"]}),
    "conv1d": Case({"target_modules": ["turned"], "fan_in_fan_out": True}),
    "velora": Case({"velora_config": ...}, built=lambda: {"velora_config": {"num_groups": 2}}),
    "target_parameters": Case({"target_modules": [], "target_parameters": ["experts.down_proj", "first.weight"]}),
    "target_parameters-nested": Case(
        {"target_modules": ["first"], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}
    ),
    **{f"init-{value}": Case({"init_lora_weights": value}) for value in INITS - {PATTERN, "corda", "loftq", "lora_ga"}},
    "init-mica-embedding": Case({"init_lora_weights": "mica", "target_modules": ["embed", "first"]}),
    "init-corda": Case({"init_lora_weights": "corda"}, prepare=corda),
    # needs bitsandbytes to set its first values: here they are others
    "init-loftq": Case({}, said={"init_lora_weights": "loftq"}),
    "init-lora_ga": Case(
        {"init_lora_weights": "lora_ga", "lora_ga_config": ...},
        built=lambda: {"lora_ga_config": lora.LoraGAConfig()},
        prepare=lora_ga,
    ),
    "dora": Case({"use_dora": True}, kinds.FUSED),
    "dora-conv1d": Case({"use_dora": True, "target_modules": ["turned"], "fan_in_fan_out": True}, kinds.FUSED),
    "dora-embedding": Case({"use_dora": True, "target_modules": ["embed", "first"]}, kinds.FUSED),
    "dora-convolutions": Case({"use_dora": True, "target_modules": ["conv1", "conv2", "conv3"]}, kinds.FUSED),
    "convolutions": Case({"target_modules": ["conv1", "conv2", "conv3"]}, kinds.FUSED),
    "lora_bias": Case({"lora_bias": True, "target_modules": ["first"]}, kinds.FUSED),
    "bias-all": Case({"bias": "all"}, kinds.FUSED),
    "bias-lora_only": Case({"bias": "lora_only"}, kinds.FUSED),
    "modules_to_save": Case({"target_modules": ["first"], "modules_to_save": ["second"]}, kinds.FUSED),
    "bdlora-a": Case(
        {"use_bdlora": ...},
        kinds.FUSED,
        built=lambda: {"use_bdlora": lora.BdLoraConfig(target_modules_bd_a=["first", "second"], nblocks=2)},
    ),
    "bdlora-b": Case(
        {"use_bdlora": ...},
        kinds.FUSED,
        built=lambda: {"use_bdlora": lora.BdLoraConfig(target_modules_bd_b=["first", "second"], nblocks=2)},
    ),
}
# which of them shows that a field is served as PEFT computes it
SHOWN_BY = {
    "r": "plain",
    "lora_alpha": "plain",
    "use_rslora": "rslora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "lora_dropout": "dropout",
    "fan_in_fan_out": "conv1d",
    "init_lora_weights": "init-gaussian",
    "velora_config": "velora",
    "target_parameters": "target_parameters",
    "use_dora": "dora",
    "lora_bias": "lora_bias",
    "bias": "bias-all",
    "modules_to_save": "modules_to_save",
    "use_bdlora": "bdlora-a",
}
REFUSED: dict[str, Case] = {
    "kasa_config": Case({"kasa_config": ...}, built=lambda: {"kasa_config": lora.KasaConfig()}),
    "alora_invocation_tokens": Case({"alora_invocation_tokens": [3, 4]}),
    "monteclora_config": Case({"monteclora_config": ...}, built=lambda: {"monteclora_config": lora.MontecloraConfig()}),
    "use_qalora": Case({"use_qalora": True, "qalora_group_size": 4}),
    "trainable_token_indices": Case({"trainable_token_indices": {"embed": [1, 3]}}),
    "layer_replication": Case({"target_modules": r"layers\.\d", "layer_replication": [(0, 2), (1, 2)]}),
    "ensure_weight_tying": Case({"ensure_weight_tying": True}),
}
# what cannot be built here (Megatron, a router over trained adapters): the option is set on a model that was
SET_LATER = {
    "megatron_config": {"hidden_size": 8},
    "arrow_config": SimpleNamespace(top_k=2),
    "init_lora_weights": "next_year",
    "bias": "most",
}

# Layers that no entry names. The first two are tensor-parallel or transposed in ways that nobody looked at; vLLM has no
# LoRA for the third, which keeps its weights apart.
LEFT_OUT = {"LoraParallelLinear", "TeLinear", "MultiheadAttention"}

served = {name: case for name, case in SERVED.items() if case.known}
refused = {name: case for name, case in REFUSED.items() if case.known}


# ---------------------------------------------------------------- (a) every field of the installed PEFT is decided


@pytest.mark.parametrize("mode", kinds.BOTH)
def test_every_option_of_the_installed_peft_is_decided(mode: str) -> None:
    decided: dict[str, list[str]] = {name: [] for name in FIELDS}
    for name in FIELDS:
        if name in SHOWN_BY and mode in SERVED[SHOWN_BY[name]].modes:
            decided[name].append("served, with parity")
        elif name in SHOWN_BY or name in refused or name in SET_LATER:
            decided[name].append("refused by name")
        if name in kinds.NOT_THE_WEIGHTS:
            decided[name].append("does not concern the weights")
    wrong = {name: found for name, found in decided.items() if len(found) != 1}
    assert not wrong, f"{PEFT} has options that are not decided, or twice: see policy/kinds.py"


def test_every_value_of_init_lora_weights_is_decided() -> None:
    shown = {case.init for case in served.values()}
    assert INITS - {PATTERN} <= shown, f"{PEFT} has ways to set the first values that nobody compared"
    variants = set(FIELDS["init_lora_weights"].metadata.get("lora_variants", ()))
    assert variants <= shown


def test_every_variant_that_peft_marks_is_decided() -> None:
    """PEFT since 0.19 marks them in the fields' metadata; each is a kind of its own."""
    marked = {name for name, field in FIELDS.items() if field.metadata.get("is_lora_variant")}
    assert marked <= {name for kind in kinds.KINDS if kind.variants for name in kind.options}


def test_every_layer_class_and_variant_of_the_installed_peft_is_decided() -> None:
    """By their source: some are defined only where their library is installed."""
    folder = Path(lora.__file__).parent
    found = {
        f"peft.tuners.lora.{file.stem}.{name}"
        for file in folder.glob("*.py")
        for name, bases in re.findall(r"^ *class (\w+)\((.+)\):", file.read_text(), re.M)
        if not name.startswith("_") and re.search(r"\b(LoraLayer|Linear|_ConvNd|LoraVariant|\w+Variant)$", bases)
    }
    listed = {name for kind in kinds.KINDS for name in (*kind.layers, *kind.variants)}
    assert {name.rpartition(".")[2] for name in found - listed} == LEFT_OUT & {n.rpartition(".")[2] for n in found}
    assert len(found & listed) >= 22  # PEFT 0.18


# ---------------------------------------------------------------- (b) what is served is what PEFT computes

cases_by_mode = [(mode, name) for name, case in served.items() for mode in case.modes]


@pytest.mark.parametrize("name", [name for mode, name in cases_by_mode if mode == "adapter"])
def test_scale_b_a_is_what_peft_adds(name: str) -> None:
    """Each module's output with the adapter less that without it, as the trainer computes it while it trains."""
    case = served[name]
    model = case.model().train(case.config.get("lora_dropout", 0) == 0)
    bound = adapter.bind(model)
    assert {entry.layer for entry in bound.entries} == set(bound.layers) and bound.layers
    for layer in bound.layers:
        a, b = sorted((e for e in bound.entries if e.layer is layer), key=lambda entry: entry.is_b)
        delta = b.scale * served_delta(layer, a.parameter.detach(), b.parameter.detach())
        assert delta.abs().max() > 0.1
        if isinstance(layer, lora.layer.ParamWrapper):
            added = layer.get_delta_weight("default")
            if added.ndim == 3 and not getattr(layer, "_did_swap_in_out_features", False):
                added = added.mT  # PEFT before 0.19 takes experts for (experts, in, out), as transformers 4 has them
        else:
            x = torch.arange(16) if isinstance(layer, lora.Embedding) else torch.randn(5, layer.in_features).double()
            added = layer(x) - layer.base_layer(x)
            delta = delta.T[x] if isinstance(layer, lora.Embedding) else x @ delta.T
        torch.testing.assert_close(delta, added, rtol=1e-9, atol=1e-9)


def served_delta(layer: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """B @ A as vLLM's LoRA layers compute it; of fused experts as LoRAModelManager takes the two apart."""
    experts = getattr(layer, "num_experts", 1)
    if experts == 1:
        return b @ a
    each_a = a.reshape(experts, -1, a.shape[-1])  # (experts, r, in)
    each_b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)  # (experts, out, r)
    return each_b @ each_a


@pytest.mark.parametrize("name", [name for mode, name in cases_by_mode if mode == "fused"])
def test_the_fused_weights_are_what_peft_merges_and_computes(name: str) -> None:
    model = served[name].model().float().eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    reference = copy.deepcopy(model)
    reference.merge_adapter()
    merged, sources = dict(reference.named_parameters()), set()
    for module in merging.bind(model, "default"):
        values = module.values(module.parameters)
        for source, value in values.items():
            assert torch.equal(value, merged[source]), source
        sources |= values.keys()
        if module.inner is None:  # a bias, which nothing wraps
            continue
        plain = copy.deepcopy(module.module.get_submodule(module.inner))
        plain.load_state_dict({s.rsplit(".", 1)[1]: v for s, v in values.items()}, strict=False)
        x = inputs_of(plain)
        torch.testing.assert_close(plain(x), module.module(x), rtol=1e-4, atol=1e-4)
    assert {n for n in before if "lora_" not in n and not torch.equal(before[n], merged[n])} <= sources
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters()), "the trainer is only read"
    bound = adapter.bind(model, apart=False)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained <= {id(p) for p in bound.parameters}, "nothing that is trained is left out"


def inputs_of(module: torch.nn.Module) -> torch.Tensor:
    if isinstance(module, torch.nn.Embedding):
        return torch.arange(module.num_embeddings)
    if isinstance(module, (torch.nn.Linear, Conv1D)):
        return torch.randn(5, module.weight.shape[isinstance(module, torch.nn.Linear)])
    if isinstance(module, Experts):
        return torch.randn(3, 5, 12)
    return torch.randn(2, 4, *[7] * len(module.kernel_size))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for mode, name in cases_by_mode if mode == "fused"])
def test_plain_are_exactly_those_that_are_w_plus_b_a(name: str) -> None:
    """Where ``is_plain_linear`` says so, a kernel computes it without PEFT."""
    model = served[name].model().float()
    for module in merging.bind(model, "default"):
        plain = name not in ("conv1d", "convolutions", "lora_bias") and not name.startswith(("dora", "bdlora"))
        is_linear = type(module.module) is lora.Linear
        assert module.is_plain is (plain and is_linear), module.path


@pytest.mark.parametrize("layer", ["aqlm.AqlmLoraLinear", "awq.AwqLoraLinear", "gptq.GPTQLoraLinear"])
def test_a_quantised_base_leaves_the_adapter_plain(layer: str) -> None:
    """PEFT's own layers; the base that they wrap may be anything, so here it is a plain one."""
    module, _, name = layer.partition(".")
    cls = getattr(getattr(lora, module), name)
    model = built()
    first = model.base_model.model.first.base_layer
    options = {"r": 4, "lora_alpha": 6}
    settings = LoraConfig(**options)
    try:
        wrapped = cls(first, "default", config=settings, **options)
    except TypeError:  # PEFT before 0.19 takes the options one by one
        wrapped = cls(first, "default", **options)
    torch.nn.init.normal_(wrapped.lora_B["default"].weight)
    model.base_model.model.first = wrapped.double()
    bound = adapter.bind(model)
    a, b = sorted((e for e in bound.entries if e.layer is wrapped), key=lambda entry: entry.is_b)
    x = torch.randn(5, 8).double()
    delta = b.scale * (x @ a.parameter.T) @ b.parameter.T
    torch.testing.assert_close(delta, wrapped(x) - first(x), rtol=1e-9, atol=1e-9)
    with pytest.raises(UnsupportedAdapterError, match=f"{name} in module 'base_model.model.first'"):
        merging.bind(model, "default")


# ---------------------------------------------------------------- (c) the rest is refused, by name


def assert_refused(model: Any, mode: str, *named: str) -> str:
    with pytest.raises(UnsupportedAdapterError) as caught:
        adapter.bind(model, apart=mode == "adapter")
    if mode == "fused":
        with pytest.raises(UnsupportedAdapterError) as again:
            merging.bind(model, "default")
        assert all(word in str(again.value) for word in named), str(again.value)
    assert all(word in str(caught.value) for word in named), str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mode", kinds.BOTH)
@pytest.mark.parametrize("name", refused)
def test_a_refused_option_is_named(name: str, mode: str) -> None:
    message = assert_refused(refused[name].model(), mode, f"{name}=")
    assert message.startswith("Neither ") and " can serve adapter 'default'" in message
    assert message.endswith("Train it without that.")


@pytest.mark.parametrize("mode", kinds.BOTH)
@pytest.mark.parametrize("name", [name for name in SET_LATER if name in FIELDS])
def test_what_cannot_be_built_here_is_refused_by_its_option(name: str, mode: str) -> None:
    model = built()
    setattr(model.peft_config["default"], name, SET_LATER[name])
    assert_refused(model, mode, f"{name}={SET_LATER[name]!r}")


other_mode = [(name, case) for name, case in served.items() if len(case.modes) == 1]


@pytest.mark.parametrize("name", [name for name, _ in other_mode])
def test_what_one_mode_serves_the_other_refuses_and_says_so(name: str) -> None:
    case = served[name]
    (serves,) = case.modes
    refuses = "fused" if serves == "adapter" else "adapter"
    options = [field for field in case.config if field in SHOWN_BY and case.config[field] is not True]
    message = assert_refused(case.model(), refuses)
    named = [option for option in [*options, "Conv1d", "use_dora", "lora_bias"] if option in message]
    assert named, message
    flag = {"adapter": PLAIN.with_lora, "fused": f"{PLAIN.without_lora} (fused mode)"}[serves]
    assert f"Use {flag} for this adapter, or train it without that." in message


@pytest.mark.parametrize("mode", kinds.BOTH)
def test_another_method_than_lora_is_refused(mode: str) -> None:
    model = get_peft_model(Kitchen(), peft.VeraConfig(r=2, target_modules=["first"]))
    assert_refused(model, mode, "peft_type='VERA'")


@pytest.mark.parametrize("mode", kinds.BOTH)
def test_attention_that_keeps_its_weights_in_one_is_refused(mode: str) -> None:
    base = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    assert_refused(model, mode, "a LoRA layer of class peft.tuners.lora.layer.MultiheadAttention in module")


@pytest.mark.parametrize("mode", kinds.BOTH)
def test_an_option_of_a_later_peft_is_refused(mode: str) -> None:
    @dataclasses.dataclass
    class Later(LoraConfig):
        sharpness: float = 1.0

    model = built()
    for value, is_fine in ((1.0, True), (2.0, False)):
        model.peft_config["default"] = Later(r=4, target_modules=["first"], sharpness=value)
        if is_fine:
            adapter.bind(model, apart=mode == "adapter")
        else:
            assert_refused(model, mode, "sharpness=2.0, which swift_lora_fix does not know")


SWIFTS_OWN = """
import dataclasses, peft, torch
from swift.tuners.peft import LoraConfig
from swift_lora_fix.policy import adapter, kinds

own = {"lora_dtype": "float32", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1.0}
added = {f.name for f in dataclasses.fields(LoraConfig)} - {f.name for f in dataclasses.fields(peft.LoraConfig)}
assert added == own.keys() and added <= kinds.NOT_THE_WEIGHTS.keys(), added
model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), LoraConfig(r=2, target_modules=["0"], **own))
for apart in (True, False):
    assert len(adapter.bind(model, apart=apart).entries) == 2
"""


def test_ms_swifts_own_config_is_known() -> None:
    """In a process of its own: ms-swift patches PEFT and the loggers when it is imported."""
    if importlib.util.find_spec("swift") is None:
        pytest.skip("ms-swift is not installed")
    done = subprocess.run([sys.executable, "-c", SWIFTS_OWN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("mode", kinds.BOTH)
def test_a_layer_class_variant_parameter_or_buffer_that_nobody_knows_is_refused(mode: str) -> None:
    class Sharper(lora.Linear):
        pass

    class SharperVariant(lora.layer.LoraVariant):
        pass

    def first_of(change: Callable[[Any], Any]) -> Any:
        model = built()
        change(model.base_model.model.first)
        return model

    where = "in module 'base_model.model.first', which swift_lora_fix does not know"
    model = first_of(lambda layer: setattr(layer, "__class__", Sharper))
    assert_refused(model, mode, "a LoRA layer of class ", "Sharper", where)
    model = first_of(lambda layer: layer.lora_variant.update(default=SharperVariant()))
    assert_refused(model, mode, "the LoRA variant ", "SharperVariant", where)
    diag = torch.nn.Parameter(torch.ones(4))
    model = first_of(lambda layer: layer.add_module("lora_diag", torch.nn.ParameterDict({"default": diag})))
    assert_refused(model, mode, f"the parameter lora_diag.default {where}")
    model = first_of(lambda layer: layer.register_parameter("lora_shared", diag))
    assert_refused(model, mode, f"the parameter lora_shared {where}")
    model = first_of(lambda layer: layer.lora_A["default"].register_buffer("mask", torch.ones(4)))
    assert_refused(model, mode, f"the buffer lora_A.default.mask {where}")


@pytest.mark.parametrize("mode", kinds.BOTH)
def test_another_adapter_beside_it_may_be_of_any_kind(mode: str) -> None:
    """--ref_adapters loads one, which is not served."""
    model = built()
    model.add_adapter("ref_adapter", LoraConfig(r=2, target_modules=["first"], use_dora=True))
    model.base_model.model.first.lora_diag = torch.nn.ParameterDict({"ref_adapter": torch.nn.Parameter(torch.ones(2))})
    adapter.bind(model, apart=mode == "adapter")
    with pytest.raises(UnsupportedAdapterError, match="lora_diag.ref_adapter|use_dora"):
        adapter.bind(model, "ref_adapter", apart=mode == "adapter")


def test_fsdp2s_class_is_looked_past() -> None:
    """``fully_shard`` makes the class of a module FSDPLinear, of FSDPModule and the module's own."""
    from torch.distributed.fsdp import FSDPModule

    model = built()
    layer = model.base_model.model.first
    layer.__class__ = type("FSDPLinear", (FSDPModule, lora.Linear), {"__module__": "torch.distributed.fsdp"})
    adapter.bind(model)
    assert kinds.is_plain_linear(layer, "default")


@pytest.mark.parametrize(
    "key, is_b",
    [
        ("base_model.model.first.lora_A.weight", False),
        ("base_model.model.first.lora_B.weight", True),
        ("base_model.model.first.lora_B.default.weight", True),
        ("base_model.model.first.lora_B.bias", True),
        ("base_model.model.embed.lora_embedding_A", False),
        ("base_model.model.embed.lora_embedding_B", True),
        ("base_model.model.first.lora_magnitude_vector", False),
        ("base_model.model.not_lora_B_at_all.lora_A.weight", False),
    ],
)
def test_which_keys_are_b(key: str, is_b: bool) -> None:
    assert kinds.is_b(key) is is_b
