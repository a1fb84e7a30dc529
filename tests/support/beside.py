"""Packages in a folder beside this environment, for its path: what it lacks, or another release of what it has.

    python -m tests.support.beside FOLDER torchvision
    python -m tests.support.beside FOLDER vllm VERSION

``torchvision``: the release that goes with the environment's torch. ``vllm``: one that has no CPU build yet: the Python
code of its GPU wheel, with the compiled operators of the environment's vLLM. Nothing is done where it is there.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


def torchvision(folder: Path) -> None:
    """Into ``folder``, unless the environment has it: image processors need it."""
    if importlib.util.find_spec("torchvision") is None and not (folder / "torchvision").is_dir():
        release = f"torchvision==0.{int(version('torch').split('.')[1]) + 15}.*"  # 0.28 goes with torch 2.13
        pip("install", "--no-deps", "--target", str(folder), release)


def vllm(folder: Path, release: str) -> None:
    """Into ``folder``. Its version gets ``+cpu``, by which vLLM knows its platform."""
    if (folder / "vllm").is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    installed = importlib.util.find_spec("vllm")
    assert installed is not None and installed.origin is not None
    here = Path(installed.origin).parent
    with tempfile.TemporaryDirectory(dir=folder) as made:
        where = ("--platform", "manylinux_2_28_x86_64", "--dest", made)
        pip("download", "--no-deps", "--only-binary=:all:", *where, f"vllm=={release}")
        (wheel,) = Path(made).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(made, [name for name in archive.namelist() if not name.endswith(".so")])
        for operators in here.rglob("*.so"):
            shutil.copy(operators, Path(made, "vllm", operators.relative_to(here)))
        for file in (Path(made, f"vllm-{release}.dist-info", "METADATA"), Path(made, "vllm", "_version.py")):
            file.write_text(file.read_text().replace(release, f"{release}+cpu", 1))
        shutil.move(Path(made, f"vllm-{release}.dist-info"), folder / f"vllm-{release}+cpu.dist-info")
        shutil.move(Path(made, "vllm"), folder)


if __name__ == "__main__":
    target, what, *asked = sys.argv[1:]
    {"torchvision": torchvision, "vllm": vllm}[what](Path(target), *asked)
