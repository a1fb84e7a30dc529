"""Where the LoRA weights that a run starts from came from, and whether the trainer really holds them.

Transformers loads a checkpoint after the trainer is built, so this is decided at the first sync. There are two sources:
what the run says (``resume_from_checkpoint``), and which files PEFT loaded into the adapter. The second is recorded by
a hook on ``PeftModel.load_adapter``, which both ``from_pretrained`` and the resume call.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.words import PLAIN, Words
from ..errors import AdapterFileError, ResumeMismatchError
from .adapter import Adapter
from .files import check_fork, checkpoint_step, sha256_of, weights_file
from .kinds import is_b

TOWERS = "vit.safetensors"  # lora_llm keeps what it trains whole here, beside the adapter (tuner_plugin/lora_llm.py)
_loads: weakref.WeakKeyDictionary[Any, dict[str, str]] = weakref.WeakKeyDictionary()
_trained: weakref.WeakSet[Any] = weakref.WeakSet()  # models that were trained since


@dataclass(frozen=True)
class AdapterOrigin:
    """kind: ``scratch``, ``adapters`` (loaded from a folder), ``resume`` (a checkpoint's) or ``memory`` (none of these,
        but B is not zero).
    path, step, sha256: the folder, the step in its ``trainer_state.json``, the digest of its weights file.
    norm: Frobenius norm of all A and B. b_is_zero: every lora_B is zero, so the adapter has no effect yet.
    compared: the trainer's tensors were compared with the file's, and equal. reference: the ``ref_adapter``'s folder.
    fork: in words, what the folder is a fork of, if it is one and its weights file is unchanged.
    words: how the trainer's users call these.
    """

    kind: str
    path: str | None
    step: int | None
    sha256: str | None
    norm: float
    b_is_zero: bool
    compared: bool
    reference: str | None
    fork: str | None = None
    words: Words = PLAIN

    def __str__(self) -> str:
        source = {
            "scratch": "from scratch",
            "adapters": f"from {self.words.start} {self.path}",
            "resume": f"from {self.words.resume} {self.path} at step {self.step}",
            "memory": "from memory: no file was seen being loaded",
        }[self.kind]
        parts = [f"LoRA weights {source}", *([self.fork] if self.fork else [])]
        if self.sha256:
            parts.append(f"SHA-256 {self.sha256}")
            parts.append("the trainer's tensors equal the file's" if self.compared else "not compared: already trained")
        parts.append(f"norm {self.norm:.6g}")
        parts.append("every lora_B is zero" if self.b_is_zero else "lora_B is not zero")
        parts.append(f"reference adapter {self.reference or 'none'}")
        return ", ".join(parts)


def record_load(model: Any, adapter_name: str, folder: Any) -> None:
    """Remember that PEFT loaded ``folder`` into ``model``'s adapter. Called by the hook on ``load_adapter``."""
    _loads.setdefault(model, {})[adapter_name] = os.fspath(folder)
    _trained.discard(model)


def note_trained(model: Any) -> None:
    """``model`` was trained: it need not hold what was loaded into it before."""
    _trained.add(model)


def determine(
    model: Any, adapter: Adapter, held: dict[str, torch.Tensor], claimed: str | None, step: int
) -> AdapterOrigin:
    """Find out where the adapter came from and check it against its file.

    Args:
        model: the trainer's PeftModel. adapter: its adapter. held: the trainer's values of it, whole, on the CPU.
        claimed: the checkpoint that the run says it resumes from (``resume_from_checkpoint``).
        step: the trainer's current ``global_step``.

    Raises:
        AdapterFileError: the folder that the run starts from is missing, its weights file is unreadable, or it is a
            fork whose weights file was changed.
        ResumeMismatchError: the trainer's tensors differ from the file's; names both.
    """
    loads = _loads.get(model, {})
    folder = _folder(claimed, loads.get(adapter.name))
    norm = float(torch.stack([value.float().norm() for value in held.values()]).norm())
    b_is_zero = _does_nothing(held)
    facts: dict[str, Any] = dict(norm=norm, b_is_zero=b_is_zero, words=adapter.words)
    facts["reference"] = loads.get("ref_adapter")
    if folder is None:
        kind = "scratch" if b_is_zero else "memory"
        return AdapterOrigin(kind, path=None, step=None, sha256=None, compared=False, **facts)
    file = weights_file(folder)
    digest = sha256_of(file)
    fork = check_fork(file, digest)
    saved_step = checkpoint_step(folder)
    expected_step = (saved_step or 0) if claimed else 0
    # at later steps the trainer rightly holds other values, or where the model was trained before this run
    compared = step <= expected_step and (bool(claimed) or model not in _trained)
    if compared:
        saved = read_weights(file)
        if (folder / TOWERS).is_file():
            saved = {**saved, **read_weights(folder / TOWERS)}
        _compare(folder, saved, held, norm, b_is_zero, adapter.words)
    kind = "resume" if claimed else "adapters"
    return AdapterOrigin(kind, str(folder), saved_step, digest, compared=compared, fork=fork, **facts)


def _does_nothing(held: dict[str, torch.Tensor]) -> bool:
    """Whether each B is zero, as PEFT begins; of an embedding that is A (``LoraLayer.reset_lora_parameters``)."""
    begins = {key: key.replace("lora_embedding_B", "lora_embedding_A") for key in held if is_b(key)}
    return not any(bool(held[key].any()) and bool(held[twin].any()) for key, twin in begins.items())


def _folder(claimed: str | os.PathLike[str] | None, loaded: str | None) -> Path | None:
    if claimed:
        return Path(claimed)
    # PEFT also takes the name of a hub repository; ms-swift downloads that first and passes a folder
    return Path(loaded) if loaded and os.path.isdir(loaded) else None


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Read an adapter's tensors, by PEFT key. Raises AdapterFileError when the file is corrupt."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AdapterFileError(f"The adapter file {file} cannot be read: {error}") from error


def _compare(
    folder: Path,
    saved: dict[str, torch.Tensor],
    held: dict[str, torch.Tensor],
    norm: float,
    b_is_zero: bool,
    words: Words,
) -> None:
    different = []
    for key, value in held.items():
        file_value = saved.get(key)
        if file_value is None:
            different.append(f"{key} is not in the file")
        elif file_value.shape != value.shape:
            different.append(f"{key} is {tuple(file_value.shape)} in the file, {tuple(value.shape)} in the run")
        elif not torch.equal(file_value.to(value.dtype), value):
            different.append(f"{key} differs")
    if different:
        file_norm = float(torch.stack([t.float().norm() for t in saved.values()]).norm()) if saved else 0.0
        raise ResumeMismatchError(
            f"The run claims to start from {folder} (LoRA norm {file_norm:.6g}), but the trainer holds another adapter "
            f"(LoRA norm {norm:.6g}{', every lora_B zero' if b_is_zero else ''}). {len(different)} of {len(held)} "
            f"tensors disagree: {'; '.join(different[:4])}. Check that the base model, {words.rank} and "
            f"{words.targets} are those of the checkpoint, and that nothing re-initialised the adapter."
        )
