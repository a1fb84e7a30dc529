"""Which PEFT adapters can be served exactly: an allow-list, one entry a kind. Anything else is refused, by name.

PEFT gets a new kind of LoRA every few weeks. An unreviewed one may compute something else than ``B @ A``, or train
tensors that the engine never gets. So an option, a layer class, a variant or a tensor that no entry of ``KINDS`` names
is never served: the run stops and says what it is.

There are two modes, and each entry says which of them serve its kind:

* ``adapter``: the engine gets base and adapter apart. vLLM's LoRA layers compute ``W x + scale * (B (A x))``, so
  this serves whatever PEFT computes by that formula.
* ``fused``: the engine's weights become what PEFT's own ``merge`` makes of a float32 twin of the layer (merging.py).
  This serves whatever that merge reproduces.

To add a kind: one entry in ``KINDS`` and one case in tests/unit/policy/test_kinds.py. That test compares each served
kind with PEFT's own forward and merge, and fails for every field of the installed ``LoraConfig`` that is not covered.

Source: ``peft/tuners/lora/`` (config.py, layer.py, variants.py, model.py, and a file for each quantisation) of PEFT
0.18.1, 0.20.0 and 0.21.2.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Callable, Literal

from ..common.words import PLAIN, Words
from ..errors import UnsupportedAdapterError

if TYPE_CHECKING:
    import torch  # not imported: tools/fork checks files without it

Mode = Literal["adapter", "fused"]
BOTH: tuple[Mode, ...] = ("adapter", "fused")
ADAPTER: tuple[Mode, ...] = ("adapter",)
FUSED: tuple[Mode, ...] = ("fused",)
NEITHER: tuple[Mode, ...] = ()

_LAYERS = "peft.tuners.lora.layer"
_VARIANTS = "peft.tuners.lora.variants"
_LINEAR = f"{_LAYERS}.Linear"
_PARAMETER = f"{_LAYERS}.ParamWrapper"


def _any(value: Any) -> bool:
    return True


@dataclass(frozen=True)
class Kind:
    """One kind of PEFT LoRA, how to recognise it, and which modes serve it.

    modes: that serve it; empty: it is known and refused. why: the reason; for a refused kind a sentence for the user.
    options: ``LoraConfig`` fields that ask for it when they are not at their default. accepts: for which values.
    layers, variants: full names of PEFT's LoRA layer classes, and of the classes in ``layer.lora_variant``.
    tensors: the parameters and buffers of a LoRA layer that belong to it (``*``: the adapter's name), each with its key
        in PEFT's state dict, relative to the module's. None: not needed to compute the weights.
    is_plain: a linear layer of this kind computes ``W x + scale * (B (A x))``.
    """

    name: str
    modes: tuple[Mode, ...]
    why: str
    options: tuple[str, ...] = ()
    accepts: Callable[[Any], bool] = _any
    layers: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    tensors: Mapping[str, str | None] = field(default_factory=dict)
    is_plain: bool = False


def _is_plain_init(value: Any) -> bool:
    if not isinstance(value, str):
        return isinstance(value, bool)
    return value.lower() in _INITS or re.fullmatch(r"pissa(_niter_\d+)?", value) is not None


_INITS = {"gaussian", "eva", "olora", "corda", "loftq", "orthogonal", "lora_ga"}

KINDS: tuple[Kind, ...] = (
    Kind(
        "plain LoRA",
        BOTH,
        "LoraLayer computes scale * B(A(x)), with module.scaling for rank, alpha, their patterns and rsLoRA in scale. "
        "Dropout acts while it trains; the policy is what it is without. fan_in_fan_out: the base is stored (in, out)",
        options=("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "fan_in_fan_out"),
        layers=(_LINEAR, f"{_LAYERS}.Embedding"),
        tensors={
            "lora_A.*.weight": "lora_A.weight",
            "lora_B.*.weight": "lora_B.weight",
            "lora_embedding_A.*": "lora_embedding_A",
            "lora_embedding_B.*": "lora_embedding_B",
        },
        is_plain=True,
    ),
    Kind(
        "initial values (PiSSA, OLoRA and the like)",
        BOTH,
        "each *_init of LoraLayer sets A and B, and some take a part out of the base's weight once; what runs is plain "
        "LoRA around the trainer's own base, and that base is what the engine gets",
        options=("init_lora_weights",),
        accepts=_is_plain_init,
        is_plain=True,
    ),
    Kind(
        "MiCA",
        BOTH,
        "MiCALinearVariant freezes B and computes plain LoRA",
        options=("init_lora_weights",),
        accepts=lambda value: isinstance(value, str) and value.lower() == "mica",
        variants=(f"{_VARIANTS}.MiCALinearVariant", f"{_VARIANTS}.MiCAEmbeddingVariant"),
        is_plain=True,
    ),
    Kind(
        "VeLoRA",
        BOTH,
        "VeloraLinearVariant changes the gradient of A alone: its forward and its merge are plain LoRA's, and its "
        "buffer is read by the backward pass only",
        options=("velora_config",),
        variants=(f"{_VARIANTS}.VeloraLinearVariant",),
        tensors={"lora_velora_embed.*": None},
        is_plain=True,
    ),
    Kind(
        "a quantised base",
        ADAPTER,
        "the layer computes base(x) + scale * B(A(x)) around a base of whatever form, and only a full-precision base "
        "can be folded into",
        layers=(
            "peft.tuners.lora.aqlm.AqlmLoraLinear",
            "peft.tuners.lora.awq.AwqLoraLinear",
            "peft.tuners.lora.bnb.Linear4bit",
            "peft.tuners.lora.bnb.Linear8bitLt",
            "peft.tuners.lora.eetq.EetqLoraLinear",
            "peft.tuners.lora.gptq.GPTQLoraLinear",
            "peft.tuners.lora.hqq.HqqLoraLinear",
            "peft.tuners.lora.inc.IncLoraLinear",
            "peft.tuners.lora.torchao.TorchaoLoraLinear",
        ),
    ),
    Kind(
        "target_parameters",
        BOTH,
        "ParamWrapper keeps the factors of all experts in one A (r * experts, in) and one B (out, r * experts), which "
        "vLLM takes apart in the same order where it has fused experts (LoRAModelManager), and else refuses; its merge "
        "adds each expert's product to that expert's weight",
        options=("target_parameters",),
        layers=(_PARAMETER,),
    ),
    Kind(
        "DoRA",
        FUSED,
        "DoRA scales each row of W + scale * B @ A by a trained magnitude",
        options=("use_dora",),
        variants=tuple(
            f"{_VARIANTS}.Dora{kind}Variant" for kind in ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")
        ),
        tensors={"lora_magnitude_vector.*.weight": "lora_magnitude_vector"},
    ),
    Kind(
        "a bias on B",
        FUSED,
        "the bias of lora_B belongs into the base layer's bias",
        options=("lora_bias",),
        tensors={"lora_B.*.bias": "lora_B.bias"},
    ),
    Kind(
        "trained biases",
        FUSED,
        "the base's biases are trained with the adapter",
        options=("bias",),
        accepts=lambda value: value in ("all", "lora_only"),
    ),
    Kind("modules_to_save", FUSED, "whole modules are trained with the adapter", options=("modules_to_save",)),
    Kind(
        "convolutions",
        FUSED,
        "vLLM has no LoRA layer for convolutions",
        layers=tuple(f"{_LAYERS}.Conv{n}d" for n in (1, 2, 3)),
    ),
    Kind(
        "BD-LoRA",
        FUSED,
        "A or B is block-diagonal, and only its blocks are stored",
        options=("use_bdlora",),
        variants=(f"{_VARIANTS}.BdLoraLinearVariant",),
    ),
    Kind(
        "KaSA",
        NEITHER,
        "it computes B @ diag(lora_diag) @ A around a truncated base, and the truncation may come after the engine has "
        "got the base",
        options=("kasa_config",),
        variants=(f"{_VARIANTS}.KasaLinearVariant",),
    ),
    Kind(
        "aLoRA",
        NEITHER,
        "the adapter acts from the invocation tokens on, not on the whole prompt",
        options=("alora_invocation_tokens",),
        variants=(f"{_VARIANTS}.ALoraLinearVariant",),
    ),
    Kind(
        "MonteCLoRA",
        NEITHER,
        "the trainer computes with another random A in each forward pass, drawn with trained parameters",
        options=("monteclora_config",),
        variants=(f"{_VARIANTS}.MontecloraLinearVariant",),
    ),
    Kind(
        "QALoRA",
        NEITHER,
        "A is applied to means over groups of inputs, and PEFT cannot merge it",
        options=("use_qalora",),
        variants=(f"{_VARIANTS}.QALoraLinearVariant",),
    ),
    Kind(
        "Arrow",
        NEITHER,
        "each token is routed to other adapters",
        options=("arrow_config",),
        variants=(f"{_VARIANTS}.ArrowLinearVariant",),
    ),
    Kind(
        "trained tokens",
        NEITHER,
        "rows of the embedding are trained in a tensor of their own, which the engine has no place for",
        options=("trainable_token_indices",),
    ),
    Kind(
        "replicated layers",
        NEITHER,
        "the trainer has more layers than the model that the engine loads",
        options=("layer_replication",),
    ),
    Kind(
        "Megatron's parallel layers",
        NEITHER,
        "each rank holds only a part of A or of B",
        options=("megatron_config",),
    ),
    Kind(
        "tied adapters",
        NEITHER,
        "the adapters of tied layers share their memory, transposed, which no test shows",
        options=("ensure_weight_tying",),
    ),
)

# Fields that do not change what a LoRA layer computes, and why.
NOT_THE_WEIGHTS: dict[str, str] = {
    "task_type": "says what class of PeftModel is built; modules_to_save, which it may fill, is looked at",
    "peft_type": "checked first of all",
    "auto_mapping": "says how PEFT finds the base's class when it loads",
    "peft_version": "says which PEFT wrote the config",
    "base_model_name_or_path": "says where the base came from",
    "revision": "says where the base came from",
    "inference_mode": "says whether the adapter is trained",
    "target_modules": "says which modules are adapted",
    "exclude_modules": "says which modules are adapted",
    "layers_to_transform": "says which modules are adapted",
    "layers_pattern": "says which modules are adapted",
    "megatron_core": "names a package, read with megatron_config alone",
    "loftq_config": "read while init_lora_weights='loftq' sets the first values",
    "eva_config": "read while init_lora_weights='eva' sets the first values",
    "corda_config": "read while init_lora_weights='corda' sets the first values",
    "lora_ga_config": "read while init_lora_weights='lora_ga' sets the first values",
    "qalora_group_size": "read with use_qalora alone",
    "runtime_config": "says on which device DoRA's first norms are computed",
    # these are added by ms-swift's own LoraConfig (swift/tuners/peft.py)
    "lora_dtype": "says in which dtype A and B are kept, and they are read in the one they have",
    "lorap_lr_ratio": "LoRA+: a learning rate",
    "lorap_emb_lr": "LoRA+: a learning rate",
}


def is_b(key: str) -> bool:
    """Whether a PEFT key or parameter name is of LoRA's second factor B, the one that the scaling is folded into."""
    return not {"lora_B", "lora_embedding_B"}.isdisjoint(key.split("."))


def config_of(model: torch.nn.Module, adapter_name: str) -> Any:
    """PEFT's config of the adapter. Raises UnsupportedAdapterError when the model has no such adapter."""
    configs: Any = getattr(model, "peft_config", {})  # a model that is not PEFT's has none
    if adapter_name not in configs:
        raise UnsupportedAdapterError(f"The model has no PEFT adapter {adapter_name!r}; it has {sorted(configs)}.")
    return configs[adapter_name]


def check(model: torch.nn.Module, adapter_name: str, mode: Mode, words: Words = PLAIN) -> None:
    """Raise UnsupportedAdapterError when ``mode`` cannot serve an adapter exactly as PEFT computes it.

    The message names the option and its value, or the module and its class, variant or parameter, and what to do.

    Args:
        model: the trainer's unwrapped ``peft.PeftModel``, which has the adapter. It is only read.
        adapter_name: the PEFT adapter to serve.
        mode: how the engine gets it.
        words: for the message.
    """
    problem = find_unserved(model, adapter_name, mode)
    if problem is None:
        return
    names = {"adapter": "vLLM's LoRA", "fused": "the fused mode"}
    flags = {"adapter": words.with_lora, "fused": f"{words.without_lora} (fused mode)"}
    other: Mode = "fused" if mode == "adapter" else "adapter"
    if find_unserved(model, adapter_name, other) is None:
        who, advice = f"{names[mode]} cannot serve", f"Use {flags[other]} for this adapter, or train it without that."
    else:
        who, advice = f"neither {names[mode]} nor {names[other]} can serve", "Train it without that."
    who = who[0].upper() + who[1:] if who.startswith(("neither", "the")) else who  # vLLM keeps its small v
    raise UnsupportedAdapterError(f"{who} adapter {adapter_name!r}: it has {problem}. {advice}")


def find_unserved(model: torch.nn.Module, adapter_name: str, mode: Mode) -> str | None:
    """The first thing about the adapter that ``mode`` does not serve, in words, or None. Arguments as in ``check``.

    Raises UnsupportedAdapterError when the model has no such adapter.
    """
    from peft.tuners.lora import LoraLayer

    config = config_of(model, adapter_name)
    peft_type = str(getattr(config.peft_type, "value", config.peft_type))  # an enum; its value after a load
    if peft_type != "LORA":
        return f"peft_type={peft_type!r}, which is no LoRA"
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.scaling
    ]
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if _is_default(option, value) or option.name in NOT_THE_WEIGHTS:
            continue
        kind = _kind_of_option(option.name, value)
        if kind is None or mode not in kind.modes:
            where = next((name for name, layer in layers if kind in _variants_of(layer, adapter_name).values()), None)
            return f"{option.name}={_short(value)}{_in(where)}{_because(kind)}"
    for name, layer in layers:
        for what, kind in _kinds_of_layer(layer, adapter_name):
            if kind is None or mode not in kind.modes:
                return f"{what}{_in(name)}{_because(kind)}"
    return None


def is_plain_linear(layer: Any, adapter_name: str) -> bool:
    """Whether PEFT's merge of this layer is exactly ``W + scale * B @ A``, with W (out, in)."""
    return (
        _name_of_class(layer) == _LINEAR
        and not layer.fan_in_fan_out
        and all(kind is not None and kind.is_plain for _, kind in _kinds_of_layer(layer, adapter_name))
    )


def wraps_parameter(layer: Any) -> bool:
    """Whether this is PEFT's wrapper of a parameter, which ``target_parameters`` makes."""
    return _name_of_class(layer) == _PARAMETER


def tensors_of(layer: Any, adapter_name: str) -> Iterator[tuple[str, str]]:
    """The adapter's parameters in a LoRA layer: each one's name in the layer, and its key in PEFT's state dict.

    In the order of ``KINDS``, A before B. Parameters that no kind names are left out; ``check`` refuses them.
    """
    names = {name for name, _ in layer.named_parameters()}
    for pattern, (_, key) in _TENSORS.items():
        name = pattern.replace("*", adapter_name)
        if key is not None and name in names:
            yield name, key


_LAYERS_BY_NAME = {name: kind for kind in KINDS for name in kind.layers}
_VARIANTS_BY_NAME = {name: kind for kind in KINDS for name in kind.variants}
_TENSORS = {pattern: (kind, key) for kind in KINDS for pattern, key in kind.tensors.items()}


def _kind_of_option(name: str, value: Any) -> Kind | None:
    return next((kind for kind in KINDS if name in kind.options and kind.accepts(value)), None)


def _is_default(option: dataclasses.Field, value: Any) -> bool:
    """Whether the field asks for nothing. An empty list counts like None."""
    factory = option.default_factory
    default = option.default if factory is dataclasses.MISSING else factory()
    return value == default or (not value and not default)


def _kinds_of_layer(layer: Any, adapter_name: str) -> Iterator[tuple[str, Kind | None]]:
    """What the layer is and holds for this adapter, in words, each with its kind. None: an unknown kind."""
    name = _name_of_class(layer)
    yield f"a LoRA layer of class {name}", _LAYERS_BY_NAME.get(name)
    for variant, kind in _variants_of(layer, adapter_name).items():
        yield f"the LoRA variant {variant}", kind
    others = set(layer.scaling) - {adapter_name}
    for what, named in (("parameter", layer.named_parameters()), ("buffer", layer.named_buffers())):
        for path, _ in named:
            parts = path.split(".")
            if parts[0] == "base_layer" or not others.isdisjoint(parts):
                continue
            pattern = ".".join("*" if part == adapter_name else part for part in parts)
            yield f"the {what} {path}", _TENSORS.get(pattern, (None, None))[0]


def _variants_of(layer: Any, adapter_name: str) -> dict[str, Kind | None]:
    """The variant that computes this layer in PEFT, by the full name of its class; empty for a plain LoRA."""
    from peft.tuners.lora import layer as peft_layers

    # PEFT before 0.16 has no variants. Its only one, DoRA, shows in its option and its tensors
    if not hasattr(peft_layers, "LoraVariant") or adapter_name not in layer.lora_variant:
        return {}
    name = _name_of_class(layer.lora_variant[adapter_name])
    return {name: _VARIANTS_BY_NAME.get(name)}


def _name_of_class(thing: Any) -> str:
    """The full name of its class. FSDP2 derives a class of its own from each module's; that one is skipped."""
    for cls in type(thing).__mro__:
        if not cls.__module__.startswith("torch.distributed."):
            return f"{cls.__module__}.{cls.__qualname__}"
    raise AssertionError("object is always there")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _in(where: str | None) -> str:
    return f" in module {where!r}" if where else ""


def _because(kind: Kind | None) -> str:
    return ", which swift_lora_fix does not know" if kind is None else f" ({kind.name}: {kind.why})"
