"""The exception tree: each error is a built-in one too, and names its place in the docs."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swift_lora_fix import errors

ROOT = Path(__file__).resolve().parents[2]


def tree(root: type[errors.SwiftLoraFixError] = errors.SwiftLoraFixError) -> Iterator[type[errors.SwiftLoraFixError]]:
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:  # tests make some of their own
            yield child
            yield from tree(child)


ALL = sorted(set(tree()), key=lambda error: error.__name__)


def test_the_module_holds_the_whole_tree() -> None:
    assert len(ALL) > 20
    assert {error.__name__ for error in ALL} == {
        name for name in vars(errors) if name.endswith("Error") and name != "SwiftLoraFixError"
    }


@pytest.mark.parametrize("error", ALL)
def test_an_error_names_its_place_in_the_docs_beside_its_message(error: type[errors.SwiftLoraFixError]) -> None:
    raised = error("what went wrong")
    assert str(raised) == "what went wrong", "messages are quoted in other messages"
    assert error.place == f"docs/errors.md#{error.__name__.lower()}"
    again = pickle.loads(pickle.dumps(raised))
    for each in (raised, again, copy.copy(raised)):
        assert str(each) == "what went wrong" and type(each) is error
        if sys.version_info >= (3, 11):
            assert each.__notes__ == [f"What it means and what to do: {error.place}"]
    assert any(base.__module__ == "builtins" and base is not Exception for base in error.__mro__[1:-3])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python shows notes from 3.11 on")
def test_a_traceback_ends_with_the_place() -> None:
    code = "from swift_lora_fix.errors import BaseMismatchError; raise BaseMismatchError('another base')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-2:] == [
        "swift_lora_fix.errors.BaseMismatchError: another base",
        "What it means and what to do: docs/errors.md#basemismatcherror",
    ]


@pytest.mark.parametrize("page", ["docs/errors.md", "docs/zh/errors.md"])
def test_each_error_has_its_place_in_the_docs(page: str) -> None:
    headings = re.findall(r"^### (\w+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert sorted(headings) == [error.__name__ for error in ALL]


@pytest.mark.parametrize("page", ["docs/errors.md", "docs/zh/errors.md"])
def test_each_cause_of_a_mismatch_has_its_place_too(page: str) -> None:
    from swift_lora_fix.proof.causes import CAUSES

    text = (ROOT / page).read_text()
    for key in CAUSES:
        assert f"| `{key}` |" in text, key
