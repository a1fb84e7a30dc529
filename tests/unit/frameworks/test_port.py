"""ms-swift's trainer is read in one file, and each name that is read there is in the contract."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import swift_lora_fix
from swift_lora_fix import errors
from swift_lora_fix.install import contract, releases

PACKAGE = Path(swift_lora_fix.__file__).parent
PORT = PACKAGE / "frameworks" / "swift" / "port.py"
OF_TRANSFORMERS = {"resume_from_checkpoint"}
# names of Python's, of PyTorch's, and of what vLLM and ms-swift answer with, which are no trainer's
OTHERS = {"get", "update", "choices", "logprobs", "response", "prompt_token_ids", "token_ids", "content", "n"}


def names_read_of_the_trainer() -> set[str]:
    """Everything that follows ``trainer.`` or ``self.trainer.`` in the port, however far."""
    found = set()
    for node in ast.walk(ast.parse(PORT.read_text())):
        chain, inner = [], node
        while isinstance(inner, ast.Attribute):
            chain.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id == "trainer":
            found |= set(chain)
        if isinstance(inner, ast.Name) and inner.id == "self" and "trainer" in chain:
            found |= set(chain[: chain.index("trainer")])
    return found


def test_each_name_is_in_the_contract() -> None:
    named = {attribute.name for attribute in releases.ATTRIBUTES}
    read = names_read_of_the_trainer()
    assert {"enable_offload", "_last_loaded_step", "sleep_level", "vllm_client"} <= read, "the test sees them"
    assert read - named - OF_TRANSFORMERS - {"__wrapped__"} == set()


def test_no_other_file_reads_it() -> None:
    mine = {"enable_offload", "rollout_enable_lora", "_last_loaded_step", "vllm_client", "accelerator", "_metrics"}
    readers = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in mine
    }
    assert readers == {"frameworks/swift/port.py"}


def test_a_renamed_attribute_is_a_contract_error_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = ast.parse("class RolloutTrainerMixin:\n    def f(self):\n        return self.offload_is_on, 'sleep_level'\n")
    assert contract.unused([tree], ["enable_offload", "sleep_level", "f"]) == ["enable_offload"]
    module = type(ast)("some.rollout_mixin")
    monkeypatch.setattr(contract, "_sources", lambda name: [tree])
    monkeypatch.setattr(releases, "HOOKS", ())
    monkeypatch.setattr(releases, "CALLS", ())
    with pytest.raises(errors.ContractError, match="enable_offload is not used by its trainer any more"):
        contract.check(module)
