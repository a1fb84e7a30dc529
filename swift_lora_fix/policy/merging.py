"""Trainer side of fused mode: which of the engine's weights depend on the adapter, and their values with it.

For a LoRA layer of weight W (out, in)::

    W' = cast(W + (B @ A) * s)

W, A and B are converted to float32; product and sum are float32; the result is rounded once, to the engine's dtype, in
bfloat16 by chance (rounding.py). So each element is off by at most
``|W' - (W + s*B@A)| <= u*|W'| + g*(|s|*(|B| @ |A|) + |W|)``, for a W that the engine's dtype has, with
u = 2**-7 for bfloat16 and 2**-11 for float16, and g = (r + 3) * 2**-24, the usual bound of an inner product of length r
and two more operations (N. Higham, Accuracy and Stability of Numerical Algorithms, sections 2.1 and 3.1). On a GPU a
kernel computes the products with two bfloat16 for each float32, and g grows by 1.25 * 2**-16
(engine/vllm/kernels/fold_kernel.py). PyTorch computes whatever the kernel does not, with TF32 products if the run
allows TF32 (--tf32 true).

Everything else that PEFT calls LoRA (DoRA, embeddings, convolutions, a bias on B) is merged by PEFT itself, in a
float32 twin of the layer. The trainer's layers are only read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import UnsupportedAdapterError
from . import kinds
from .adapter import clean_name, of_another_adapter
from .rounding import rounded, seed_of

Values = Mapping[str, torch.Tensor]  # whole values, by ``MergedModule``'s names of its parameters


@dataclass(frozen=True)
class Factors:
    """The parts of a plain linear LoRA's merged weight W + scale*B*A: w (out, in), b (out, r), a (r, in). seed: of the
    rounding; row and column: where the block ``w`` begins in the weight, on which the rounding depends too."""

    w: torch.Tensor
    b: torch.Tensor
    a: torch.Tensor
    scale: float
    seed: int
    row: int = 0
    column: int = 0

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class MergedModule:
    """A part of the trainer whose weights the engine gets with the adapter in them.

    path: in the trainer's model.
    module: PEFT's wrapper there (a LoRA layer, a ``ModulesToSaveWrapper``), or the module whose bias is trained.
    parameters: the trainer's parameters that the values are computed from, by their names in ``module``; all-gathered
        together. While FSDP2 computes, the module holds other ones.
    sent: maps names in ``named_parameters()`` that ms-swift sends, and that are to be replaced, to names in
        ``parameters``: a LoRA layer's weight, or what ``modules_to_save`` or a trained bias holds.
    plain: the same, mapped to the parameters without the adapter.
    inner, inner_plain: names of the submodules that, given these values, compute what ``module`` computes, with the
        adapter and without. None for a bias, which nothing wraps.
    is_plain: PEFT's ``merge`` of the one weight is exactly W + s*B*A; the tests compare the two.
    """

    path: str
    adapter: str
    module: Any = field(repr=False)
    parameters: Mapping[str, torch.nn.Parameter] = field(repr=False)
    sent: Mapping[str, str]
    plain: Mapping[str, str]
    inner: str | None = None
    inner_plain: str | None = None
    is_plain: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(self.sent)

    @torch.no_grad()
    def values(self, whole: Values) -> dict[str, torch.Tensor]:
        """The weights with the adapter, by source, contiguous: float32 for a LoRA layer, else in their own dtype."""
        if not self.is_lora:
            return {source: whole[name] for source, name in self.sent.items()}
        with torch.autocast(next(iter(whole.values())).device.type, enabled=False):  # float32 products, whoever calls
            return self._merged(whole)

    def _merged(self, whole: Values) -> dict[str, torch.Tensor]:
        factors = self.factors(whole)
        if factors is not None:
            delta = torch.mm(factors.b.float(), factors.a.float()).mul_(factors.scale)
            return {source: delta.add_(factors.w) for source in self.sent}
        twin = merged_twin(self, whole)
        return {source: twin.get_parameter(name).data.contiguous() for source, name in self.sent.items()}

    def factors(self, whole: Values) -> Factors | None:
        """The factors of its one weight; None unless ``is_plain``."""
        if not self.is_plain:
            return None
        ((source, name),) = self.sent.items()
        a, b = (whole[f"lora_{part}.{self.adapter}.weight"] for part in "AB")
        return Factors(whole[name], b, a, float(self.module.scaling[self.adapter]), seed_of(source))

    def rounded(self, values: Values, whole: Values, dtype_of: Callable[[str], torch.dtype]) -> dict[str, torch.Tensor]:
        """``values`` as the engine holds them, by source. dtype_of: its dtype of a source."""
        plain = self.plain_values(whole)
        return {
            source: rounded(value, plain[source], dtype_of(source), seed_of(source))
            if self.is_lora
            else value.to(dtype_of(source))
            for source, value in values.items()
        }

    def plain_values(self, whole: Values) -> dict[str, torch.Tensor]:
        """The weights without the adapter, by source."""
        return {source: whole[name] for source, name in self.plain.items()}

    @property
    def is_lora(self) -> bool:
        """Whether the values are computed (a LoRA layer), or the trained parameters as they are."""
        return self.inner is not None and self.inner == self.inner_plain


def bind(model: torch.nn.Module, adapter_name: str) -> tuple[MergedModule, ...]:
    """Find all modules of ``model``, the trainer's unwrapped ``peft.PeftModel``, that the adapter changes.

    Raises UnsupportedAdapterError naming what this mode does not serve (policy/kinds.py), or a LoRA layer around
    something that has no weight of its own.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    problem = kinds.find_unserved(model, adapter_name, "fused")
    if problem is not None:
        raise UnsupportedAdapterError(f"adapter {adapter_name!r} has {problem}")
    found: list[MergedModule] = []
    known: set[int] = set()
    inner: set[int] = set()  # wrappers of parameters that are a part of one that was found
    modules = [(clean_name(path), module) for path, module in model.named_modules()]
    for path, module in modules:
        if id(module) in inner:
            continue
        if kinds.wraps_parameter(module):
            wrappers = _nested(module)
            inner |= {id(wrapper) for wrapper in wrappers}
            if any(adapter_name in wrapper.scaling for wrapper in wrappers):
                found.append(_wrapped_parameters(path, module, wrappers, adapter_name))
            else:
                continue
        elif isinstance(module, LoraLayer) and adapter_name in module.scaling:
            found.append(_layer(path, module, adapter_name))
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            found.append(_saved(path, module, adapter_name))
        else:
            continue
        one = found[-1]
        known |= {id(p) for name, p in one.parameters.items() if "lora_" in name or not name.startswith("base_layer.")}
        known |= {id(one.parameters[name]) for name in one.sent.values()}
    for path, module in modules:
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in known:
                continue
            if not of_another_adapter(f"{path}.{name}", adapter_name):
                sent = {f"{path}.{name}": name}
                found.append(MergedModule(path, adapter_name, module, {name: parameter}, sent, sent))
    return tuple(found)


def tied(model: torch.nn.Module, modules: Iterable[MergedModule]) -> tuple[str, str] | None:
    """Names of an adapted weight and of one tied to it (the same parameter) that is used without the adapter, or None.

    Such are tied embeddings with only ``embed_tokens`` or only ``lm_head`` adapted: vLLM has one weight for both.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(clean_name(name))
    for module in modules:
        for source, name in module.plain.items():
            adapted = {source, f"{module.path}.{name}"}
            others = [other for other in names.get(id(module.parameters[name]), ()) if other not in adapted]
            if others:
                return source, others[0]
    return None


def merged_twin(module: MergedModule, whole: Values) -> Any:
    """A float32 twin of PEFT's layer that shares no memory with it, merged by PEFT's own ``merge``."""
    twin = twin_of(module.module, {name: value.to(torch.float32, copy=True) for name, value in whole.items()})
    for layer in _nested(twin) if kinds.wraps_parameter(twin) else (twin,):
        layer.merge(safe_merge=False, adapter_names=[module.adapter])
    return twin


def twin_of(module: Any, values: Values, prefix: str = "") -> Any:
    """A copy of the module with ``values``, by name, as its parameters. Lists and dicts are copied, hooks are not.

    Attributes on the object that would act on the original are left out too: ms-swift's ``patch_lora_merge`` leaves
    each layer's own bound ``merge`` behind as an attribute, and accelerate's hooks a ``forward``.
    """
    twin = object.__new__(module.__class__)  # the __new__ of FSDP2's classes makes something else
    twin.__dict__ = {
        name: copy.copy(value) if isinstance(value, (dict, list, set)) else value
        for name, value in module.__dict__.items()
        if getattr(value, "__self__", None) is not module and name not in ("forward", "_old_forward")
    }
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        twin.__dict__[name] = type(module.__dict__[name])()
    twin._parameters = {
        name: torch.nn.Parameter(values[prefix + name], requires_grad=False) if prefix + name in values else held
        for name, held in module._parameters.items()
    }
    twin._modules = {name: held and twin_of(held, values, f"{prefix}{name}.") for name, held in module._modules.items()}
    return twin


def _layer(path: str, layer: Any, adapter_name: str) -> MergedModule:
    parameters = {
        name: parameter
        for name, parameter in layer.named_parameters()
        if name.startswith("base_layer.") or adapter_name in name.split(".")
    }
    sources = ["weight", "bias"] if f"lora_B.{adapter_name}.bias" in parameters else ["weight"]
    sent = {f"{path}.base_layer.{name}": f"base_layer.{name}" for name in sources}
    if any(name not in parameters for name in sent.values()):
        what = f"{type(layer).__name__} around a {type(layer.get_base_layer()).__name__}"
        raise UnsupportedAdapterError(f"{path} is a {what}, which has no weight of its own to fold an adapter into")
    plain = kinds.is_plain_linear(layer, adapter_name)
    return MergedModule(path, adapter_name, layer, parameters, sent, sent, "base_layer", "base_layer", plain)


def _nested(wrapper: Any) -> list[Any]:
    """PEFT's wrapper of a parameter, and those that it wraps: one for each ``target_parameters`` of the same module."""
    found = [wrapper]
    while kinds.wraps_parameter(found[-1].base_layer):
        found.append(found[-1].base_layer)
    return found


def _wrapped_parameters(path: str, outer: Any, wrappers: list[Any], adapter_name: str) -> MergedModule:
    """All wrapped parameters of one module, usually the stacked weights of its experts: (experts, out, in)."""
    base = ".".join(["base_layer"] * len(wrappers))
    parameters = {
        name: parameter
        for name, parameter in outer.named_parameters()
        if ("lora_" in name and adapter_name in name.split(".")) or name.startswith(f"{base}.") and "lora_" not in name
    }
    adapted = [wrapper.parameter_name for wrapper in wrappers if adapter_name in wrapper.scaling]
    sent = {f"{path}.{base}.{name}": f"{base}.{name}" for name in adapted}
    return MergedModule(path, adapter_name, outer, parameters, sent, sent, base, base)


def _saved(path: str, wrapper: Any, adapter_name: str) -> MergedModule:
    inner, plain = f"modules_to_save.{adapter_name}", "original_module"
    names = [name for name, _ in wrapper.get_submodule(inner).named_parameters()]
    parameters = {
        name: parameter for name, parameter in wrapper.named_parameters() if name.startswith((f"{inner}.", f"{plain}."))
    }
    sent = {f"{path}.{inner}.{name}": f"{inner}.{name}" for name in names}
    before = {f"{path}.{inner}.{name}": f"{plain}.{name}" for name in names}
    return MergedModule(path, adapter_name, wrapper, parameters, sent, before, inner, plain)
