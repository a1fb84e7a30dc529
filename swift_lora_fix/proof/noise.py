"""What numerics alone may change: the trainer scores once more, each layer's output moved by a rounding step."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch

SEED = 7
TF32 = 2.0**-10  # from 1 to its next number
# of these a float passes unrounded (in evaluation dropout does), or they only hold others
SILENT = (torch.nn.Identity, torch.nn.Dropout, torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.ParameterDict)


@contextlib.contextmanager
def shaken(
    model: torch.nn.Module, whole: Collection[torch.nn.Module] = (), engine: torch.dtype | None = None
) -> Iterator[None]:
    """Each leaf module's output x is x * (1 + u * step), rounded to its dtype again: u at random in [-1, 1], the same
    for the same shapes; step half the distance from 1 to the next number of the coarsest dtype, of the output's, the
    base's and the engine's: 2^-8 for bf16, and never finer than TF32, which kernels take for float32. Hooks only, gone
    afterwards.

    engine: what the engine computes in, where that is not the base's dtype.
    whole: modules that compute in place of their children while this lasts.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    coarsest = max([TF32, *(torch.finfo(dtype).eps for dtype in {*dtypes, engine or torch.float32})])
    generators: dict[torch.device, torch.Generator] = {}

    def shake(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        if not torch.is_tensor(output) or not output.is_floating_point():
            return None
        if output.device not in generators:
            generators[output.device] = torch.Generator(output.device).manual_seed(SEED)
        drawn = torch.rand(output.shape, generator=generators[output.device], device=output.device)
        step = max(torch.finfo(output.dtype).eps, coarsest) / 2
        return (output.float() * (1 + (drawn * 2 - 1) * step)).to(output.dtype)

    leaves = [m for m in model.modules() if not isinstance(m, SILENT) and (m in whole or not list(m.children()))]
    handles = [leaf.register_forward_hook(shake) for leaf in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
