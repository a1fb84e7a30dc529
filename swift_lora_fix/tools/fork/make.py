"""Writes the folder of a fork, all of it or nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...common.atomic import all_or_nothing
from ...errors import AdapterFileError, ForkError, MissingPackageError, SettingsError
from ...install import releases
from ...policy.files import ADAPTER_CONFIG, PROVENANCE, SAFETENSORS, TensorHeader, read_json, sha256_of
from .base import Base, agree, max_rank, targets_of
from .facts import Fork, arguments_of, notes_of
from .precision import DTYPES, Cast, cast, check_values, dtypes_of
from .source import Source, find

if TYPE_CHECKING:
    import torch

ADDITIONAL_CONFIG = "additional_config.json"  # ms-swift's own part of the configuration: lora_dtype, LoRA+
# what ms-swift's --adapters reads; args.json is for --load_args, scoring_head for a decision model
ADAPTER_FILES = (ADAPTER_CONFIG, ADDITIONAL_CONFIG, "args.json", "scoring_head.safetensors", "scoring_head.json")
SHARDED_WEIGHTS = ("global_step*", "pytorch_model_fsdp*")  # DeepSpeed and FSDP resume from these
NEEDED = ("numpy", "torch")
PACKAGES = ("swift-lora-fix", "ms-swift", "peft", "transformers", "torch", "safetensors")


def fork(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: str = "keep",
    base: str | None = None,
    with_trainer_state: bool = False,
) -> Fork:
    """Write a folder from which a new run starts with another run's adapter.

    Args:
        source: an ms-swift output folder (with or without vN-timestamp subfolders), one of its ``checkpoint-N`` or any
            PEFT LoRA folder. step: which checkpoint; by default the latest complete one.
        target: must not exist or be empty; its parent must exist. Nothing is left there when anything fails.
        dtype: of the weights file: ``keep`` (the source's, byte for byte), ``fp32``, ``bf16`` or ``fp16``. PEFT trains
            the adapter in fp32 unless ms-swift's ``lora_dtype`` is set; that is then changed to this dtype.
        base: the base model to go on with, an id or a local folder; by default the source's.
        with_trainer_state: copy the whole checkpoint, for ``--resume_from_checkpoint``.

    Raises:
        SettingsError: ``dtype`` is none of these.
        MissingPackageError: numpy or torch is not installed; this package does not depend on them.
        AdapterFileError: SOURCE is missing, incomplete, corrupt or not finite, or TARGET cannot be written.
        UnsupportedAdapterError: SOURCE is not a LoRA adapter.
        ForkError: TARGET exists; adapter and base do not agree; a value does not fit ``dtype``; every lora_B is zero.
    """
    if dtype not in ("keep", *DTYPES):
        raise SettingsError(f"--dtype {dtype!r} is not understood: use one of keep, {', '.join(DTYPES)}.")
    _check_packages()
    place = _check_target(Path(target))
    found = find(Path(source), step, with_trainer_state)
    if found.folder in place.parents:
        raise ForkError(
            f"TARGET {place} lies in the adapter folder {found.folder}, which would change it: name another."
        )
    if dtype != "keep" and with_trainer_state:
        _check_no_sharded_weights(found)
    agreed = agree(found, found.header, base) if found.header else None
    tensors = _read(found)
    header = found.header or {name: TensorHeader(tuple(t.shape), str(t.dtype)) for name, t in tensors.items()}
    agreed = agreed or agree(found, header, base)
    check_values(found, tensors)
    before, done = dtypes_of(tensors), None
    if dtype != "keep" and before != (DTYPES[dtype],):
        tensors, done = cast(tensors, DTYPES[dtype])
    with all_or_nothing(place) as folder:
        _copy_files(found, folder, with_trainer_state)
        sha256 = _write_weights(found, folder, tensors, done)
        notes = [*_adapt_configuration(folder, agreed, done)]
        _write_provenance(found, folder, sha256, agreed, done, before, with_trainer_state)
    words = notes_of(found, agreed, done, before, with_trainer_state)
    arguments = arguments_of(found, agreed, place, max_rank(targets_of(header, found), found), with_trainer_state)
    return Fork(place, found, sha256, done, arguments, (*words, *notes))


def _check_packages() -> None:
    """Check that the packages that read and write tensors are installed, without loading them."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise MissingPackageError(
            f"{' and '.join(missing)} {are} not installed in this environment: pip install {' '.join(missing)}"
        )


def _check_target(target: Path) -> Path:
    place = Path(os.path.realpath(os.path.expanduser(target)))
    if place.exists() and not place.is_dir():
        raise ForkError(f"TARGET {place} is a file: name a folder that does not exist.")
    if place.is_dir() and any(place.iterdir()):
        held = sorted(path.name for path in place.iterdir())[:6]
        raise ForkError(f"TARGET {place} is not empty, it holds {held}: name a folder that does not exist.")
    if not place.parent.is_dir():
        raise ForkError(f"TARGET {place}: the folder {place.parent} does not exist, make it first.")
    return place


def _check_no_sharded_weights(source: Source) -> None:
    sharded = [path.name for pattern in SHARDED_WEIGHTS for path in source.folder.glob(pattern)]
    if sharded:
        raise ForkError(
            f"{source.folder} resumes from its own copy of the weights in {sharded[0]}, which a cast of the adapter's "
            "file would not change: use --dtype keep, or leave --with-trainer-state out."
        )


def _read(source: Source) -> Mapping[str, torch.Tensor]:
    from ...policy.origin import read_weights  # loads torch

    tensors = read_weights(source.weights)
    _check_unchanged(source, source.weights)
    return tensors


def _check_unchanged(source: Source, file: Path) -> None:
    if sha256_of(file) != source.sha256:
        raise AdapterFileError(f"{source.weights} was changed while it was read: fork it when nobody writes to it.")


def _copy_files(source: Source, folder: Path, everything: bool) -> None:
    """Copy all files but the weights."""
    names = [path.name for path in source.folder.iterdir()] if everything else list(ADAPTER_FILES)
    for name in sorted(set(names) - {source.weights.name, SAFETENSORS, PROVENANCE}):
        path = source.folder / name
        if path.is_dir():
            shutil.copytree(path, folder / name)
        elif path.is_file():
            shutil.copyfile(path, folder / name)


def _write_weights(source: Source, folder: Path, tensors: Mapping[str, torch.Tensor], done: Cast | None) -> str:
    """Write the weights, always as safetensors. Returns their digest."""
    file = folder / SAFETENSORS
    if done is None and source.weights.name == SAFETENSORS:
        shutil.copyfile(source.weights, file)
        _check_unchanged(source, file)
        return source.sha256
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    return sha256_of(file)


def _adapt_configuration(folder: Path, base: Base, done: Cast | None) -> Iterator[str]:
    """Change what must follow another base or dtype. Yields in words what was changed beyond the obvious."""
    if base.changed:
        _update(folder / ADAPTER_CONFIG, base_model_name_or_path=base.name)
        _update(folder / "args.json", model=base.name, model_dir=base.name, quant_method=None, quant_bits=None)
    additional = folder / ADDITIONAL_CONFIG
    before = read_json(additional).get("lora_dtype") if additional.is_file() else None
    if done is not None and before not in (None, done.after):
        _update(additional, lora_dtype=done.after)
        yield f"lora_dtype, in which ms-swift trains this adapter, set from {before} to {done.after}"


def _update(file: Path, **values: Any) -> None:
    if file.is_file():
        file.write_text(json.dumps({**read_json(file), **values}, indent=2, ensure_ascii=False), encoding="utf-8")


def _write_provenance(
    source: Source,
    folder: Path,
    sha256: str,
    base: Base,
    done: Cast | None,
    before: tuple[str, ...],
    with_trainer_state: bool,
) -> None:
    ancestor = source.folder / PROVENANCE
    facts = {
        "source": str(source.folder),
        "step": source.step,
        "source_sha256": source.sha256,
        "sha256": sha256,
        "source_dtype": list(before),
        "dtype": [done.after] if done else list(before),
        "cast": asdict(done) if done else None,
        "base_model": base.name,
        "with_trainer_state": with_trainer_state,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: releases.installed_version(name) for name in PACKAGES},
        "source_was_a_fork": read_json(ancestor) if ancestor.is_file() else None,
    }
    (folder / PROVENANCE).write_text(json.dumps(facts, indent=2, ensure_ascii=False), encoding="utf-8")
