"""Environments that lack something, for real: a new virtual environment that sees this one's packages but for some."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path

from tests.support import hangs

SCRIPT = Path(sys.executable).parent / "swift-lora-fix"
OF_THIS_SUITE = ("SWIFT_LORA_FIX", "VLLM_PLUGINS", "VLLM_ENABLE_V1", "VLLM_ALLREDUCE", "CUDA_VISIBLE", "COLUMNS")


def clean_environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OF_THIS_SUITE)}
    return {**kept, "COLUMNS": "100", **variables}


def swift_lora_fix(*arguments: object, script: Path = SCRIPT, **variables: str) -> subprocess.CompletedProcess[str]:
    """The console script in a process of its own; it must never end in a traceback."""
    done = hangs.run([script, *arguments], env=clean_environment(**variables))
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done


class Environment:
    """A copy of this environment, by links, in which names can be taken out and put in."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.site = next((folder / "lib").glob("python*")) / "site-packages"
        for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
            (self.site / entry.name).symlink_to(entry)
        self.script = folder / "bin" / "swift-lora-fix"
        self.script.write_text(f"#!{folder}/bin/python\n" + SCRIPT.read_text().split("\n", 1)[1])
        self.script.chmod(0o755)

    def without(self, *patterns: str) -> Environment:
        for pattern in patterns:
            found = list(self.site.glob(pattern))
            assert found, pattern
            for entry in found:
                entry.unlink()
        return self

    def with_version(self, distribution: str, version: str) -> Environment:
        """Metadata alone."""
        info = self.site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        return self

    def with_module(self, name: str, code: str = "") -> Environment:
        """A module, and the packages that it is in."""
        *packages, module = name.split(".")
        folder = self.site
        for package in packages:
            folder = folder / package
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        (folder / f"{module}.py").write_text(textwrap.dedent(code))
        return self

    def run(self, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        return swift_lora_fix(*arguments, script=self.script, **variables)
