"""Finds the folder that a fork starts from: the newest complete checkpoint, and why others were passed over."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import AdapterFileError, ForkError, UnsupportedAdapterError
from ...policy.files import (
    ADAPTER_CONFIG,
    SAFETENSORS,
    TORCH_FILE,
    TRAINER_STATE,
    TensorHeader,
    check_fork,
    checkpoint_step,
    has_nonzero,
    read_header,
    read_json,
    sha256_of,
    weights_file,
)
from ...policy.kinds import is_b

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_ART_STEP = re.compile(r"\d{4,}")  # ART keeps its steps as checkpoints/0000, checkpoints/0686
_ART_STEPS = "checkpoints"
_RUN = re.compile(r"v(\d+)-(\d{8}-\d{6})")  # ms-swift's --add_version
_OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_0", "global_step*", "rank*-of-*-optimizer.pt")
_ARCHIVES = (TORCH_FILE, "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")


@dataclass(frozen=True)
class Source:
    """A complete adapter folder.

    step: in its ``trainer_state.json``; None for a bare adapter. weights, sha256: its weights file. header: of that
    file, empty for a torch file. config: its ``adapter_config.json``. args: ms-swift's ``args.json``, or empty. notes:
    how it was chosen, and what was passed over.
    """

    folder: Path
    step: int | None
    weights: Path
    sha256: str
    header: dict[str, TensorHeader] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    args: dict[str, Any] = field(repr=False)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.folder}" + (f" (step {self.step})" if self.step is not None else "")


def find(folder: Path, step: int | None = None, with_trainer_state: bool = False) -> Source:
    """The adapter to fork.

    Args:
        folder: an ms-swift output folder, with or without vN-timestamp subfolders, a ``checkpoint-N`` or any PEFT
            adapter folder; or ART's: a model's folder, its ``checkpoints`` or a step in it.
        step: of the wanted checkpoint; by default the latest complete one.
        with_trainer_state: a checkpoint without optimizer state counts as incomplete.

    Raises:
        AdapterFileError: nothing complete was found; says what each folder lacks.
        UnsupportedAdapterError: the adapter is not a LoRA.
        ForkError: ``step`` is not the adapter folder's step, or the folder has checkpoints in two places.
    """
    if not folder.is_dir():
        raise AdapterFileError(f"SOURCE {folder} does not exist or is no folder.")
    folder = Path(os.path.realpath(folder))  # ms-swift's last-checkpoint is a link
    if _is_adapter(folder) and not (step is not None and (folder / f"checkpoint-{step}").is_dir()):
        return _the_adapter_itself(folder, step, with_trainer_state)
    return _latest(folder, step, with_trainer_state)


def _is_adapter(folder: Path) -> bool:
    files = (ADAPTER_CONFIG, SAFETENSORS, TORCH_FILE)
    return bool(_CHECKPOINT.fullmatch(folder.name)) or any((folder / name).is_file() for name in files)


def _the_adapter_itself(folder: Path, step: int | None, with_trainer_state: bool) -> Source:
    source = read(folder, with_trainer_state)
    if step is not None and source.step != step:
        found = f"of step {source.step}" if source.step is not None else "a bare adapter without a step"
        raise ForkError(f"--step {step} was asked for, but {folder} is {found}: leave --step out, or name the run.")
    return source


def _latest(folder: Path, step: int | None, with_trainer_state: bool) -> Source:
    skipped: list[str] = []
    runs = _runs(folder)
    wanted = f"checkpoint-{step}" if step is not None else "checkpoint"
    for place in runs or [folder]:
        candidates = list(_checkpoints(place, step))
        if runs and not candidates:
            skipped.append(f"passed over {place}: it has no {wanted}")
        for candidate in candidates:
            if _is_art_step(candidate) and _is_empty(candidate):
                words = "every lora_B in it is zero, the empty adapter that ART's register() makes"
                skipped.append(f"passed over {candidate}: {words}")
                continue
            try:
                source = read(candidate, with_trainer_state)
            except AdapterFileError as error:
                skipped.append(f"passed over {candidate}, which is incomplete: {error}")
                continue
            newest = f"of {len(runs)} runs the newest with a complete {wanted}: {place}" if runs else ""
            notes = (*skipped, *filter(None, [newest]))
            return Source(**{**vars(source), "notes": notes})
    words = "\n  ".join(skipped) or f"it holds {sorted(p.name for p in folder.iterdir())[:12]}"
    raise AdapterFileError(f"SOURCE {folder} has no complete {wanted}:\n  {words}")


def _runs(folder: Path) -> list[Path]:
    """Subfolders of ms-swift's --add_version, newest first."""
    found = [(match, path) for path in folder.iterdir() if (match := _RUN.fullmatch(path.name)) and path.is_dir()]
    runs = [path for _, path in sorted(found, key=lambda pair: (int(pair[0][1]), pair[0][2]), reverse=True)]
    own = next(_checkpoints(folder, None), None)
    if runs and own is not None:
        raise ForkError(f"SOURCE {folder} has checkpoints of its own ({own.name}) and runs ({runs[0].name}): name one.")
    return runs


def _checkpoints(folder: Path, step: int | None) -> Iterator[Path]:
    """The folder's checkpoints, latest first: ms-swift's, or ART's steps."""
    found = [(int(match[1]), p) for p in folder.iterdir() if (match := _CHECKPOINT.fullmatch(p.name)) and p.is_dir()]
    steps = folder if folder.name == _ART_STEPS else folder / _ART_STEPS
    found += [(int(p.name), p) for p in (steps.iterdir() if steps.is_dir() else ()) if _is_art_step(p) and p.is_dir()]
    for number, path in sorted(found, reverse=True):
        if step in (None, number):
            yield path


def _is_art_step(folder: Path) -> bool:
    return folder.parent.name == _ART_STEPS and bool(_ART_STEP.fullmatch(folder.name))


def _is_empty(folder: Path) -> bool:
    """Whether every lora_B is zero. False for what is no readable safetensors file: `read` says what is wrong there."""
    try:
        return not has_nonzero(folder / SAFETENSORS, is_b)
    except AdapterFileError:
        return False


def read(folder: Path, with_trainer_state: bool = False) -> Source:
    """Read all of one adapter folder but the tensors.

    Raises AdapterFileError when something is missing, half-written or corrupt; UnsupportedAdapterError for no LoRA.
    """
    weights = weights_file(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise AdapterFileError(f"{folder} has no {ADAPTER_CONFIG}.")
    config = read_json(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise UnsupportedAdapterError(f"{folder} holds a PEFT adapter of type {config.get('peft_type')!r}, not 'LORA'.")
    header = {} if weights.name == TORCH_FILE else read_header(weights)
    _check_archives(folder)
    step = checkpoint_step(folder)
    if step is None and _is_art_step(folder):
        step = int(folder.name)
    if step is None and (_CHECKPOINT.fullmatch(folder.name) or with_trainer_state):
        raise AdapterFileError(f"{folder} has no {TRAINER_STATE}, which is written last.")
    if with_trainer_state and not any(list(folder.glob(pattern)) for pattern in _OPTIMIZER):
        raise AdapterFileError(
            f"{folder} has no optimizer state ({', '.join(_OPTIMIZER[:2])}; saved with --save_only_model?): fork it "
            "without --with-trainer-state."
        )
    digest = sha256_of(weights)
    check_fork(weights, digest)
    args = folder / "args.json"
    return Source(folder, step, weights, digest, header, config, read_json(args) if args.is_file() else {})


def _check_archives(folder: Path) -> None:
    """torch writes zip archives, with the directory at the end: a half-written one has no directory."""
    for pattern in _ARCHIVES:
        for file in sorted(folder.glob(pattern)):
            if not zipfile.is_zipfile(file):
                raise AdapterFileError(f"{file} cannot be read, it is corrupt or half-written: not a zip archive.")
