"""What users of a framework read names that framework's options, and no other's."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import swift_lora_fix
from swift_lora_fix import errors
from swift_lora_fix.common.words import Words
from swift_lora_fix.frameworks.swift import words as swift
from swift_lora_fix.frameworks.trl import words as trl
from swift_lora_fix.policy import adapter, origin
from tests.support.peft_models import peft_model

PACKAGE = Path(swift_lora_fix.__file__).parent
# Reached from any trainer. (server/ is ms-swift's rollout servers', folders.py names options of `vllm serve`, the tools
# are a command line.)
SHARED = ("session", "examiner", "scope", "auto", "looks", "metrics", "trainer", "policy", "engine", "proof")
FLAG = re.compile(r"--[a-z]\w+")


def texts(file: Path) -> Iterator[str]:
    """All strings of a module that are no docstrings."""
    tree = ast.parse(file.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_what_any_trainer_reaches_names_no_option_of_ms_swift() -> None:
    files = [file for name in SHARED for file in (PACKAGE / f"{name}.py", *(PACKAGE / name).rglob("*.py"))]
    files = [file for file in files if file.is_file() and file != PACKAGE / "engine" / "vllm" / "folders.py"]
    found = {(file.name, text) for file in files for text in texts(file) if FLAG.search(text)}
    assert not found
    assert any(FLAG.search(text) for text in texts(PACKAGE / "frameworks" / "swift" / "words.py")), (
        "they are said there"
    )


FRAMEWORKS = pytest.mark.parametrize("words", [swift.WORDS, trl.WORDS], ids=lambda words: words.framework)


@FRAMEWORKS
def test_a_refused_adapter_is_told_what_its_own_framework_calls_the_other_mode(words: Words) -> None:
    with pytest.raises(errors.UnsupportedAdapterError) as caught:
        adapter.bind(peft_model(use_dora=True), words=words)
    assert f"Use {words.without_lora} (fused mode) for this adapter" in str(caught.value)
    assert bool(FLAG.search(str(caught.value))) is (words is swift.WORDS)


@FRAMEWORKS
def test_the_origin_and_its_mismatch_are_said_in_the_frameworks_words(words: Words, tmp_path: Path) -> None:
    model = peft_model(seed=1)
    model.save_pretrained(tmp_path)
    bound = adapter.bind(model, words=words)
    held = adapter.read_to_host(bound, torch.device("cpu"))
    said = str(origin.determine(model, bound, held, str(tmp_path), 0))
    assert f"LoRA weights from {words.resume} {tmp_path}" in said
    with pytest.raises(errors.ResumeMismatchError) as caught:
        origin.determine(model, bound, {key: value + 1 for key, value in held.items()}, str(tmp_path), 0)
    for message in (said, str(caught.value)):
        assert bool(FLAG.search(message)) is (words is swift.WORDS), message
