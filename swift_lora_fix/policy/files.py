"""Files of a PEFT adapter folder: the weights file and its header, and where a fork came from.

Nothing here loads torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from ..errors import AdapterFileError

SAFETENSORS = "adapter_model.safetensors"
TORCH_FILE = "adapter_model.bin"
ADAPTER_CONFIG = "adapter_config.json"
TRAINER_STATE = "trainer_state.json"
PROVENANCE = "fork_provenance.json"


@dataclass(frozen=True)
class TensorHeader:
    """One tensor in a safetensors header. dtype: the format's name (``F32``, ``BF16``, ``U8``, ...)."""

    shape: tuple[int, ...]
    dtype: str


def weights_file(folder: Path) -> Path:
    """The weights file of a PEFT adapter folder. Raises AdapterFileError naming what is missing."""
    if not folder.is_dir():
        raise AdapterFileError(f"The adapter folder {folder} does not exist.")
    for name in (SAFETENSORS, TORCH_FILE):
        if (folder / name).is_file():
            return folder / name
    raise AdapterFileError(
        f"The adapter folder {folder} has no {SAFETENSORS} (nor {TORCH_FILE}); it holds "
        f"{sorted(p.name for p in folder.iterdir())[:12]}."
    )


def checkpoint_step(folder: Path) -> int | None:
    """``global_step`` of a Trainer checkpoint, or None for a bare adapter folder. AdapterFileError: unreadable."""
    file = folder / TRAINER_STATE
    if not file.is_file():
        return None
    try:
        return int(read_json(file)["global_step"])
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterFileError(f"The checkpoint file {file} cannot be read: {error!r}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises AdapterFileError naming the file when it is unreadable or holds something else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{file} cannot be read: {error!r}") from error
    if not isinstance(value, dict):
        raise AdapterFileError(f"{file} holds {type(value).__name__} where a JSON object is expected.")
    return value


def read_header(file: Path) -> dict[str, TensorHeader]:
    """Shape and dtype of every tensor in a safetensors file, by name. The tensors themselves are not read.

    Raises AdapterFileError when the header is corrupt, or the file's size is not what it says.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return {name: TensorHeader(tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{file} cannot be read, it is corrupt or half-written: {error}") from error


def has_nonzero(file: Path, wanted: Callable[[str], bool]) -> bool:
    """Whether any wanted tensor of a safetensors file, chosen by name, has a byte that is not zero, in any dtype.

    Raises AdapterFileError as `read_header` does.
    """
    read_header(file)  # checks the file
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(size))
        for name, tensor in header.items():
            if name != "__metadata__" and wanted(name):
                first, last = tensor["data_offsets"]
                stream.seek(8 + size + first)
                if any(stream.read(last - first)):
                    return True
    return False


def check_start(folder: Path, options: str) -> None:
    """Check that a run can start from this folder, before anything is loaded from it. No tensor is read.

    options: those that may have named it, for the message.

    A folder that does not exist is left to ms-swift (it may be a hub's id), and so are its own tuners, which have a
    folder each or ``swift_type`` in their configuration.

    Raises AdapterFileError naming the folder or file: no adapter in it, no weights, or weights that cannot be read.
    """
    if not folder.is_dir():
        return
    config = folder / ADAPTER_CONFIG
    if config.is_file():
        if "swift_type" not in read_json(config) and (weights := weights_file(folder)).name == SAFETENSORS:
            read_header(weights)
    elif not any(folder.glob(f"*/{ADAPTER_CONFIG}")):
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:12])
        raise AdapterFileError(
            f"The run is to start from {folder} ({options}), but {folder} has no {ADAPTER_CONFIG}, so there is no "
            f"adapter in it. It holds {held or 'nothing'}. Name the checkpoint-N of a LoRA run."
        )


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises AdapterFileError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    except OSError as error:
        raise AdapterFileError(f"{file} cannot be read: {error}") from error
    return digest.hexdigest()


def check_fork(file: Path, sha256: str) -> str | None:
    """Check that a fork's weights file is unchanged. Returns in words what it is a fork of; None if it is no fork.

    Raises AdapterFileError naming both digests when the file was changed, or when its provenance is unreadable.
    """
    note = file.parent / PROVENANCE
    if not note.is_file():
        return None
    made = read_json(note)
    if made.get("sha256") != sha256:
        raise AdapterFileError(
            f"{file} has SHA-256 {sha256}, but the fork was made with {made.get('sha256')} ({note}): it was changed "
            f"afterwards. Fork {made.get('source')} again, or delete {note.name} if the change was meant."
        )
    step = f" at step {made['step']}" if made.get("step") is not None else ""
    return f"a fork of {made.get('source')}{step}"
