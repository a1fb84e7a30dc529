"""Things that work but should be different: sentences, each with what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ...common.settings import Settings
from ...install import releases
from .loading import Patches
from .variables import UNKNOWN_SETTING, Variable, known_settings

if TYPE_CHECKING:
    from .facts import Engine, Plugin

ENTRY_POINT = "swift_lora_fix"  # the name of our entry point in vllm.general_plugins


def about_settings(patches: Patches, variables: Sequence[Variable]) -> Iterator[str]:
    given = {variable.name: variable.value for variable in variables if variable.value is not None}
    if patches.tried and not Settings.from_environment(given).enabled:
        yield (
            f"SWIFT_LORA_FIX={given['SWIFT_LORA_FIX']} keeps every patch out, so that runs have the defects of "
            "stock: unset it to use the fix."
        )
    for variable in variables:
        if variable.note == UNKNOWN_SETTING:
            yield f"{variable.name} is no setting, so it does nothing; there are {', '.join(known_settings())}."


def about_release(framework: str, version: str | None) -> Iterator[str]:
    if framework == "TRL":
        oldest, newest = releases.OLDEST_TRL, releases.NEWEST_TRL
        known = version is None or releases.is_trl_too_old(version) or releases.trl_family_of(version) is not None
    else:
        oldest, newest = releases.OLDEST_SUPPORTED, releases.NEWEST_KNOWN
        known = version is None or releases.is_too_old(version) or releases.family_of(version) is not None
    if not known:
        yield (
            f"{framework} {version} is not in our table ({oldest} to {newest}): whether "
            "it has the defects is not known here, and what the patches hook was checked by its shape alone. Look for "
            "a newer swift-lora-fix, and look at lora_sync/mismatch_mean in the first steps of a run."
        )


def about_pair(swift: str | None, vllm: str | None) -> Iterator[str]:
    yield from (f"{words}." for words in releases.pair_problems(swift, vllm))
    if swift is not None and releases.has_rewrite():
        yield (
            f"This ms-swift has the trainers of its coming version 5 ({releases.SWIFT_REWRITE}). They have no "
            f"{releases.ROLLOUT_CLASS}, so a run that uses them is not protected, although the patches go in. Look in "
            'its log for "armed:".'
        )


def about_engine(engine: Engine, vllm: str | None, distribution: str | None) -> Iterator[str]:
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


def about_plugin(plugin: Plugin, environment: Mapping[str, str]) -> Iterator[str]:
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
