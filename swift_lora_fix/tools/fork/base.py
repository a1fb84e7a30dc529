"""Checks that an adapter and a base model belong together: by name, and by the shapes of every target module.

The shapes come from safetensors headers; no weight is read. Legend: r rank, in/out the wrapped layer's features.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import AdapterFileError, ForkError
from ...policy.files import TensorHeader, read_header, read_json
from .source import Source

_LORA_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
_NESTED = re.compile(r"(\.base_layer)+$")  # PEFT nests the wrappers of several parameters of one module
_HUB_CACHE = re.compile(r"models--(?:.*--)?([^/]+)/snapshots/")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Base:
    """The base that the fork goes on with. name: for ``--model``. changed: it is not the source's. notes: what was
    checked, in words."""

    name: str
    changed: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """A module that the adapter changes. a: (r, in), b: (out, r); for an embedding (r, vocab) and (hidden, r).

    parameter: the adapter is of a parameter (PEFT's ``target_parameters``): (r * experts, in) and (out, r * experts).
    """

    module: str
    a: tuple[int, ...]
    b: tuple[int, ...]
    embedding: bool
    parameter: bool = False

    def weight_shape(self, fan_in_fan_out: bool) -> tuple[int, ...] | None:
        """The shape that the base's weight must have; None when 2-D factors do not determine it (convolutions)."""
        if len(self.a) != 2 or len(self.b) != 2 or self.parameter:
            return None
        shape = (self.b[0], self.a[1])
        return shape[::-1] if self.embedding or fan_in_fan_out else shape


def agree(source: Source, header: Mapping[str, TensorHeader], wanted: str | None = None) -> Base:
    """Check that adapter and base belong together.

    Args:
        source: the adapter. header: of its tensors. wanted: ``--base``, a model id or folder; by default the source's.

    Raises:
        AdapterFileError: the adapter's own tensors and configuration contradict each other.
        ForkError: names or shapes do not agree; names up to four modules with both shapes.
    """
    targets = targets_of(header, source)
    _check_rank(source, targets)
    own, named = str(source.config.get("base_model_name_or_path") or ""), str(source.args.get("model") or "")
    local = str(source.args.get("model_dir") or "")
    if not wanted and own and named and own != local and model_name(own) != model_name(named):
        raise ForkError(
            f"{source.folder} names two base models, {own!r} in adapter_config.json and {named!r} in args.json: say "
            "with --base which one is right."
        )
    name = _absolute(wanted) if wanted else named or own
    if not name:
        raise ForkError(f"{source.folder} does not say which base model it belongs to: give it with --base.")
    place = next((Path(p) for p in ([name] if wanted else [own, local, name]) if p and Path(p).is_dir()), None)
    changed = bool(wanted) and name not in (own, named, local)
    renamed = changed and model_name(name) not in (model_name(own), model_name(named))
    if place is None:
        if wanted and wanted.startswith(("/", ".", "~")):
            raise ForkError(f"--base {wanted} does not exist.")
        if renamed:
            raise ForkError(
                f"--base {wanted} is another name than the source's {named or own!r} and no local folder, so that no "
                "shapes can be compared: give a folder that holds its safetensors files."
            )
        return Base(name, changed, (f"base model {name}: the name agrees; no local folder, shapes not checked",))
    words = f"another name than the source's {named or own}" if renamed else "the name agrees"
    return Base(name, changed, (f"base model {name}: {words}; {_compare(place, targets, source)}",))


def targets_of(header: Mapping[str, TensorHeader], source: Source) -> dict[str, Target]:
    """The adapter's modules, by name. Raises AdapterFileError when A or B is missing, or their ranks differ."""
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    embeddings = set()
    for key, tensor in header.items():
        if match := _LORA_KEY.fullmatch(key):
            parts.setdefault(match[1], {})[match[3]] = tensor.shape
            embeddings |= {match[1]} if match[2] else set()
    if not parts:
        raise AdapterFileError(f"{source.weights} has no LoRA tensors; it holds {sorted(header)[:4]}.")
    targets, wrapped = {}, source.config.get("target_parameters") or []
    for module, both in parts.items():
        if len(both) != 2:
            raise AdapterFileError(f"{source.weights} has only lora_{next(iter(both))} of {module}.")
        inner = _NESTED.sub("", module)
        parameter = any(f".{inner}".endswith(f".{each.rpartition('.')[0]}") for each in wrapped)
        name = inner if parameter else module
        target = targets[module] = Target(name, both["A"], both["B"], module in embeddings, parameter)
        if len(target.b) >= 2 and target.a[0] != target.b[1]:
            raise AdapterFileError(
                f"{source.weights}: the ranks of {module} differ: A {list(target.a)}, B {list(target.b)}."
            )
    return targets


def max_rank(targets: Mapping[str, Target], source: Source) -> int:
    said = [source.config.get("r") or 0, *(source.config.get("rank_pattern") or {}).values()]
    return max(max(said) if target.parameter else target.a[0] for target in targets.values())


def model_name(path: str) -> str:
    """The name of a model from its id or folder, also in the caches of Hugging Face and ModelScope."""
    cached = _HUB_CACHE.search(path + "/")
    return (cached[1] if cached else path.rstrip("/").rsplit("/", 1)[-1]).replace("___", ".")


def quantization_of(source: Source) -> str | None:
    """How the source's base was quantised, as ms-swift's arguments, or None."""
    method, bits = source.args.get("quant_method"), source.args.get("quant_bits")
    return f"--quant_method {method}" + (f" --quant_bits {bits}" if bits else "") if method else None


def _check_rank(source: Source, targets: Mapping[str, Target]) -> None:
    plain = not source.config.get("rank_pattern") and not source.config.get("target_parameters")
    wrong = [t for t in targets.values() if plain and t.a[0] != source.config.get("r")]
    if wrong:
        raise AdapterFileError(
            f"{source.weights} has rank {wrong[0].a[0]} in {wrong[0].module}, but its adapter_config.json says "
            f"r={source.config.get('r')}: they are not of one adapter."
        )


def _absolute(name: str) -> str:
    expanded = os.path.expanduser(name)
    return os.path.abspath(expanded) if os.path.isdir(expanded) else name


def _compare(place: Path, targets: Mapping[str, Target], source: Source) -> str:
    base = _read_base(place)
    if not base:
        return f"{place} has no safetensors files, shapes not checked"
    flipped = bool(source.config.get("fan_in_fan_out"))
    checked, wrong = 0, []
    for target in targets.values():
        agrees, words = _judge(target, base, flipped)
        checked += agrees is True
        if agrees is False:
            wrong.append(f"{target.module} {words}")
    if wrong:
        raise ForkError(
            f"The adapter {source.folder} does not fit the base model {place}: {len(wrong)} of {len(targets)} target "
            f"modules disagree: {'; '.join(wrong[:4])}. Give the right base model with --base."
        )
    rest = f", {len(targets) - checked} cannot be told from the headers" if checked < len(targets) else ""
    return f"the shapes of {checked} of {len(targets)} target modules agree{rest}"


def _judge(target: Target, base: Mapping[str, TensorHeader], flipped: bool) -> tuple[bool | None, str]:
    """True: the shapes agree. False: they do not, with the reason. None: unknown."""
    expected = target.weight_shape(flipped)
    found = list(_weights(target.module, base))
    if not found:
        # a tied output layer is in no file
        tied = target.module.rsplit(".", 1)[-1] in ("lm_head", "embed_out")
        return (None, "") if tied else (False, "is not in it")
    plain = [weight for weight in found if weight is not None]
    if not plain or expected is None:
        return None, ""
    if any(_fits(weight, expected) for weight in plain):
        return True, ""
    return False, f"is for a weight of {list(expected)}, it has {list(plain[0].shape)}"


def _fits(weight: TensorHeader, expected: tuple[int, ...]) -> bool:
    if weight.dtype == "U8":  # bitsandbytes packs two 4-bit values into a byte
        elements = 1
        for size in weight.shape:
            elements *= size
        return 2 * elements == expected[0] * expected[1]
    return weight.shape == expected


def _weights(module: str, base: Mapping[str, TensorHeader]) -> Iterator[TensorHeader | None]:
    """The base's tensors of a module; None for one that is packed or split, so that its shape is unknown.

    transformers and the files name modules differently (``model.language_model.layers``, ``model.layers``). Without an
    exact match, the longest end of the name that some tensor has is used.
    """
    if f"{module}.weight" in base:
        yield base[f"{module}.weight"]
        return
    parts = module.split(".")
    for start in range(len(parts)):
        end = ".".join(parts[start:])
        if start and not any(part.isdigit() for part in parts[start:]):
            return
        inside = [key for key in base if key.startswith(f"{end}.") or f".{end}." in key]
        if inside:
            exact = [key for key in inside if key == f"{end}.weight" or key.endswith(f".{end}.weight")]
            yield from (base[key] for key in exact) if exact else (None,)
            return


def _read_base(place: Path) -> dict[str, TensorHeader]:
    index = place / INDEX
    if index.is_file():
        weight_map: dict[str, Any] = read_json(index).get("weight_map", {})
        files = sorted({place / str(name) for name in weight_map.values()})
    else:
        files = sorted(place.glob("*.safetensors"))
    headers: dict[str, TensorHeader] = {}
    for file in files:
        headers.update(read_header(file))
    return headers
