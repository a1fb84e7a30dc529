"""A run that is told to start from a folder without a usable adapter: ms-swift's real loading, in a process of its own.

Stock goes on without an adapter until a bare AssertionError, or shows an error of safetensors that names no file.
"""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest
from safetensors.torch import save_file

from swift_lora_fix.policy.files import ADAPTER_CONFIG, SAFETENSORS, TRAINER_STATE
from tests.support import forks
from tests.support.peft_models import peft_model

SCRIPT = """
    import sys, swift_lora_fix
    from swift.tuners import Swift
    from tests.support.peft_models import Tiny
    swift_lora_fix.apply()
    try:
        model = Swift.from_pretrained(Tiny(), {folder!r}, is_trainable=True)
    except Exception as error:
        print("GOT", type(error).__name__, isinstance(error, OSError), error)
    else:
        print("LOADED", type(model).__name__, sorted(swift_lora_fix.status().patches.items()))
"""


def load(folder: Path) -> str:
    """What ms-swift's loading of this folder ends with, on one line."""
    done = forks.run(textwrap.dedent(SCRIPT).format(folder=str(folder)), environment={**os.environ})
    lines = [line for line in done.stdout.splitlines() if line.startswith(("GOT ", "LOADED "))]
    assert len(lines) == 1, done.stdout[-2000:] + done.stderr[-2000:]
    return lines[0]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-4"
    peft_model(seed=1).save_pretrained(folder)
    (folder / TRAINER_STATE).write_text('{"global_step": 4}')
    return folder


def test_a_checkpoint_without_an_adapter_is_named(checkpoint: Path) -> None:
    for name in (ADAPTER_CONFIG, SAFETENSORS):
        (checkpoint / name).unlink()
    said = load(checkpoint)
    assert said.startswith("GOT AdapterFileError True"), said
    assert f"{checkpoint} has no {ADAPTER_CONFIG}" in said and TRAINER_STATE in said and "--adapters" in said


@pytest.mark.parametrize("content", [b"", b"half", None])
def test_a_corrupt_adapter_file_is_named(checkpoint: Path, content: bytes | None) -> None:
    file = checkpoint / SAFETENSORS
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content is None else content)
    said = load(checkpoint)
    assert said.startswith(f"GOT AdapterFileError True {file} cannot be read, it is corrupt or half-written: "), said


def test_an_adapter_that_lacks_its_file_is_named(checkpoint: Path) -> None:
    (checkpoint / SAFETENSORS).unlink()
    said = load(checkpoint)
    assert said.startswith("GOT AdapterFileError True") and f"{checkpoint} has no {SAFETENSORS}" in said, said


def test_what_is_sound_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    said = load(checkpoint)
    assert said.startswith("LOADED Peft") and "Swift.from_pretrained', 'applied'" in said, said
    save_file({}, tmp_path / "unrelated.safetensors")
    (tmp_path / "swift" / "lora").mkdir(parents=True)  # ms-swift's own tuners: one folder each
    (tmp_path / "swift" / "lora" / ADAPTER_CONFIG).write_text("{}")
    assert "Mixed using with peft is not allowed" in load(tmp_path / "swift"), "left to ms-swift"
