"""When TRL is patched, and that it is as it was afterwards: small programs, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from swift_lora_fix.install import releases
from tests.support import driver
from tests.support.environments import clean_environment, swift_lora_fix

pytestmark = pytest.mark.e2e

SHOW = """
import transformers.trainer, peft.peft_model, vllm
from trl.generation.vllm_generation import VLLMGeneration
print("PATCHED", [hasattr(function, "_self_wrapper") for function in (
    VLLMGeneration.__init__, VLLMGeneration.sync_weights, VLLMGeneration.generate, vllm.LLM.__init__,
    vllm.LLM.generate, transformers.trainer.Trainer._inner_training_loop, peft.peft_model.PeftModel.load_adapter)])
"""


def program(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=clean_environment(PYTHONPATH=str(driver.REPOSITORY), VLLM_PLUGINS="swift_lora_fix", **environment),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "code, patched",
    [
        ("", False),
        ("import swift_lora_fix", True),
        ("import swift_lora_fix; swift_lora_fix.apply(); swift_lora_fix.apply()", True),
        ("import trl.generation.vllm_generation, swift_lora_fix", True),
        ("import trl, swift_lora_fix; swift_lora_fix.apply(); swift_lora_fix.remove()", False),
    ],
)
def test_it_is_patched_where_it_was_asked_for(code: str, patched: bool) -> None:
    said = program(code + SHOW)
    assert f"PATCHED {[patched] * 7}" in said, said
    version = releases.installed_trl()
    assert (f"[INFO:swift.lora_fix] patched {releases.TRL_MODULE} of TRL {version}." in said) == ("fix" in code), said


def test_switched_off_nothing_is_patched() -> None:
    said = program("import swift_lora_fix; swift_lora_fix.apply()" + SHOW, SWIFT_LORA_FIX="off")
    assert f"PATCHED {[False] * 7}" in said, said


def test_the_status_names_trl_and_its_defects() -> None:
    said = program("import swift_lora_fix; print(swift_lora_fix.apply())")
    assert f"ms-swift None, TRL {releases.installed_trl()}, vLLM {releases.installed_vllm()}" in said, said
    assert "known defects: trl-server-merges-twice, trl-base-drift" in said, said
    assert "TRL generation: VLLMGeneration.sync_weights: applied" in said, said


@pytest.mark.parametrize(
    "code, error",
    [
        ("del module.VLLMGeneration.sync_weights", "VLLMGeneration.sync_weights is missing"),
        ("module.LLM.generate = lambda self, prompts: None", "LLM.generate(self, prompts)"),
    ],
)
def test_a_release_that_it_does_not_fit_is_left_alone_and_named(code: str, error: str) -> None:
    broken = f"import trl.generation.vllm_generation as module; {code}\n"
    said = program(f"{broken}import swift_lora_fix\nprint(swift_lora_fix.status().applied)")
    assert "stepping aside, TRL runs unpatched" in said and error in said and said.rstrip().endswith("False"), said
    said = program(f"{broken}import swift_lora_fix\nswift_lora_fix.apply()")
    assert "ContractError" in said and error in said and "nothing was patched" in said, said


def test_doctor_examines_a_trl_environment() -> None:
    done = swift_lora_fix("doctor")
    assert done.returncode in (0, 1), done.stdout
    assert "trl-" not in done.stdout and f"{releases.installed_trl()}" in done.stdout
    assert "the trainer's frozen base drifts" in " ".join(done.stdout.split())
