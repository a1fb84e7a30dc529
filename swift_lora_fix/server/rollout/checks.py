"""Checks that vLLM can serve an adapter of a layout, before a byte of it comes. Only names and shapes, no values.

Legend for shapes: r rank, in/out the wrapped layer's features. A is (r, in), B is (out, r).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import ProtocolError, StagingError, UnsupportedAdapterError
from ...install import releases
from ...policy.files import TensorHeader
from ..wire import Layout

Pairs = dict[str, dict[str, tuple[int, ...]]]  # by module, the shapes of A and B

_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(embedding_)?(?P<side>[AB])(\.weight)?")
_FLOATS = ("F64", "F32", "BF16", "F16", "F8")


def check(layout: Layout, lora_config: Any, base: Mapping[str, TensorHeader]) -> None:
    """Raise StagingError, ProtocolError or UnsupportedAdapterError unless vLLM can serve an adapter of this layout.

    lora_config: vLLM's. base: the headers of the model's files, by tensor name.
    """
    config, dtype = layout.config, str(lora_config.lora_dtype).removeprefix("torch.")
    if layout.dtype != dtype:
        raise StagingError(
            f"An adapter comes as the engine holds it, in {dtype}, not in {layout.dtype} (--torch_dtype, or lora_dtype "
            "of --vllm_engine_kwargs)."
        )
    rank, patterns = config.get("r"), ("rank_pattern", "alpha_pattern", "use_rslora")
    if not isinstance(rank, int) or config.get("lora_alpha") != rank or any(map(config.get, patterns)):
        raise ProtocolError(
            f"The layout's config has r={rank!r} and lora_alpha={config.get('lora_alpha')!r}: the scaling is in B, and "
            "the config says 1 (r = lora_alpha, no patterns, no rsLoRA)."
        )
    pairs = _pairs(layout)
    for module, pair in pairs.items():
        _check_pair(module, pair, rank, lora_config.max_lora_rank)
    _check_fits(pairs, base)
    _ask_vllm(config, lora_config)


def _pairs(layout: Layout) -> Pairs:
    pairs: Pairs = {}
    for name, shape in layout.entries:
        found = _NAME.fullmatch(name)
        if found is None or len(shape) != 2:
            raise StagingError(
                f"The adapter has {name!r} {shape}, which is no LoRA matrix: names as in "
                "'base_model.model.<module>.lora_A.weight' are expected."
            )
        pairs.setdefault(found["module"], {})[found["side"]] = shape
    if not pairs:
        raise StagingError("The layout has no tensors: an adapter has at least one lora_A and one lora_B.")
    return pairs


def _check_pair(module: str, pair: dict[str, tuple[int, ...]], largest: int, room: int) -> None:
    """A module may have a smaller rank than ``r`` (rank_pattern): the scaling, in B, is the only thing it changes."""
    if len(pair) < 2:
        raise StagingError(f"The adapter has only lora_{next(iter(pair))} of {module!r}: A and B go together.")
    rank, columns = pair["A"][0], pair["B"][1]
    if rank != columns:
        raise StagingError(f"Of {module!r}, A has rank {rank} and B {columns}: these are not one adapter.")
    if rank > room:
        raise StagingError(
            f"{module!r} has rank {rank}, this server has room for {room}: start it with --vllm_max_lora_rank "
            f"{releases.engine_rank(rank) or rank}."
        )
    if rank > largest:
        raise StagingError(f"{module!r} has rank {rank}, the config says {largest}.")


def _check_fits(pairs: Pairs, base: Mapping[str, TensorHeader]) -> None:
    """Raise StagingError if a module is not the base's. vLLM's loader judges what the model's files do not name."""
    modules = {name.removesuffix(".weight"): header for name, header in base.items() if name.endswith(".weight")}
    if not modules.keys() & pairs.keys():
        return  # the files name modules differently than PEFT
    layers, kinds = {_kind(name) for name in modules}, {name.split(".")[-1] for name in modules}
    for module, pair in pairs.items():
        if module not in modules:
            if _kind(module) in layers or (module.split(".")[-1] not in kinds and ".experts" not in module):
                raise StagingError(f"The server's model has no module {module!r}: is the adapter one of another model?")
            continue
        weight, shape = modules[module], (pair["B"][0], pair["A"][1])
        if weight.dtype.startswith(_FLOATS) and sorted(shape) != sorted(weight.shape):  # Conv1D, embeddings: (in, out)
            raise StagingError(
                f"{module!r} is {tuple(weight.shape)} in the server's model, the adapter's A {pair['A']} and B "
                f"{pair['B']} are for {shape}: is the adapter one of another model?"
            )


def _kind(module: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", module)


def _ask_vllm(config: Mapping[str, Any], lora_config: Any) -> None:
    from vllm.lora.peft_helper import PEFTHelper

    try:
        PEFTHelper.from_dict(dict(config)).validate_legal(lora_config)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UnsupportedAdapterError(f"vLLM cannot serve the adapter: {error}") from error
