"""Runs in a process of its own: a framework that does not exist, behind its own port, with a real vLLM engine.

    python -m tests.support.new_framework MODEL_FOLDER MODE [TARGET_MODULE ...]

The very session that serves ms-swift binds the adapter, sends the base, writes the policy of each of three steps, asks
the engine and judges it. Then somebody doubles what the engine holds. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support import parity  # sets what vLLM reads as it is imported
from tests.support.fakes.trainer import Learner, LearnerPort

STEPS = 3


class Batch:
    """Rollouts of this framework: vLLM's own ``generate``."""

    has_requests, has_media, most_tokens = True, False, 64

    def __init__(self, learner: Learner, llm: Any) -> None:
        self.learner, self.llm = learner, llm

    def ask(self, prompts: Sequence[str], new_tokens: int, with_media: bool = False) -> list[Any]:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        from swift_lora_fix.engine.vllm.handle import ADAPTER_ID, ADAPTER_NAME, ADAPTER_PATH
        from swift_lora_fix.trainer import Answer

        adapter = LoRARequest(ADAPTER_NAME, ADAPTER_ID, ADAPTER_PATH) if self.learner.names_adapter else None
        how = SamplingParams(temperature=1.0, max_tokens=new_tokens, logprobs=0, seed=0)
        found = []
        for output in self.llm.generate(list(prompts), how, lora_request=adapter, use_tqdm=False):
            answer = output.outputs[0]
            logprobs = [at[token].logprob for at, token in zip(answer.logprobs, answer.token_ids)]
            found.append(Answer(tuple(output.prompt_token_ids), tuple(answer.token_ids), tuple(logprobs)))
        return found

    def tokens_per_second(self, most_tokens: int) -> float:
        raise AssertionError("no mode is chosen here")


def double(learner: Learner, mode: str) -> None:
    """In the slots, or in the weights: half as much again is no policy of this trainer's either."""
    model = learner.llm.model_executor.driver_worker.worker.model_runner.model
    for name, module in model.named_modules():
        for slot in getattr(module, "lora_b_stacked", ()) if mode == "adapter" else ():
            slot.mul_(2)
        if mode == "fused" and name.endswith("down_proj"):
            module.weight.data.mul_(1.5)


def run(model: Path, mode: Any, targets: list[str]) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer

    from swift_lora_fix import errors, session

    engine = parity.build_engine(model, "auto" if mode == "adapter" else "")
    trained = parity.peft_model(model, 1, {"target_modules": targets or parity.PROJECTIONS}, "float32")
    learner = Learner(
        trained,
        take=lambda weights: engine.inner_model.load_weights(weights.items()),
        llm=engine.engine,
        request_kind=parity.request_class(),
        text=AutoTokenizer.from_pretrained(model),
        has_lora=mode == "adapter",
    )
    found = session.begin(learner, LearnerPort(learner))
    assert found is not None and learner.prepared == 1
    before = {name: parameter.detach().clone() for name, parameter in trained.named_parameters()}
    means, generator = [], torch.Generator().manual_seed(3)
    for learner.updates in range(STEPS):
        with torch.no_grad():
            for parameter in found.adapter.parameters:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        found.invalidate_if_lost()
        found.synchronize()
        found.before_rollout(Batch(learner, engine.llm))
        verdict = found.examination.verdict
        assert verdict is not None and not found.after_rollout()
        means.append([verdict.distance.mean, verdict.floor.mean, verdict.control_base])
    changed = sum(int((before[n] != p).sum()) for n, p in trained.named_parameters() if "lora_" not in n)
    phase = found.phase.value
    learner.updates += 1
    found.synchronize()
    double(learner, mode)
    try:
        found.before_rollout(Batch(learner, engine.llm))
        cause = "nothing noticed"
    except errors.PolicyMismatchError as error:
        cause = error.finding.cause  # type: ignore[attr-defined]
    metrics = {name: values[-1] for name, values in learner.numbers.items()}
    return {"means": means, "phase": phase, "base_changed": changed, "cause": cause, "metrics": metrics}


if __name__ == "__main__":
    print("FOUND " + json.dumps(run(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])), flush=True)
