"""When the patches of a library go in, and who is told where they cannot. The library is a module on disk."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import wrapt

from swift_lora_fix.errors import ContractError
from swift_lora_fix.install.instrumentor import Arming, Instrumentor
from swift_lora_fix.install.registry import Patch, PatchSet

VARIABLE = "SLF_TEST_ARMED"


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that is not imported yet."""
    name = f"slf_library_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text("def answer():\n    return 41\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)
    os.environ.pop(VARIABLE, None)


def one_more(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs) + 1


class Library(Instrumentor):
    otherwise = "it answers as it is"

    def __init__(self, name: str, target: str = "answer") -> None:
        super().__init__(Arming(VARIABLE))
        self.triggers = (name,)
        self.patch_sets = (PatchSet("library", (Patch(target, one_more, "", ""),)),)

    def instrument(self, module: ModuleType) -> None:
        self.patch_sets[0].apply(module)


def armed(library: Library) -> Library:
    library.arming.arm("armed")
    library.watch()
    return library


def test_in_by_itself_and_out_again(name: str) -> None:
    library = armed(Library(name))
    assert os.environ[VARIABLE] == "1" and library.status() == {"library: answer": "not applied"}
    module = importlib.import_module(name)
    assert module.answer() == 42 and library.status() == {"library: answer": "applied"}
    library.uninstrument()
    assert module.answer() == 41 and not library.is_instrumented
    armed(library)
    assert module.answer() == 42, "what is loaded already is patched at once"


def test_disarmed_it_leaves_alone_what_is_imported_later(name: str) -> None:
    library = armed(Library(name))
    library.arming.disarm("removed")
    assert importlib.import_module(name).answer() == 41 and VARIABLE not in os.environ


def test_asked_for_by_name_it_raises_and_by_itself_it_steps_aside(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("swift"), "propagate", True)
    library = armed(Library(name, target="no_such_function"))
    assert importlib.import_module(name).answer() == 41
    assert "stepping aside, it answers as it is" in caplog.text and "no_such_function" in caplog.text
    library.arming.by_name = True
    with pytest.raises(ContractError, match="no_such_function"):
        library.watch()


@pytest.mark.parametrize("kept", [False, True])
def test_what_lies_beneath_a_patch_whoever_wraps_it_since(name: str, kept: bool) -> None:
    """A user's plugin may wrap ours, by wrapt or by a plain function."""
    library = armed(Library(name))
    module = importlib.import_module(name)
    ours = module.answer
    module.answer = wrapt.FunctionWrapper(ours, one_more) if kept else lambda: ours() + 1
    assert module.answer() == 43 and library.patch_sets[0].beneath("answer")() == 41
