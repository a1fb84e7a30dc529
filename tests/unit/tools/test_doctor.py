"""The doctor in this environment, and in real ones that lack something: the console script, in processes of its own."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from swift_lora_fix.common.settings import Settings
from swift_lora_fix.install import releases
from swift_lora_fix.tools.doctor import facts, variables
from tests.support.environments import Environment, swift_lora_fix

SWIFT = releases.installed_swift() or "0"
FAMILY = releases.family_of(SWIFT)
assert FAMILY is not None, "the suite runs with a release of the table"
once = pytest.mark.skipif(FAMILY.last != releases.NEWEST_KNOWN, reason="the same everywhere: in the newest environment")
PACKAGE = FAMILY.layout.rollout_module
SWIFT_NAMES = ("swift", "ms_swift-*")
VLLM_NAMES = ("vllm", "vllm*.dist-info")


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


def broken(done: Any) -> dict[str, Any]:
    """The report of an environment that cannot work."""
    assert done.returncode == 2, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["verdict"] == "broken" and report["exit_code"] == 2 and report["problems"]
    assert not report["patches"]["applied"] and not any(defect["mended"] for defect in report["defects"])
    return report


def test_this_environment_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("swift", "vllm", "torch", "json", "inspect"):  # a clone of ms-swift, or a script with an unlucky name
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not me')")
    monkeypatch.chdir(tmp_path)  # the working folder shadows nothing
    done = swift_lora_fix("doctor", "--json", SWIFT_LORA_FIX_ARMED="1")  # as a process that this package runs in has it
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)  # nothing else is on standard output
    assert "INFO" not in done.stderr and "Warning" not in done.stderr, "what ms-swift prints at import is kept out"
    assert list(report) == [
        "verdict", "exit_code", "framework", "versions", "vllm_distribution", "release", "defects", "patches", "plugin",
        "engine", "environment", "problems", "advice",
    ]  # fmt: skip
    assert all(f"    {key}  " in str(facts.__doc__) or f"{key}:" in str(facts.__doc__) for key in report)
    assert report["verdict"] == "ready" and report["problems"] == report["advice"] == []
    assert all(report["versions"].values()) and report["versions"]["ms-swift"] == SWIFT
    assert report["versions"]["vllm"] == releases.installed_vllm() and "vllm" in report["vllm_distribution"]
    assert FAMILY and report["release"] == {"known": True, "span": FAMILY.label, "affected": True}
    assert [defect["key"] for defect in report["defects"]] == [defect.key for defect in FAMILY.defects]
    assert {defect["key"]: defect["mended"] for defect in report["defects"]} == {
        d.key: d.mended for d in FAMILY.defects
    }
    assert report["patches"]["applied"] and len(report["patches"]["targets"]) >= 5
    assert set(report["patches"]["targets"].values()) == {"applied"}
    assert report["plugin"]["file_exists"] and report["plugin"]["entry_point"] and not report["plugin"]["kept_out"]
    assert report["engine"]["tested_on"] == ["cpu"] and report["engine"]["load_inplace"] is (SWIFT > "4")
    assert report["engine"]["device"] == "CPU" and report["engine"]["bf16"] is True
    variables = {variable["name"]: variable["value"] for variable in report["environment"]}
    assert {"SWIFT_LORA_FIX", "SWIFT_LORA_FIX_WRITER", "VLLM_PLUGINS"} <= set(variables)
    assert not any(variables.values())


def five_lines(done: Any) -> list[str]:
    lines: list[str] = done.stdout.splitlines()
    assert len(lines) <= 5 and lines[0].startswith("swift-lora-fix doctor: "), done.stdout + done.stderr
    assert lines[-1] == "Everything that was found: swift-lora-fix doctor --verbose (tables) or --json (for machines)."
    assert "\u2026" not in done.stdout, "rich's mark for what it cut off"
    return lines


def test_the_verdict_and_what_to_do_in_five_lines() -> None:
    done = swift_lora_fix("doctor", COLUMNS="60")
    verdict, found, defects, start, _ = five_lines(done)
    assert done.returncode == 0 and verdict.endswith("ready: the fix goes in, nothing to do")
    assert f"ms-swift {SWIFT}, vLLM {releases.installed_vllm()} (from vllm" in found and "on CPU" in found
    assert FAMILY and f"{len(FAMILY.defects)} known defects" in defects and FAMILY.defects[0].title in defects
    assert start.endswith('swift rlhf ... --external_plugins "$(swift-lora-fix plugin)"')


@once
def test_five_lines_name_what_is_most_urgent_and_count_the_rest() -> None:
    settings = {"SWIFT_LORA_FIX": "off", "SWIFT_LORA_FIX_WRITTER": "loader", "VLLM_PLUGINS": "lora"}
    lines = five_lines(swift_lora_fix("doctor", **settings))
    assert lines[0].endswith("works, and there is something to do")
    assert lines[2].startswith("1. SWIFT_LORA_FIX=off keeps every patch out") and "unset it" in lines[2]
    assert lines[3].startswith("2. SWIFT_LORA_FIX_WRITTER is no setting") and lines[3].endswith("(And 1 more.)")


@once
def test_what_works_and_is_not_as_it_should_be() -> None:
    done = swift_lora_fix(
        "doctor",
        "--verbose",
        COLUMNS="80",
        SWIFT_LORA_FIX="off",
        SWIFT_LORA_FIX_WRITTER="loader",
        VLLM_PLUGINS="lora",
        VLLM_ALLREDUCE_USE_SYMM_MEM="0",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    assert "there is something to do" in text
    assert "SWIFT_LORA_FIX=off keeps every patch out" in text and "0 mended here" in text
    assert "SWIFT_LORA_FIX_WRITTER is no setting" in text and "SWIFT_LORA_FIX_WRITER" in text
    assert "set VLLM_PLUGINS=lora,swift_lora_fix." in text
    assert "'0' (tensor parallel was tested with 0 only)" in text
    assert FAMILY and all(defect.title.split()[0] in text for defect in FAMILY.defects)
    assert f"What stock ms-swift {FAMILY.label} does wrong with LoRA" in text
    assert "\u2026" not in done.stdout, "rich's mark for what it cut off"


@once
def test_releases_that_nobody_has_tried(environment: Environment) -> None:
    """The code is the installed one; its metadata say otherwise."""
    environment.without("ms_swift-*", "vllm*.dist-info", "swift_lora_fix-*")
    environment.with_version("ms-swift", "99.0").with_version("vllm", "99.1").with_version("swift-lora-fix", "0.1.0")
    done = environment.run("doctor", "--json")
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["patches"]["applied"] and report["release"] == {"known": False, "span": None, "affected": None}
    newer, loses, untested, no_gpu, entry_point = report["advice"]
    assert "From vLLM 0.33 on" in loses and "finish_weight_update" in loses
    assert f"ms-swift 99.0 is not in our table (3.10.0 to {releases.NEWEST_KNOWN})" in newer
    assert "vLLM 99.1 was not tested" in untested and "on a GPU (tested there: 0.20.2)" in untested
    assert "No GPU is visible here" in no_gpu and report["vllm_distribution"] == "vllm"
    assert "not registered" in entry_point and not report["plugin"]["entry_point"]


@pytest.mark.parametrize(
    "missing, told",
    [
        ((*SWIFT_NAMES, "trl", "trl-*"), ["ms-swift", "trl"]),
        (VLLM_NAMES, ["vllm"]),
        ((*SWIFT_NAMES, *VLLM_NAMES), ["vllm"]),  # an environment of TRL's, where ms-swift is not missing
        (("peft", "peft-*", "trl", "trl-*"), ["peft", "trl"]),
        ((*SWIFT_NAMES, *VLLM_NAMES, "torch", "torch-*", "trl", "trl-*"), ["ms-swift", "vllm", "torch", "trl"]),
    ],
)
def test_missing_packages(environment: Environment, missing: tuple[str, ...], told: list[str]) -> None:
    report = broken(environment.without(*missing).run("doctor", "--json"))
    assert report["problems"] == [f"{name} is not installed in this environment: pip install {name}" for name in told]
    assert [name for name, version in report["versions"].items() if version is None] == told
    since = time.monotonic()
    done = environment.run("doctor")
    assert time.monotonic() - since < 3, "nothing heavy is imported to say that something is missing"
    assert done.returncode == 2 and "cannot work as it is" in five_lines(done)[0]
    assert f"pip install {told[0]}" in done.stdout and "not installed" in done.stdout


def test_too_old(environment: Environment) -> None:
    environment.without("ms_swift-*").with_version("ms-swift", "3.9.3")
    report = broken(environment.run("doctor", "--json"))
    assert len(report["problems"]) == 1 and "ms-swift 3.9.3 is older than 3.10.0" in report["problems"][0]


@pytest.mark.parametrize(
    "code, told",
    [
        ("print('noise'); import no_such_dependency", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("print('noise'); raise RuntimeError('ABI mismatch')", "RuntimeError: ABI mismatch"),
        ("print('noise'); raise SystemExit('needs a licence')", "SystemExit: needs a licence"),
        ("import os; print('undefined symbol', flush=True); os.abort()", "(SIGABRT)"),
        ("import os; print('undefined symbol', flush=True); os._exit(7)", "ended the process with status 7"),
    ],
)
def test_packages_that_break_on_import(environment: Environment, code: str, told: str) -> None:
    environment.without("swift").with_module(PACKAGE, code)
    report = broken(environment.run("doctor", "--json"))
    (problem,) = report["problems"]
    assert told in problem
    assert "undefined symbol" in problem or f"{PACKAGE.rsplit('.')[-1]}.py, line 1" in problem, "and where"


def test_a_contract_that_does_not_hold(environment: Environment) -> None:
    environment.without("swift")
    for module in releases.trainer_modules(PACKAGE):  # whose source is looked through
        environment.with_module(module)
    environment.with_module(PACKAGE, "class RolloutTrainerMixin: ...")
    report = broken(environment.run("doctor", "--json"))
    (problem,) = report["problems"]
    assert "RolloutTrainerMixin._fast_infer is missing" in problem and f"ms-swift {SWIFT}" in problem


@pytest.mark.parametrize(
    "name, value",
    [("SWIFT_LORA_FIX", "maybe"), ("SWIFT_LORA_FIX_WRITER", "fast"), ("VLLM_ENABLE_V1_MULTIPROCESSING", "no")],
)
def test_invalid_settings(name: str, value: str) -> None:
    report = broken(swift_lora_fix("doctor", "--json", **{name: value}))
    assert len(report["problems"]) == 1 and f"{name}={value!r}" in report["problems"][0]
    (variable,) = [variable for variable in report["environment"] if variable["name"] == name]
    assert variable["value"] == value and variable["problem"] == report["problems"][0]


def test_a_key_is_not_shown() -> None:
    shown = {v.name: v.value for v in variables.variables_of({"SWIFT_LORA_FIX_API_KEY": "very-secret"})}
    assert shown["SWIFT_LORA_FIX_API_KEY"] == "(hidden)"
    assert "very-secret" not in repr(Settings.from_environment({"SWIFT_LORA_FIX_API_KEY": "very-secret"}))


@pytest.mark.parametrize("name", ["SWIFT_LORA_FIX_APIKEY", "SWIFT_LORA_FIX_API_TOKEN", "SWIFT_LORA_FIX_API_KEY_"])
def test_a_mistyped_key_is_not_printed(name: str) -> None:
    (shown,) = (v for v in variables.variables_of({name: "very-secret"}) if v.name == name)
    assert shown.value == "(hidden)" and shown.note == variables.UNKNOWN_SETTING
