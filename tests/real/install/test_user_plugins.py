"""A user's plugin that wraps what we patch: where ours does not call it any more, one line says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.real.install.test_arming import FAMILY, run

# As they are found in the wild. Both keep the name and the module of what they wrap.
PLAIN = """
import functools
from {rollout} import RolloutTrainerMixin
{name} = RolloutTrainerMixin.{name}
@functools.wraps({name})
def wrapper(self, *args, **kwargs):
    print("the user's wrapper")
    return {name}(self, *args, **kwargs)
RolloutTrainerMixin.{name} = wrapper
"""
WRAPT = """
import wrapt
@wrapt.patch_function_wrapper("{rollout}", "RolloutTrainerMixin.{name}")
def wrapper(wrapped, instance, args, kwargs):
    print("the user's wrapper")
    return wrapped(*args, **kwargs)
"""


def load(folder: Path, kind: str, names: tuple[str, ...], order: tuple[str, ...], then: str = "") -> str:
    """What a process prints that loads the plugins in this order, as ms-swift does, and goes on with ``then``."""
    source = "".join(kind.format(rollout=FAMILY.layout.rollout_module, name=name) for name in names)
    (folder / "users_plugin.py").write_text(source)
    return run(
        f"""
        import importlib.util
        ours = importlib.util.find_spec("swift_lora_fix").submodule_search_locations[0]
        sys.path[:0] = [{str(folder)!r}, ours + "/plugin"]
        for name in {order}:
            importlib.import_module(name)
        {then}
        """
    )


BEFORE, AFTER = ("users_plugin", "swift_lora_fix_plugin"), ("swift_lora_fix_plugin", "users_plugin")
BYPASSED = ("_move_model_to_vllm", "_move_adapter_to_vllm")


@pytest.mark.parametrize("kind", [PLAIN, WRAPT], ids=["plain", "wrapt"])
def test_what_is_bypassed_is_said_once(tmp_path: Path, kind: str) -> None:
    """And what ours still calls is not mentioned."""
    output = load(tmp_path, kind, (*BYPASSED, "_fast_infer"), BEFORE)
    lines = [line for line in output.splitlines() if "users_plugin" in line]
    assert len(lines) == len(BYPASSED), output[-3000:]
    for line, name in zip(lines, BYPASSED):
        assert "WARNING" in line and f"users_plugin replaced RolloutTrainerMixin.{name}" in line
        assert "wrap RolloutTrainerMixin._move_model_to_vllm" in line, "what to do"


@pytest.mark.parametrize("kind", [PLAIN, WRAPT], ids=["plain", "wrapt"])
def test_one_that_comes_later_is_called_around_ours(tmp_path: Path, kind: str) -> None:
    """Which is what the warning advises."""
    call = """
        from swift_lora_fix import session
        session.is_known = lambda trainer: print("our wrapper") or sys.exit()
        rollout()._move_model_to_vllm(object.__new__(rollout()))
    """
    output = load(tmp_path, kind, ("_move_model_to_vllm",), AFTER, call)
    assert "users_plugin" not in output
    assert output.index("the user's wrapper") < output.index("our wrapper")
