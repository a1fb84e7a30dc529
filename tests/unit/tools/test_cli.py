"""The command line as such: its version, and ``python -m``. Each verb has its own file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import swift_lora_fix
from tests.support.environments import clean_environment
from tests.support.environments import swift_lora_fix as console


def module(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "swift_lora_fix", *arguments]
    return subprocess.run(command, env=clean_environment(**variables), capture_output=True, text=True, timeout=300)


def test_the_version() -> None:
    for done in (console("--version"), module("--version")):
        assert done.returncode == 0 and done.stdout == f"swift-lora-fix {swift_lora_fix.__version__}\n", done.stderr


def test_the_module_is_the_console_script() -> None:
    assert module("plugin").stdout == console("plugin").stdout
    done = module("--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: swift-lora-fix ")
    assert Path(module("plugin").stdout.strip()).is_file()
    assert module("no-such-verb").returncode == 2


def test_the_module_starts_with_settings_that_are_wrong() -> None:
    done = module("doctor", "--json", SWIFT_LORA_FIX="maybe")
    assert done.returncode == 2 and "SWIFT_LORA_FIX='maybe'" in json.loads(done.stdout)["problems"][0], done.stderr


def test_a_mistake_is_told_with_the_place_in_the_docs() -> None:
    done = console("report", "/nowhere")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "swift-lora-fix: /nowhere does not exist.",
        "swift-lora-fix: what it means and what to do: docs/errors.md#runlogerror",
    ]
