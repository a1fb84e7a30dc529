"""Proves a dense LoRA layer, before it is trusted: against float64, and against vLLM's own kernels.

The layer gets random factors whose update is about as large as the layer's own output. Its error, as the distance to
float64, must not be larger than that of vLLM's kernels by more than chance. A wrong row, slice or scale is as large as
the update itself, which is hundreds of times more.
"""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch

from .op import TOGETHER

TOKENS = (1, 5, 33, 129, TOGETHER + 7)  # numbers of tokens: each way through the operator and its kernel
ROWS = 1024  # outputs compared at a time, so that float64 needs little memory
# allowed: the root mean square and the largest error, in units of vLLM's own
MEAN, LARGEST = 1.5, 3.0
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}

Apply = Callable[..., torch.Tensor]
Result = TypeVar("Result")


def apart(work: Callable[[], Result], device: torch.device) -> Result:
    """Run ``work`` on a GPU in a thread of its own, and return its result.

    While vLLM loads a model, what this thread allocates lies in memory that vLLM takes away in a sleep. That would
    include the workspaces that cuBLAS keeps from the first product on, which the trainer's own products then use. The
    memory pool belongs to the thread (``torch.cuda.use_mem_pool``), and so do the workspaces.
    """
    if device.type != "cuda":
        return work()
    stream, context = torch.cuda.current_stream(device), contextvars.copy_context()

    def on_this_device() -> Result:
        with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(stream):
            return work()

    with ThreadPoolExecutor(1) as threads:
        return threads.submit(context.run, on_this_device).result()


def fill_slots(layer: Any, generator: torch.Generator) -> None:
    """A random adapter in the slots of a dense layer, whose update is about as large as the layer's own output."""
    weight = layer.base_layer.weight
    inputs, rank = weight.shape[1], layer.dense_b.shape[1]
    size = float(weight.float().square().mean().sqrt()) or 1 / math.sqrt(inputs)
    for slot in layer.lora_a_stacked:
        slot.copy_(normal(slot.shape, generator) / math.sqrt(inputs))
    for slot in layer.lora_b_stacked:
        slot.copy_(normal(slot.shape, generator) * size * math.sqrt(inputs / rank))


def clear_slots(layer: Any) -> None:
    for slot in (*layer.lora_a_stacked, *layer.lora_b_stacked):
        slot.zero_()


def normal(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Normally distributed float32, on the generator's device."""
    return torch.randn(tuple(shape), generator=generator, device=generator.device)


class Prover:
    """Proves each kind of layer once: class, shapes, dtype, with or without bias. manager: vLLM's, of these layers."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._known: dict[tuple[Any, ...], str | None] = {}

    @torch.no_grad()
    def problem_of(self, layer: Any, apply_before: Apply) -> str | None:
        """How the layer is off, or None. Its slots must be zero, and are zero again afterwards.

        apply_before: vLLM's own ``apply`` of this layer.
        """
        bias = getattr(layer.base_layer, "bias", None)
        kind = (type(layer), layer.dense_rows.shape, layer.dense_b.shape, tuple(layer.dense_slices), bias is not None)
        if kind not in self._known:
            try:
                work = partial(self._prove, layer, apply_before, bias)
                self._known[kind] = apart(work, layer.dense_rows.device)
            finally:
                clear_slots(layer)
                self._assign(layer, 1, has_adapter=False)  # vLLM's kernels go by what they were told last
        return self._known[kind]

    def _prove(self, layer: Any, apply_before: Apply, bias: torch.Tensor | None) -> str | None:
        weight = layer.base_layer.weight
        generator = torch.Generator(weight.device).manual_seed(0)
        fill_slots(layer, generator)
        room = layer.punica_wrapper._token_lora_indices.numel()
        for tokens in dict.fromkeys(min(tokens, room) for tokens in TOKENS):
            x = normal((tokens, weight.shape[1]), generator).to(weight.dtype)
            self._assign(layer, tokens, has_adapter=True)
            problem = _compare(layer, x, bias, layer.apply(x, bias), apply_before(x, bias))
            if problem is None:
                self._assign(layer, tokens, has_adapter=False)
                problem = _compare(layer, x, bias, layer.apply(x, bias), None)
            if problem is not None:
                return f"with {tokens} tokens {problem}"
        return None

    def _assign(self, layer: Any, tokens: int, has_adapter: bool) -> None:
        """Tell vLLM's kernels that all ``tokens`` have the adapter in slot 0, or none."""
        from vllm.lora.layers import LoRAMapping

        manager = self._manager
        mapping = LoRAMapping((int(has_adapter),) * tokens, (int(has_adapter),), is_prefill=True)
        slots = [1, *[None] * (manager.lora_slots - 1)]
        layer.punica_wrapper.update_metadata(mapping, slots, manager.lora_slots + 1, manager.vocab_size)


def _compare(
    layer: Any, x: torch.Tensor, bias: torch.Tensor | None, ours: torch.Tensor, theirs: torch.Tensor | None
) -> str | None:
    """How ``ours`` is off, or None. theirs: vLLM's own output; None where the tokens have no adapter."""
    weight, b = layer.base_layer.weight, layer.dense_b
    if ours.shape != (len(x), len(weight)) or ours.dtype != x.dtype or not ours.is_contiguous():
        return f"the output is {tuple(ours.shape)} of {ours.dtype}"
    exact = torch.empty(ours.shape, dtype=torch.float64, device=x.device)
    wide = x.double()
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        exact[:, rows] = wide @ weight[rows].double().T
        if bias is not None:
            exact[:, rows] += bias[rows].double()
    if theirs is not None:
        first = 0
        for slot, outputs in zip(layer.lora_a_stacked, layer.dense_slices):
            columns = slice(first, first + outputs)
            exact[:, columns] += (wide @ slot[0, 0].double().T) @ b[columns].double().T
            first += outputs
    off = (ours.double() - exact).abs()
    # vLLM's kernels are no measure for tokens without adapter (on a CPU they add it all the same), nor where they are
    # known to give NaN (releases.KERNEL_FAULTS)
    measure = (theirs.double() - exact).abs() if theirs is not None else ROUNDING[x.dtype] * exact.abs()
    if not bool(measure.isfinite().all()):
        measure = ROUNDING[x.dtype] * exact.abs()
    least = ROUNDING[x.dtype] * float(exact.square().mean().sqrt())
    for name, allowed, statistic in (("mean", MEAN, _root_mean_square), ("largest", LARGEST, torch.max)):
        found, limit = float(statistic(off)), allowed * max(float(statistic(measure)), least)
        if not found <= limit:
            return f"its {name} error is {found:.3g}, allowed {limit:.3g}"
    return None


def _root_mean_square(values: torch.Tensor) -> torch.Tensor:
    return values.square().mean().sqrt()
