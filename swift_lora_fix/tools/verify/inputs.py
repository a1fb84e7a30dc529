"""Checks what the command line names, before a run is started, which takes half a minute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from ...common.files import make_folder
from ...errors import VerificationError

PROMPTS = ("Name a colour of the sky.", "What is two plus two?", "Which animal barks?", "Write one short sentence.")
RESOLVE_BY_SWIFT = """
import sys
try:
    from swift.utils import safe_snapshot_download
except ImportError:
    from swift.llm import safe_snapshot_download
print("FOLDER " + safe_snapshot_download(sys.argv[1], use_hf=sys.argv[2] == "true" or None))
"""
RESOLVE_BY_HUB = """
import sys
from huggingface_hub import snapshot_download
print("FOLDER " + snapshot_download(sys.argv[1]))
"""


def check_model(model: str) -> None:
    """Raises VerificationError for a path that is no model folder. Ids are left to the framework."""
    if not os.path.isdir(model):
        if _is_path(model):
            raise VerificationError(f"The model {model} is no local folder. Give a model folder, or a model id.")
    elif not os.path.isfile(os.path.join(model, "config.json")):
        raise VerificationError(f"The model folder {model} has no config.json. Give the folder that holds it.")


def resolve(adapter: str, use_hf: bool, framework: str) -> Path:
    """The adapter's local folder. An id is downloaded: by ms-swift itself, as its ``--adapters`` does; for TRL from
    Hugging Face."""
    is_swift = framework == "ms-swift"
    ids = "ModelScope (of Hugging Face with --use_hf true)" if is_swift else "Hugging Face"
    hint, resolve = f"Give a PEFT adapter folder, or an id of {ids}.", RESOLVE_BY_SWIFT if is_swift else RESOLVE_BY_HUB
    if os.path.isdir(adapter):
        return Path(adapter)
    if _is_path(adapter):
        raise VerificationError(f"The adapter {adapter} is no local folder. {hint}")
    done = subprocess.run([sys.executable, "-c", resolve, adapter, str(use_hf).lower()], capture_output=True, text=True)
    found = [line[7:] for line in done.stdout.splitlines() if line.startswith("FOLDER ")]
    if not found:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise VerificationError(
            f"The adapter {adapter!r} is no local folder, and it could not be downloaded: {last}. {hint}"
        )
    return Path(found[0])


def _is_path(name: str) -> bool:
    """Whether it cannot be an id (OWNER/NAME, perhaps with :SUBFOLDER), so that nobody need be asked."""
    return name.startswith(("/", ".", "~")) or os.path.exists(name) or (name.count("/") > 1 and ":" not in name)


def rank_of(folder: Path) -> int:
    """The largest rank in the adapter's PEFT configuration. Raises VerificationError naming what is missing."""
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text())
        return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = error.strerror if isinstance(error, OSError) else repr(error)
        raise VerificationError(f"{file} is no PEFT LoRA configuration: {why}. Give a PEFT adapter folder.") from error


def prepare(folder: Path, syncs: int, framework: str) -> Path:
    """Create the folder for results and the prompts file in it; return that file.

    Raises VerificationError when they cannot be written.
    """
    prompts = folder / "prompts.jsonl"
    texts = [PROMPTS[i % 4] for i in range(8 * syncs)]
    of_swift = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    rows = map(json.dumps, of_swift if framework == "ms-swift" else [{"prompt": text} for text in texts])
    try:
        make_folder(folder)
        prompts.write_text("\n".join(rows) + "\n")
        for side in ("ours", "stock"):
            make_folder(folder / side)
    except OSError as error:
        raise VerificationError(
            f"{folder} cannot be written: {error.strerror}. Name another folder with --out."
        ) from error
    return prompts
