"""ms-swift's trainer is read in one file, and each name that is read there is in the contract."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import swift_lora_fix
from swift_lora_fix import errors
from swift_lora_fix.frameworks.swift.port import SwiftBatch
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


class Scorer:
    """ms-swift's trainer, where it scores rollouts. Dropout is all that its model does."""

    def __init__(self, **sampling: Any) -> None:
        plain = dict(top_k=-1, top_p=1.0, repetition_penalty=1.0, logprobs=True, temperature=0.7)
        self.request_config = SimpleNamespace(**{**plain, **sampling})
        self.temperature, self.vllm_version_ge_0_10_2 = self.request_config.temperature, True
        self.template = SimpleNamespace(sequence_parallel_size=1)
        self.model = torch.nn.Dropout(0.5)
        self.accelerator = SimpleNamespace(unwrap_model=lambda model: model, device=torch.device("cpu"))
        self.scored: list[Any] = []

    def _get_per_token_logps_and_entropies(self, model: Any, inputs: Any, grpo_batch: Any = None, **more: Any) -> Any:
        self.scored.append((inputs, grpo_batch, more))
        inputs["use_cache"] = False  # as ms-swift does
        torch.rand(1)  # as a router that jitters does
        return model(torch.ones(2, 3)), None


def batch_of(apart: bool, rollout: Any, **inputs: Any) -> dict[str, Any]:
    """As 4.4.0 and later make it (apart), or earlier ones."""
    values = dict(completion_mask=torch.ones(2, 3), old_per_token_logps=torch.zeros(2, 3))
    values["rollout_per_token_logps"] = rollout
    return {"model_inputs": inputs, "grpo_batch": SimpleNamespace(**values)} if apart else {**values, **inputs}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, ""),
        ({"min_p": None, "frequency_penalty": 0.0, "structured_outputs_regex": None, "top_k": 0}, ""),
        ({"top_p": 0.9, "top_k": 50}, r"sampling altered them \(top_k 50, top_p 0.9\)"),
        ({"min_p": 0.1}, "min_p 0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty 1.1"),
        ({"presence_penalty": 0.5}, "presence_penalty 0.5"),
        ({"structured_outputs_regex": "[0-9]+"}, "structured_outputs_regex"),
        ({"top_p": None}, "top_p None"),  # the model's own generation config decides
        ({"temperature": 0.0}, "temperature 0"),
        ({"logprobs": False}, "does not ask vLLM for them"),
    ],
)
def test_sampling_that_alters_the_engines_logprobs(changes: dict[str, Any], said: str) -> None:
    found = SwiftBatch(Scorer(**changes), [], batches=[]).why_not
    assert re.search(said, found) if said else not found, found


def test_logprobs_of_an_old_vllm_are_those_before_sampling() -> None:
    trainer = Scorer(top_p=0.9)
    trainer.vllm_version_ge_0_10_2 = False
    assert "do not know the temperature" in SwiftBatch(trainer, [], batches=[]).why_not
    trainer.temperature = 1.0
    assert not SwiftBatch(trainer, [], batches=[]).why_not


def test_sequence_parallelism() -> None:
    trainer = Scorer()
    trainer.template.sequence_parallel_size = 2
    assert "sequence parallelism" in SwiftBatch(trainer, [], batches=[]).why_not


@pytest.mark.parametrize("apart", [True, False])
def test_where_ms_swift_laid_the_rollouts_logprobs_out(apart: bool) -> None:
    laid = torch.full((2, 3), -1.0)
    batches = [batch_of(apart, laid), batch_of(apart, None)]
    first, second = SwiftBatch(Scorer(), [SimpleNamespace()] * 4 if apart else [{}] * 4, batches=batches).scored(False)
    assert first.engine is laid and first.trainer.tolist() == [[0.0] * 3] * 2 and first.mask.shape == (2, 3)
    assert second.engine == [], "they are missing, which is said"


def test_where_it_did_not_up_to_4_3_2() -> None:
    """Each batch takes its own samples, in order; several turns are one row."""
    samples = [{"rollout_logprobs": [[float(-n)], [-0.5, -0.25]]} for n in range(4)]
    parts = SwiftBatch(Scorer(), samples, batches=[batch_of(False, None), batch_of(False, None)]).scored(False)
    assert [row[0] for part in parts for row in part.engine] == [0.0, -1.0, -2.0, -3.0]
    assert parts[0].engine[0] == [0.0, -0.5, -0.25]
    del samples[3]["rollout_logprobs"]
    assert len(SwiftBatch(Scorer(), samples, batches=[batch_of(False, None)] * 2).scored(False)[1].engine) == 1


@pytest.mark.parametrize("apart", [True, False])
def test_scoring_anew_drops_nothing_out_and_leaves_everything_as_it_was(apart: bool) -> None:
    trainer, made = Scorer(), batch_of(apart, torch.zeros(2, 3), input_ids="ids")
    made["_origin_data"] = ["a picture"]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    (part,) = SwiftBatch(trainer, [None] * 2, batches=[made]).scored(True)
    assert part.trainer.tolist() == [[1.0] * 3] * 2, "half of them were zero otherwise"
    assert trainer.model.training and torch.equal(torch.rand(1), expected)
    inputs, grpo_batch, more = trainer.scored[0]
    assert inputs["input_ids"] == "ids" and "use_cache" not in (made["model_inputs"] if apart else made)
    assert (grpo_batch, more) == ((made["grpo_batch"], {"origin_data": ["a picture"]}) if apart else (None, {}))
