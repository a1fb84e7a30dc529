"""Trainer side: the LoRA adapter's parameters and their whole values. Nothing here writes to the trainer.

Legend for shapes: r rank, in/out the wrapped layer's features, vocab/hidden for embeddings.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..common.words import PLAIN, Words
from ..errors import TrainerModifiedError, UnsupportedAdapterError
from . import kinds

DEFAULT_ADAPTER = "default"  # the adapter that ms-swift trains; --ref_adapters loads another one beside it
CHUNK_BYTES = 64 << 20
_CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."


@dataclass(frozen=True)
class AdapterEntry:
    """One tensor of the trainer's adapter: LoRA's A or B, or, in fused mode, whatever else is trained.

    key: its name in PEFT's state dict, ``base_model.model.<module>.lora_A.weight``.
    parameter: the trainer's own parameter; A is (r, in), B is (out, r); embeddings (r, vocab) and (hidden, r).
    scale: what PEFT multiplies B·A·x by, ``module.scaling[adapter]``, on B entries; 1.0 on all others.
    rank: of A and B; 0 elsewhere.
    holder, name: where its module keeps it, ``holder[name] is parameter``.
    """

    key: str
    parameter: torch.nn.Parameter
    scale: float
    rank: int
    holder: dict[str, Any] = field(repr=False)
    name: str
    layer: Any = field(repr=False)  # PEFT's LoRA layer; None for a parameter outside of them

    @property
    def is_b(self) -> bool:
        return kinds.is_b(self.key)

    @property
    def shape(self) -> torch.Size:
        """The whole shape. (A ZeRO-3 parameter itself is empty while it is not gathered.)"""
        return getattr(self.parameter, "ds_shape", self.parameter.shape)


@dataclass(frozen=True)
class Chunk:
    """Consecutive entries that are gathered and written together, which bounds the memory that this needs."""

    entries: tuple[AdapterEntry, ...]
    parameters: tuple[torch.nn.Parameter, ...] = field(repr=False)


@dataclass(frozen=True)
class Adapter:
    """The trainer's adapter. The parameter objects are bound once, their values are read at each sync.

    sharding: how the parameters are spread over ranks: ``none`` (also data-parallel), ``zero3`` or ``fsdp2``.
    layers: PEFT's LoRA layers. chunks: the entries again, in parts of at most ``CHUNK_BYTES`` in fp32.
    words: how the trainer's users call things, for messages about this adapter.
    """

    name: str
    entries: tuple[AdapterEntry, ...]
    config: Any = field(repr=False)
    sharding: Literal["none", "zero3", "fsdp2"]
    layers: tuple[Any, ...] = field(repr=False)
    chunks: tuple[Chunk, ...] = field(repr=False)
    parameters: tuple[torch.nn.Parameter, ...] = field(repr=False)
    words: Words = field(default=PLAIN, repr=False, compare=False)

    @property
    def max_rank(self) -> int:
        return max(entry.rank for entry in self.entries)


def bind(
    model: torch.nn.Module, adapter_name: str = DEFAULT_ADAPTER, apart: bool = True, words: Words = PLAIN
) -> Adapter:
    """Find the parameters of ``model``'s adapter.

    Args:
        model: the unwrapped ``peft.PeftModel`` of the trainer.
        adapter_name: the PEFT adapter to serve.
        apart: the engine gets base and LoRA apart, for vLLM's LoRA kernels. False: folded into one (fused mode). Then
            the adapter is everything that is trained: also DoRA's magnitudes, ``modules_to_save``, biases.
        words: how the trainer's users call things.

    Raises:
        UnsupportedAdapterError: no such adapter; or its kind is unknown, or not served this way (policy/kinds.py); or,
            with ``apart``, a parameter outside the LoRA is trained: the engine, given the base once, would not see it.
    """
    from peft.tuners.lora import LoraLayer

    config = kinds.config_of(model, adapter_name)
    kinds.check(model, adapter_name, "adapter" if apart else "fused", words)
    layers: list[Any] = []
    entries: list[AdapterEntry] = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.scaling:
            layers.append(module)
            entries += _entries(clean_name(name), module, adapter_name)
    if not entries:
        raise UnsupportedAdapterError(f"Adapter {adapter_name!r} of type {config.peft_type} has no LoRA parameters.")
    if apart:
        _check_base_is_frozen(model, words)
    else:
        entries += _other_entries(model, adapter_name, {id(entry.parameter) for entry in entries})
    parameters = tuple(entry.parameter for entry in entries)
    sharding, chunks = _sharding(parameters), tuple(_chunks(entries))
    return Adapter(adapter_name, tuple(entries), config, sharding, tuple(layers), chunks, parameters, words)


def of_tensors(
    name: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], scales: Mapping[str, float] | None = None
) -> Adapter:
    """An adapter that an engine received. tensors: by PEFT key, in the trainer's order (so the chunks are the same).
    config: PEFT's, as in ``adapter_config.json``. scales: by key, factors that B lacks; None: B has its scaling."""
    entries = []
    for key, tensor in tensors.items():
        rank = int(tensor.shape[1] if kinds.is_b(key) else tensor.shape[0])
        parameter: Any = tensor  # users of an adapter only read its values
        scale = (scales or {}).get(key, 1.0)
        entries.append(AdapterEntry(key, parameter, scale, rank, {key: tensor}, key, None))
    parameters = tuple(entry.parameter for entry in entries)
    return Adapter(name, tuple(entries), config, "none", (), tuple(_chunks(entries)), parameters)


def _sharding(parameters: Sequence[torch.nn.Parameter]) -> Literal["none", "zero3", "fsdp2"]:
    if any(hasattr(parameter, "ds_id") for parameter in parameters):  # deepspeed.zero.partition_parameters
        return "zero3"
    return "fsdp2" if any(hasattr(parameter, "full_tensor") for parameter in parameters) else "none"


def _chunks(entries: Sequence[AdapterEntry]) -> Iterator[Chunk]:
    part: list[AdapterEntry] = []
    size = 0
    for entry in entries:
        elements = math.prod(entry.shape)
        if part and size + 4 * elements > CHUNK_BYTES:
            yield Chunk(tuple(part), tuple(e.parameter for e in part))
            part, size = [], 0
        part.append(entry)
        size += 4 * elements
    yield Chunk(tuple(part), tuple(e.parameter for e in part))


def whole_values(
    adapter: Adapter, chunk: Chunk, device: torch.device
) -> contextlib.AbstractContextManager[Sequence[torch.Tensor]]:
    """``whole`` for the parameters of ``chunk``."""
    return whole(chunk.parameters, adapter.sharding, device)


@contextlib.contextmanager
def whole(
    parameters: Sequence[torch.nn.Parameter], sharding: Literal["none", "zero3", "fsdp2"], device: torch.device
) -> Iterator[Sequence[torch.Tensor]]:
    """Yield the whole value of each of ``parameters``, gathering nothing else; valid inside only.

    Unsharded: the live parameters themselves. DeepSpeed ZeRO-3: ``GatheredParameters`` of those that are not gathered
    already. FSDP2: ``full_tensor()`` of the DTensors, moved to ``device`` first if they are offloaded to the CPU. A
    collective when sharded: all ranks must ask for the same parameters.
    """
    with contextlib.ExitStack() as stack:
        if sharding == "zero3":
            import deepspeed

            apart = [p for p in parameters if hasattr(p, "ds_id") and p.numel() != p.ds_numel]
            stack.enter_context(deepspeed.zero.GatheredParameters(apart))
        with torch.no_grad():
            if sharding == "fsdp2":
                yield [p.detach().to(device).full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
            else:
                yield parameters


def local_parts(adapter: Adapter) -> list[torch.Tensor]:
    """What this rank holds of each entry: the parameter, its ZeRO-3 partition or its FSDP2 shard; a zero if nothing."""
    parts = [local_part(parameter) for parameter in adapter.parameters]
    return [part if part.numel() else part.new_zeros(1) for part in parts]


def local_part(parameter: Any) -> torch.Tensor:
    """What this rank holds of a parameter: all of it, its ZeRO-3 partition or its FSDP2 shard."""
    if hasattr(parameter, "ds_id"):
        return _partition(parameter)
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def frozen_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The base's own parameters, by name: all but LoRA and whatever else is trained."""
    return [(n, p) for n, p in model.named_parameters() if "lora_" not in n and not p.requires_grad]


def packed_buffers(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """What the layers of a GPTQ or AWQ base hold, by name: in gptqmodel, AutoAWQ and AutoRound these are buffers."""
    found = []
    for name, module in model.named_modules():
        if "qweight" in module._buffers:
            kept = [key for key in module._buffers if key not in module._non_persistent_buffers_set]
            found += [(f"{name}.{key}", buffer) for key in kept if (buffer := module._buffers[key]) is not None]
    return found


def clean_name(name: str) -> str:
    """The name of a module or parameter without the prefix that activation checkpointing inserts."""
    return f"{name}.".replace(_CHECKPOINT_WRAPPER, "").removesuffix(".")


def of_another_adapter(name: str, adapter_name: str) -> bool:
    """Whether a parameter belongs to a LoRA or a ``modules_to_save`` of another adapter (--ref_adapters)."""
    parts = name.split(".")
    mine = adapter_name in parts
    return not mine and ("modules_to_save" in parts or any(part.startswith("lora_") for part in parts))


def changed_scalings(adapter: Adapter) -> list[str]:
    """Modules whose PEFT scaling changed since they were bound, with both numbers."""
    return [
        f"{entry.key.rsplit('.lora_', 1)[0]} {entry.scale:g} -> {float(entry.layer.scaling[adapter.name]):g}"
        for entry in adapter.entries
        if entry.is_b and float(entry.layer.scaling[adapter.name]) != entry.scale
    ]


@contextlib.contextmanager
def scaled(adapter: Adapter, factor: float) -> Iterator[None]:
    """The model with its adapter times ``factor`` (0: the plain base). Only PEFT's scalings change, temporarily."""
    layers = [layer for layer in adapter.layers if factor != 1.0]
    before = [layer.scaling[adapter.name] for layer in layers]
    try:
        for layer, number in zip(layers, before):
            layer.scaling[adapter.name] = number * factor
        yield
    finally:
        for layer, number in zip(layers, before):
            layer.scaling[adapter.name] = number


def read_to_host(adapter: Adapter, device: torch.device) -> dict[str, torch.Tensor]:
    """Copy the whole adapter to the CPU, chunk by chunk, in the trainer's dtypes; the copies alias nothing."""
    host = {}
    for chunk in adapter.chunks:
        with whole_values(adapter, chunk, device) as values:
            for entry, value in zip(chunk.entries, values):
                host[entry.key] = value.detach().to("cpu", copy=True)
    return host


def is_still_bound(adapter: Adapter) -> bool:
    """Whether the model's modules still hold the parameters that were bound.

    True for FSDP2: it swaps shards and whole parameters itself, and the shards that were bound are what is trained.
    """
    return adapter.sharding == "fsdp2" or all(entry.holder[entry.name] is entry.parameter for entry in adapter.entries)


def check_unmerged(adapter: Adapter) -> None:
    """Raise TrainerModifiedError where the trainer has an adapter merged into its base."""
    merged = [index for index, layer in enumerate(adapter.layers) if layer.merged]
    if merged:
        raise TrainerModifiedError(
            f"The trainer's adapter is merged into its base in {len(merged)} of {len(adapter.layers)} modules. A sync "
            "reads the base and the adapter apart: call model.unmerge_adapter() before training goes on."
        )


def _partition(parameter: Any) -> torch.Tensor:
    """This rank's ZeRO-3 partition without its padding: DeepSpeed does not initialise that, so it may be NaN."""
    start = torch.distributed.get_rank(parameter.ds_process_group) * parameter.ds_tensor.numel()
    return parameter.ds_tensor[: max(0, parameter.ds_numel - start)]


def _entries(module_name: str, module: Any, adapter_name: str) -> Iterator[AdapterEntry]:
    """The trained tensors of a LoRA layer, under the keys of PEFT's ``get_peft_model_state_dict``. That function is not
    used: from PEFT 0.21 on it misses parameters whose names were cleaned of activation checkpointing's prefix.
    """
    scaling, rank = float(module.scaling[adapter_name]), int(module.r[adapter_name])
    for path, key in kinds.tensors_of(module, adapter_name):
        inner, _, name = path.rpartition(".")
        holder = module.get_submodule(inner)._parameters
        scale = scaling if kinds.is_b(key) else 1.0
        yield AdapterEntry(f"{module_name}.{key}", holder[name], scale, rank, holder, name, module)


def _other_entries(model: torch.nn.Module, adapter_name: str, known: set[int]) -> Iterator[AdapterEntry]:
    """What is trained outside the LoRA layers: ``modules_to_save``, biases."""
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            full = f"{clean_name(path)}.{name}"
            if parameter is not None and parameter.requires_grad and id(parameter) not in known:
                if of_another_adapter(full, adapter_name):
                    continue
                known.add(id(parameter))
                key = full.replace(f".modules_to_save.{adapter_name}.", ".")
                yield AdapterEntry(key, parameter, 1.0, 0, module._parameters, name, None)


def _check_base_is_frozen(model: torch.nn.Module, words: Words) -> None:
    # other adapters' LoRA (ms-swift's --ref_adapters) may require gradients, but is not active
    trained = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    if trained:
        raise UnsupportedAdapterError(
            f"{len(trained)} parameters beside the LoRA are trained, the first {trained[0]!r}. The engine gets the "
            f"base once, so rollouts would lack what they learn: freeze them, or use {words.without_lora} (fused mode)."
        )
