"""Trainer side: which parameters make up the LoRA adapter, and their whole values. Nothing here writes to the trainer.

Legend for shapes: r rank, in/out the wrapped layer's features, vocab/hidden for embeddings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import TrainerModifiedError, UnsupportedAdapterError

DEFAULT_ADAPTER = "default"  # the adapter that ms-swift trains; --ref_adapters loads another one beside it
_CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."


@dataclass(frozen=True)
class AdapterEntry:
    """One LoRA tensor of the trainer.

    key: its name in PEFT's state dict, ``base_model.model.<module>.lora_A.weight``.
    parameter: the trainer's own parameter; A is (r, in), B is (out, r); embeddings (r, vocab) and (hidden, r).
    scale: what PEFT multiplies B·A·x by, ``module.scaling[adapter]``, on B entries; 1.0 on A entries.
    """

    key: str
    parameter: torch.nn.Parameter
    scale: float
    rank: int


@dataclass(frozen=True)
class Adapter:
    """The trainer's adapter, bound once: parameters are stable objects, their values are read at each sync."""

    name: str
    entries: tuple[AdapterEntry, ...]
    config: Any = field(repr=False)

    @property
    def max_rank(self) -> int:
        return max(entry.rank for entry in self.entries)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [entry.parameter for entry in self.entries]


def bind(model: torch.nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> Adapter:
    """Find the LoRA parameters of ``model``'s adapter.

    Args:
        model: the unwrapped ``peft.PeftModel`` of the trainer.
        adapter_name: the PEFT adapter to serve.

    Raises:
        UnsupportedAdapterError: no such adapter, not LoRA, or it has parts that vLLM's LoRA kernels cannot serve
            (vLLM's ``PEFTHelper`` rejects the same ones): DoRA, ``modules_to_save``, a trained bias.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.save_and_load import get_peft_model_state_dict

    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise UnsupportedAdapterError(f"The model has no PEFT adapter {adapter_name!r}; it has {sorted(configs)}.")
    config = configs[adapter_name]
    _check_servable(adapter_name, config)

    scale_of: dict[int, tuple[float, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.scaling:
            scale, rank = float(module.scaling[adapter_name]), int(module.r[adapter_name])
            if getattr(module, "use_dora", {}).get(adapter_name):
                raise UnsupportedAdapterError(_cannot_serve(adapter_name, f"DoRA (use_dora) in module {name!r}"))
            for parameter in _members(module, ("lora_A", "lora_embedding_A"), adapter_name):
                scale_of[id(parameter)] = (1.0, rank)
            for parameter in _members(module, ("lora_B", "lora_embedding_B"), adapter_name):
                scale_of[id(parameter)] = (scale, rank)

    named = {n.replace(_CHECKPOINT_WRAPPER, ""): p for n, p in model.named_parameters() if id(p) in scale_of}
    state = get_peft_model_state_dict(model, named, adapter_name=adapter_name, save_embedding_layers=False)
    entries = tuple(AdapterEntry(key, parameter, *scale_of[id(parameter)]) for key, parameter in state.items())
    if not entries:
        raise UnsupportedAdapterError(f"Adapter {adapter_name!r} of type {config.peft_type} has no LoRA parameters.")
    return Adapter(adapter_name, entries, config)


@contextlib.contextmanager
def whole_values(adapter: Adapter, trainer: Any) -> Iterator[Sequence[torch.Tensor]]:
    """Yield the whole value of each entry's parameter, in order, gathering the adapter alone.

    Plain and data-parallel: the live parameters. DeepSpeed ZeRO-3: ``GatheredParameters`` of the LoRA parameters.
    FSDP2: ``full_tensor()`` of the LoRA DTensors. All ranks must enter it together. Values are valid inside only.
    """
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    with contextlib.ExitStack() as stack:
        if plugin is not None and plugin.zero_stage == 3:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(adapter.parameters))
        with torch.no_grad():
            yield [_whole(parameter, trainer) for parameter in adapter.parameters]


def check_unmerged(model: torch.nn.Module) -> None:
    """Raise TrainerModifiedError where an adapter is merged into the trainer's base."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer) and module.merged]
    if merged:
        raise TrainerModifiedError(
            f"The trainer's adapter is merged into its base in {len(merged)} modules, the first {merged[0]!r}. A sync "
            "reads the base and the adapter apart: call model.unmerge_adapter() before training goes on."
        )


def _whole(parameter: torch.nn.Parameter, trainer: Any) -> torch.Tensor:
    value = parameter.detach()
    if hasattr(value, "full_tensor"):
        if value.is_cpu and trainer.accelerator.device.type != "cpu":  # FSDP2 with CPU offload
            value = value.to(trainer.accelerator.device)
        value = value.full_tensor()
    return value


def _members(module: Any, attributes: tuple[str, ...], adapter_name: str) -> Iterator[torch.nn.Parameter]:
    for attribute in attributes:
        container = getattr(module, attribute, {})
        if adapter_name in container:
            member = container[adapter_name]
            yield member if isinstance(member, torch.nn.Parameter) else member.weight


def _check_servable(adapter_name: str, config: Any) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise UnsupportedAdapterError(_cannot_serve(adapter_name, f"a PEFT adapter of type {kind}"))
    found = {
        "modules_to_save": getattr(config, "modules_to_save", None),
        "use_dora": getattr(config, "use_dora", False),
        "lora_bias": getattr(config, "lora_bias", False),
        "bias": getattr(config, "bias", "none") not in ("none", None) and config.bias,
    }
    for name, value in found.items():
        if value:
            raise UnsupportedAdapterError(_cannot_serve(adapter_name, f"{name}={value!r}"))


def _cannot_serve(adapter_name: str, what: str) -> str:
    return (
        f"vLLM's LoRA cannot serve adapter {adapter_name!r}: it has {what}. "
        "Use --vllm_enable_lora false for this adapter, or train it without that."
    )
