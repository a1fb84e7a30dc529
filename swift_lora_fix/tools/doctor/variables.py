"""The environment variables that matter, ours and some of vLLM's: what is set, and whether it is valid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ...common.settings import Settings
from ...errors import SettingsError
from ...install.instrumentor import INTERNAL

PREFIX = "SWIFT_LORA_FIX"
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
class Variable:
    name: str
    value: str | None
    problem: str | None
    note: str


def variables_of(environment: Mapping[str, str]) -> Iterator[Variable]:
    """Our settings and the relevant ones of vLLM, set or not; and unknown variables that look like our settings."""
    known = known_settings()
    for name in known:
        value = environment.get(name)
        problem = None if value is None else _problem_of_setting(name, value)
        yield Variable(name, "(hidden)" if value and name in SECRETS else value, problem, "")
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in {*known, *INTERNAL}:
            shown = "(hidden)" if name.startswith(f"{PREFIX}_API") else environment[name]  # maybe a mistyped key
            yield Variable(name, shown, None, UNKNOWN_SETTING)
    for name, note in VLLM_VARIABLES.items():
        value = environment.get(name)
        yield Variable(name, value, None if value is None else _problem_of_number(name, value), note)


def problem_of_all(environment: Mapping[str, str]) -> list[str]:
    """Settings that are valid alone but not together."""
    try:
        Settings.from_environment(environment)
    except SettingsError as error:
        return [str(error)]
    return []


def known_settings() -> tuple[str, ...]:
    """The variables that `Settings` reads."""
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


def _problem_of_number(name: str, value: str) -> str | None:
    if name not in _NUMBERS or value.strip().lstrip("+-").isdigit():
        return None
    return f"{name}={value!r} is no number, and vLLM fails on it: set it to 0 or 1."
