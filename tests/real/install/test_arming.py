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


def test_every_order_of_the_ways_in() -> None:
    """24 orders, by forks: ms-swift's import, which takes most of the time, is shared by those that begin alike."""
    output = run("""
        import os
        PLUGIN = "swift_lora_fix_plugin"
        said = []
        class Counting(logging.Handler):
            def emit(self, record):
                said.append(record.getMessage())
        logging.getLogger("swift.lora_fix").addHandler(Counting())

        def by_import():
            import swift_lora_fix
        def by_flag():  # as ms-swift does it
            import importlib.util
            folder = importlib.util.find_spec("swift_lora_fix").submodule_search_locations[0]
            sys.path.insert(0, os.path.join(folder, "plugin"))
            importlib.import_module(PLUGIN)
        def by_name():
            import swift_lora_fix
            swift_lora_fix.apply()
        WAYS = {"import": by_import, "swift": rollout, "flag": by_flag, "apply": by_name}

        def check(done):
            loaded = ROLLOUT in sys.modules
            assert loaded == bool({"swift", "flag", "apply"} & set(done)), done
            if not loaded:
                return
            asked = set(done) != {"swift"}
            assert is_patched(rollout()) == {asked}, done
            assert sum(text.startswith("patched swift.") for text in said) == asked, (done, said)

        def take_out(done):
            import swift_lora_fix
            wrappers = own(rollout())
            for again in (swift_lora_fix.apply, lambda: sys.modules.pop(PLUGIN, None) and by_flag()):
                swift_lora_fix.remove()
                assert is_patched(rollout()) == {False}, done
                assert all(own(rollout())[name] is wrappers[name].__wrapped__ for name in TARGETS), done
                assert not swift_lora_fix.status().armed and "SWIFT_LORA_FIX_ARMED" not in os.environ
                again()
                assert is_patched(rollout()) == {True}, done

        def go_on(done):
            check(done)
            if len(done) == len(WAYS):
                take_out(done)
                print("ORDER", *done, flush=True)
            for way in WAYS:
                if way in done:
                    continue
                child = os.fork()
                if not child:
                    try:
                        WAYS[way]()
                        go_on((*done, way))
                    except BaseException:
                        import traceback
                        traceback.print_exc()
                        os._exit(1)
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0, (*done, way)
        go_on(())
    """)
    orders = [line for line in output.splitlines() if line.startswith("ORDER")]
    assert len(set(orders)) == 24, output[-3000:]


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
    assert "WARNING:swift.lora_fix" not in output, "ms-swift's own functions are nobody's wrappers"


def test_the_trainers_scoring_is_patched_beside_the_rest() -> None:
    """It is for numbers alone: where ms-swift has another name for it, a line says so and the rest goes in."""
    output = run("""
        import importlib
        import swift_lora_fix
        swift_lora_fix.apply()
        trainer = importlib.import_module(f"{ROLLOUT.rpartition('.')[0]}.grpo_trainer").GRPOTrainer
        ours = vars(trainer)["_prepare_batch_inputs"]
        assert "applied" in [s for t, s in swift_lora_fix.status().patches.items() if "_prepare_batch_inputs" in t]
        swift_lora_fix.remove()
        assert vars(trainer)["_prepare_batch_inputs"] is ours.__wrapped__
        trainer._prepare_batches = ours.__wrapped__
        del trainer._prepare_batch_inputs
        if hasattr(trainer, "_prepare_batch_inputs"):  # of the mixin, from 4.4.0 on
            del trainer.__mro__[1]._prepare_batch_inputs
        for _ in range(2):  # the second time it was asked for by name before
            swift_lora_fix.apply()
            assert is_patched(rollout()) == {True} and not hasattr(trainer, "_prepare_batch_inputs")
        swift_lora_fix.remove()
    """)
    assert output.count("the rollouts' own logprobs are not compared with the trainer's: ") == 2, output[-2000:]
    assert "GRPOTrainer._prepare_batch_inputs is missing" in output


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


def test_the_trainers_of_the_coming_version_are_not_passed_over_in_silence() -> None:
    output = run_fresh("""
        import types, wrapt, swift_lora_fix
        from swift_lora_fix.install import releases
        name = releases.SWIFT_REWRITE
        sys.modules[name] = types.ModuleType(name)
        wrapt.notify_module_loaded(sys.modules[name])
        assert swift_lora_fix.apply().applied, "the old trainers are patched all the same"
    """)
    assert "a run with these trainers is not protected" in output and "swift.dev is loaded" in output


def test_rollouts_that_ray_started_are_named_and_left_alone() -> None:
    output = run_fresh("""
        import types, wrapt, swift_lora_fix
        from swift_lora_fix.install import releases
        (name,) = releases.ray_modules()  # a stand-in, as above: Ray is not installed
        sys.modules[name] = types.ModuleType(name)
        wrapt.notify_module_loaded(sys.modules[name])
        assert not swift_lora_fix.status().applied
    """)
    assert "stepping aside, rollouts that Ray started run as they are" in output and "for a Megatron trainer" in output


@pytest.mark.parametrize("value, message", [("maybe", "SWIFT_LORA_FIX='maybe'")])
def test_a_setting_that_is_not_understood(value: str, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import swift_lora_fix"],
        env={**os.environ, "SWIFT_LORA_FIX": value},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and message in done.stderr
