"""Loads ms-swift, vLLM and torch in a child process, so that what they print, raise or crash with stays there.

The report gets a sentence about it.
"""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ... import arming
from ...errors import SwiftLoraFixError
from ...frameworks.swift.instrumentors import import_rollout_module
from ...install import releases

TIMEOUT_SECONDS = 300.0
# Not with ``-m``: that would put the working folder, maybe a clone of ms-swift, first on sys.path.
_CODE = (
    "import sys; sys.path[:] = sys.argv[1].split(chr(0x1F)); from swift_lora_fix.tools.doctor import loading; "
    "loading.write_answer(sys.argv[2])"
)


@dataclass(frozen=True)
class Patches:
    tried: bool = False
    applied: bool = False
    reason: str = "not tried, see the problems"
    targets: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """What a process found that loaded ms-swift and vLLM. problem: why the patches do not go in."""

    problem: str | None = None
    patches: Patches = Patches()
    load_inplace: bool | None = None
    device: str | None = None
    device_count: int | None = None
    bf16: bool | None = None


def probe_in_a_child(environment: Mapping[str, str]) -> Probe:
    """Run `probe` in this environment. A process that crashes, hangs or prints nothing is a problem, not an error."""
    with tempfile.TemporaryDirectory(prefix="swift-lora-fix-") as folder:
        answer, printed = Path(folder, "answer.json"), Path(folder, "printed.txt")
        command = [sys.executable, "-c", _CODE, "\x1f".join(sys.path), str(answer)]
        with printed.open("w") as output:
            try:
                done = subprocess.run(
                    command,
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=TIMEOUT_SECONDS,
                )
                ended = _ending(done.returncode)
            except subprocess.TimeoutExpired:
                ended = f"did not come back in {TIMEOUT_SECONDS:.0f} s"
        if answer.is_file():
            found = json.loads(answer.read_text())
            return Probe(**{**found, "patches": Patches(**found["patches"])})
        last = " / ".join(printed.read_text(errors="replace").split("\n")[-4:]).strip(" /")
    return Probe(f"Loading ms-swift and vLLM {ended}. Repair the installation first. It said last: {last or 'nothing'}")


def probe() -> Probe:
    """Load ms-swift, put the patches in and examine the engine. For a process that does nothing else."""
    problem = None
    try:
        if releases.installed_swift() is not None:
            import_rollout_module()  # else apply() would be content with TRL where this fails
        status = arming.apply()
    except SwiftLoraFixError as error:
        problem, status = str(error), arming.status()
    except BaseException as error:  # whatever a broken package does at import, SystemExit included
        problem, status = _import_failure(error), arming.status()
    patches = Patches(True, status.applied, status.reason, status.patches)
    return Probe(problem, patches, None if problem else _load_inplace(), *_device())


def write_answer(path: str) -> None:
    """Write the result of `probe` to a file, because loaded packages may print anything."""
    Path(path).write_text(json.dumps(asdict(probe())))


def _ending(returncode: int) -> str:
    if returncode >= 0:
        return f"ended the process with status {returncode}"
    try:
        return f"crashed the process ({signal.Signals(-returncode).name})"
    except ValueError:
        return f"crashed the process (signal {-returncode})"


def _import_failure(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    what = " ".join(str(error).split())
    return (
        f"Loading ms-swift's rollout module fails with {type(error).__name__}: {what}{where}. ms-swift, vLLM, torch "
        "and transformers have to fit each other before anything can be patched: repair the installation."
    )


def _load_inplace() -> bool | None:
    """Whether ms-swift's request class has the field; newer releases may keep the class in another module."""
    for name in releases.rollout_modules():
        try:
            module = importlib.import_module(name)
        except Exception:
            continue
        return "load_inplace" in getattr(module.TensorLoRARequest, "__struct_fields__", ())
    return None


def _device() -> tuple[str | None, int | None, bool | None]:
    """Name, count, and whether they compute in bf16. (On the CPU PyTorch always does.)"""
    try:
        import torch

        if not torch.cuda.is_available():
            return "CPU", 1, True
        return torch.cuda.get_device_name(0), torch.cuda.device_count(), torch.cuda.get_device_capability(0) >= (8, 0)
    except Exception:  # a driver that does not answer, a torch that does not load: not known
        return None, None, None
