"""When TRL is patched, and that it is as it was afterwards: small programs, each in a process of its own.

Most begin with vLLM and torch imported (tests/support/forks.py), which costs most of the time.
"""

from __future__ import annotations

import json
import sys
import textwrap

import pytest

from swift_lora_fix.install import releases
from tests.support import driver, forks, hangs
from tests.support.environments import clean_environment, swift_lora_fix

pytestmark = pytest.mark.e2e

SHOW = """
import transformers.trainer, peft.peft_model, vllm
from trl.generation.vllm_generation import VLLMGeneration
print("PATCHED", [hasattr(function, "_self_wrapper") for function in (
    VLLMGeneration.__init__, VLLMGeneration.sync_weights, VLLMGeneration.generate, vllm.LLM.__init__,
    vllm.LLM.generate, transformers.trainer.Trainer._inner_training_loop, peft.peft_model.PeftModel.load_adapter)])
"""


def program(code: str, is_fresh: bool = False, **more: str) -> str:
    """What it prints. is_fresh: with nothing imported yet."""
    code = textwrap.dedent(code)
    environment = clean_environment(PYTHONPATH=str(driver.REPOSITORY), VLLM_PLUGINS="swift_lora_fix", **more)
    done = (
        hangs.run([sys.executable, "-c", code], env=environment)
        if is_fresh
        else forks.run(code, environment=environment)
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "code, patched",
    [
        ("", False),
        ("import swift_lora_fix", True),
        ("import trl.generation.vllm_generation, swift_lora_fix", True),
        ("import trl, swift_lora_fix; swift_lora_fix.apply(); swift_lora_fix.remove()", False),
    ],
)
def test_it_is_patched_where_it_was_asked_for(code: str, patched: bool) -> None:
    said = program(code + SHOW, is_fresh="trl" not in code)
    assert f"PATCHED {[patched] * 7}" in said, said
    line = f"[INFO:swift.lora_fix] patched {releases.TRL_MODULE} of TRL {releases.installed_trl()}."
    assert said.count(line) == ("fix" in code), said


def test_switched_off_nothing_is_patched() -> None:
    said = program("import swift_lora_fix; swift_lora_fix.apply()" + SHOW, SWIFT_LORA_FIX="off")
    assert f"PATCHED {[False] * 7}" in said, said


def test_applied_twice_and_the_status_names_trl_and_its_defects() -> None:
    said = program("import swift_lora_fix; swift_lora_fix.apply(); print(swift_lora_fix.apply())" + SHOW)
    assert f"PATCHED {[True] * 7}" in said and said.count("patched trl.generation") == 1, said
    assert f"ms-swift None, TRL {releases.installed_trl()}, vLLM {releases.installed_vllm()}" in said, said
    assert "known defects: trl-server-merges-twice, trl-base-drift" in said, said
    assert "TRL generation: VLLMGeneration.sync_weights: applied" in said, said


def test_a_release_that_it_does_not_fit_is_left_alone_and_named() -> None:
    """Armed by its import it steps aside; asked for by name it raises."""
    said = program("""
        import trl.generation.vllm_generation as module
        del module.VLLMGeneration.sync_weights
        module.LLM.generate = lambda self, prompts: None
        import swift_lora_fix
        print("APPLIED", swift_lora_fix.status().applied)
        try:
            swift_lora_fix.apply()
        except swift_lora_fix.errors.ContractError as error:
            print("RAISED", error)
    """)
    assert "APPLIED False" in said and "[WARNING:swift.lora_fix] stepping aside, TRL runs unpatched" in said, said
    (raised,) = [line for line in said.splitlines() if line.startswith("RAISED")]
    assert "VLLMGeneration.sync_weights is missing; LLM.generate(self, prompts)" in raised, said
    assert "nothing was patched" in raised and "or set SWIFT_LORA_FIX=off" in raised


def test_doctor_examines_a_trl_environment() -> None:
    done = swift_lora_fix("doctor", "--json")
    report = json.loads(done.stdout)
    assert report["framework"] == "TRL" and "ms-swift" not in report["versions"] and not report["problems"]
    assert report["versions"]["trl"] == releases.installed_trl() and report["patches"]["applied"]
    assert report["release"]["span"] == "1.11.0 to 1.16.0"
    mended = {defect["key"]: defect["mended"] for defect in report["defects"]}
    assert mended["trl-base-drift"] and not mended["trl-server-merges-twice"]
    assert (report["verdict"], done.returncode) == ("ready", 0), report["advice"]
    verdict, found, _, start, _ = swift_lora_fix("doctor").stdout.splitlines()
    assert verdict.endswith("nothing to do") and found.startswith(f"TRL {releases.installed_trl()}, vLLM ")
    assert start == "Use it: import swift_lora_fix, before the trainer is made."
