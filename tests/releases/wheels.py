"""The published releases of ms-swift and TRL and their source, from the package index through pip, cached."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from packaging.version import Version

from swift_lora_fix.install import releases

CACHE = Path(os.environ.get("SWIFT_LORA_FIX_WHEELS") or Path(__file__).parents[2] / ".cache" / "wheels")
PARALLEL_DOWNLOADS = 8
SWIFT, TRL = releases.SWIFT_DISTRIBUTION, releases.TRL_DISTRIBUTION


class Wheel:
    """The parsed modules of one release, by dotted name."""

    def __init__(self, path: Path) -> None:
        self._archive = zipfile.ZipFile(path)
        self._modules = {
            name[: -len(".py")].replace("/", ".") for name in self._archive.namelist() if name.endswith(".py")
        }
        self._trees: dict[str, ast.Module] = {}

    def __contains__(self, module: str) -> bool:
        return module in self._modules

    def tree(self, module: str) -> ast.Module:
        if module not in self._trees:
            self._trees[module] = ast.parse(self._archive.read(module.replace(".", "/") + ".py"))
        return self._trees[module]

    def extras(self, extra: str, package: str) -> str:
        """What its optional requirement ``extra`` allows of ``package``, as a version specifier."""
        (metadata,) = [name for name in self._archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = self._archive.read(metadata).decode()
        (found,) = re.findall(rf"^Requires-Dist: {package}([<>=][^;]*); extra == .{extra}.$", text, re.MULTILINE)
        return str(found).strip()

    @property
    def layout(self) -> releases.Layout:
        """The layout this wheel has, read from its files, not from its number."""
        layouts = dict.fromkeys(family.layout for family in releases.FAMILIES)
        found = [layout for layout in layouts if layout.rollout_module in self]
        assert len(found) == 1, f"rollout module: expected exactly one of {releases.rollout_modules()}, found {found}"
        return found[0]

    @property
    def rollout(self) -> ast.Module:
        return self.tree(self.layout.rollout_module)

    @property
    def utils(self) -> ast.Module:
        return self.tree(self.layout.rollout_module.rpartition(".")[0] + ".utils")

    @property
    def engine(self) -> ast.Module:
        return self.tree(self.layout.engine_module)

    @property
    def server(self) -> ast.Module:
        return self.tree(self.layout.server_module)


def pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    if done.returncode:
        raise RuntimeError(f"pip {' '.join(arguments)}: {done.stderr.strip()[-500:]}")
    return done.stdout


@cache
def published(distribution: str = SWIFT) -> tuple[tuple[str, ...], str]:
    """Supported releases, oldest first, and why the index could not be read ('' if it was).

    Without the index the cached wheels stand in.
    """
    try:
        listing = pip("index", "versions", distribution)
        match = re.search(r"^Available versions:(.*)$", listing, re.MULTILINE)
        if match is None:
            raise RuntimeError(f"pip index versions: no versions in {listing!r}")
        found, error = [version.strip() for version in match.group(1).split(",")], ""
    except (RuntimeError, subprocess.TimeoutExpired) as problem:
        found, error = [path.name.split("-")[1] for path in CACHE.glob(f"{_file(distribution)}-*.whl")], str(problem)
    is_too_old = releases.is_trl_too_old if distribution == TRL else releases.is_too_old
    supported = {version for version in found if not is_too_old(version)}
    return tuple(sorted(supported, key=Version)), error


def _file(distribution: str) -> str:
    """How the names of its wheels begin."""
    return distribution.replace("-", "_")


def cached(version: str, distribution: str = SWIFT) -> Path | None:
    return next(CACHE.glob(f"{_file(distribution)}-{version}-*.whl"), None)


def download(version: str, distribution: str = SWIFT) -> None:
    """Fetch one wheel into the cache; whole or not at all, so that two runs may share the cache."""
    if cached(version, distribution) is not None:
        return
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        requirement = f"{distribution}=={version}"
        pip("download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", folder, requirement)
        (wheel,) = Path(folder).glob("*.whl")
        shutil.move(wheel, CACHE / wheel.name)


def download_all(versions: tuple[str, ...], distribution: str = SWIFT) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    missing = [version for version in versions if cached(version, distribution) is None]
    if missing:
        print(f"fetching {len(missing)} {distribution} wheels (about 1 MB each) into {CACHE}", file=sys.__stderr__)
    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        list(pool.map(download, missing, [distribution] * len(missing)))


@cache
def wheel(version: str, distribution: str = SWIFT) -> Wheel:
    path = cached(version, distribution)
    assert path is not None, f"the wheel of {distribution} {version} is not in {CACHE}"
    return Wheel(path)
