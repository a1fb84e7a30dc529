"""Import, apply and remove in every order, each in a process of its own, against the installed ms-swift.

Those that import ms-swift begin with vLLM and torch imported (tests/support/forks.py), which costs most of the time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from swift_lora_fix.install import releases
from tests.support import forks, hangs

FAMILY = releases.family_of(releases.installed_swift() or "0")
assert FAMILY is not None, "the suite runs with a release of the table"

PREAMBLE = (
    f"""
ROLLOUT = {FAMILY.layout.rollout_module!r}
"""
    + """
import importlib, logging, sys
logging.basicConfig(level=logging.INFO)
TARGETS = ("prepare_rollout", "_fast_infer", "_move_model_to_vllm", "_engine_infer")
def rollout():
    return importlib.import_module(ROLLOUT).RolloutTrainerMixin
def own(cls):
    return {name: vars(cls)[name] for name in TARGETS}
def is_patched(cls):
    return {"FunctionWrapper" == type(vars(cls)[name]).__name__ for name in TARGETS}
"""
)


def run(script: str, **environment: str) -> str:
    return _output(forks.run(PREAMBLE + textwrap.dedent(script), environment=_environment(**environment)))


def run_fresh(script: str) -> str:
    """With nothing imported yet."""
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(script)]
    return _output(hangs.run(command, env=_environment()))


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "VLLM_PLUGINS": "none", **more}


def _output(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def test_import_loads_nothing_heavy() -> None:
    run_fresh("""
        import swift_lora_fix
        assert not {"torch", "vllm", "swift", "peft", "transformers"} & set(sys.modules)
        state = swift_lora_fix.status()
        assert state.armed and not state.applied and state.run is None
        assert not {"torch", "vllm", "swift", "peft", "transformers"} & set(sys.modules), "status() loads nothing"
    """)


def test_import_before_swift_then_apply_remove_apply() -> None:
    output = run("""
        import swift_lora_fix
        cls = rollout()
        assert is_patched(cls) == {True}, "armed at import, applied when the rollout module is loaded"
        wrappers = own(cls)
        assert swift_lora_fix.status().applied
        swift_lora_fix.apply()
        assert own(cls) == wrappers and all(own(cls)[n] is wrappers[n] for n in TARGETS), "twice changes nothing"
        import peft
        load_adapter = vars(peft.PeftModel)["load_adapter"]
        swift_lora_fix.remove()
        assert is_patched(cls) == {False}
        assert all(own(cls)[n] is wrappers[n].__wrapped__ for n in TARGETS)
        assert vars(peft.PeftModel)["load_adapter"] is load_adapter.__wrapped__
        swift_lora_fix.remove()
        assert not swift_lora_fix.status().applied
        swift_lora_fix.apply()
        assert is_patched(cls) == {True} and swift_lora_fix.status().applied

        # somebody wraps one of ours afterwards: it cannot be taken out from under them
        outer = lambda self: None
        ours, cls._engine_infer = vars(cls)["_engine_infer"], outer
        try:
            swift_lora_fix.remove()
        except swift_lora_fix.errors.PatchConflictError as error:
            assert "_engine_infer" in str(error)
        else:
            raise AssertionError("remove() took out a patch that somebody else had wrapped")
        assert is_patched(cls) == {True, False} and swift_lora_fix.status().applied, "nothing was removed"
        cls._engine_infer = ours
        swift_lora_fix.remove()
        assert is_patched(cls) == {False}
    """)
    assert output.count("patched swift.") == 2, "one line each time the patches go in"


def test_import_after_swift_and_a_broken_contract() -> None:
    output = run("""
        cls = rollout()
        originals = own(cls)
        import peft
        load_adapter = vars(peft.PeftModel)["load_adapter"]

        # a release without one of the targets: armed by itself it steps aside, asked by name it raises
        module = sys.modules[cls.__module__]
        missing = module.TensorLoRARequest
        del module.TensorLoRARequest
        import swift_lora_fix
        assert is_patched(cls) == {False} and "stepped aside" in swift_lora_fix.status().reason
        try:
            swift_lora_fix.apply()
        except swift_lora_fix.errors.ContractError as error:
            text = str(error)
            assert "TensorLoRARequest is missing" in text and "ms-swift" in text and "SWIFT_LORA_FIX=off" in text
        else:
            raise AssertionError("a missing target must raise")
        assert all(own(cls)[n] is originals[n] for n in TARGETS), "nothing was half-applied"
        assert vars(peft.PeftModel)["load_adapter"] is load_adapter
        module.TensorLoRARequest = missing

        # a target with another signature
        cls._fast_infer = lambda self, samples, strategy: None
        try:
            swift_lora_fix.apply()
        except swift_lora_fix.errors.ContractError as error:
            assert "_fast_infer" in str(error) and "strategy" in str(error)
        else:
            raise AssertionError("a changed signature must raise")
        cls._fast_infer = originals["_fast_infer"]

        swift_lora_fix.apply()
        assert is_patched(cls) == {True}
        swift_lora_fix.remove()
        assert all(own(cls)[n] is originals[n] for n in TARGETS), "the very objects"
        assert vars(peft.PeftModel)["load_adapter"] is load_adapter
    """)
    assert output.count("stepping aside") == 1, "said once"


def test_an_apply_that_fails_leaves_nothing_behind() -> None:
    """Also where the import hook had already wrapped PEFT's load_adapter."""
    run("""
        import os
        import swift.tuners.peft, peft
        load_adapter = vars(peft.PeftModel)["load_adapter"]
        import swift_lora_fix
        assert vars(peft.PeftModel)["load_adapter"] is not load_adapter
        import swift_lora_fix.install.releases as releases
        releases.CALLS += (releases.Target("NoSuchName", is_function=False),)
        try:
            swift_lora_fix.apply()
        except swift_lora_fix.errors.ContractError as error:
            assert "NoSuchName is missing" in str(error)
        else:
            raise AssertionError("a missing target must raise")
        assert vars(peft.PeftModel)["load_adapter"] is load_adapter and is_patched(rollout()) == {False}
        state = swift_lora_fix.status()
        assert not state.armed and "NoSuchName" in state.reason and "SWIFT_LORA_FIX_ARMED" not in os.environ
    """)


def test_off_keeps_everything_out() -> None:
    run(
        """
        import swift_lora_fix
        cls = rollout()
        assert is_patched(cls) == {False}
        state = swift_lora_fix.apply()
        assert is_patched(cls) == {False} and not state.enabled and not state.armed and not state.applied
        """,
        SWIFT_LORA_FIX="off",
    )


def test_megatron_is_refused_by_name_and_left_alone_otherwise() -> None:
    output = run_fresh("""
        import types, wrapt, swift_lora_fix
        from swift_lora_fix.install import releases
        # Megatron itself needs a GPU stack: a stand-in module under its name is what the import hook sees
        name = releases.megatron_modules()[0]
        sys.modules[name] = types.ModuleType(name)
        wrapt.notify_module_loaded(sys.modules[name])
        try:
            swift_lora_fix.apply()
        except swift_lora_fix.errors.UnsupportedTrainerError as error:
            assert "Megatron" in str(error) and "swift rlhf" in str(error)
        else:
            raise AssertionError("apply() must refuse a Megatron trainer")
        assert not swift_lora_fix.status().applied
    """)
    assert "Megatron" in output


def test_vllm_plugin_arms_only_below_an_armed_process() -> None:
    script = """
        from importlib.metadata import entry_points
        (entry,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "swift_lora_fix"]
        entry.load()()
        import swift_lora_fix.vllm_plugin
        print("armed", "swift_lora_fix.install.arming" in sys.modules and sys.modules["swift_lora_fix"].status().armed)
    """
    assert "armed True" in run(script, SWIFT_LORA_FIX_ARMED="1")


@pytest.mark.parametrize("value, message", [("maybe", "SWIFT_LORA_FIX='maybe'")])
def test_a_setting_that_is_not_understood(value: str, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import swift_lora_fix"],
        env={**os.environ, "SWIFT_LORA_FIX": value},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and message in done.stderr
