"""A vLLM engine in this process that fails in the second step of a call: what is left, and what helps.

python -m tests.support.unfinished MODEL
"""

from __future__ import annotations

import json
import sys
from typing import Any

from vllm import LLM, SamplingParams

from swift_lora_fix.engine.vllm.handle import EngineHandle
from swift_lora_fix.errors import CacheResetError
from tests.support.processors import Keep

GIVEN = [Keep, "tests.support.processors:Keep"]


def answers(llm: Any) -> list[list[int]]:
    sampling = SamplingParams(max_tokens=4, temperature=0)
    outputs = llm.generate(["Hello, how are you?", "What is that?"], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def run(model: str) -> dict[str, Any]:
    llm = LLM(model, enforce_eager=True, max_model_len=128, logits_processors=GIVEN, logprobs_mode="processed_logprobs")
    handle = EngineHandle(llm.llm_engine)
    before, executor, steps = answers(llm), type(handle.executor), []
    own = executor.execute_model

    def failing(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return own(*args, **kwargs) if len(steps) < 2 else 1 / 0

    found: dict[str, Any] = {"processors": handle.logits_processors}
    executor.execute_model = failing
    try:
        answers(llm)
    except ZeroDivisionError as error:
        found["error"] = str(error)
    executor.execute_model = own
    try:
        handle.reset_caches()
    except CacheResetError as error:
        found["reset"] = str(error)
    handle.abort_unfinished()
    found["unfinished"] = llm.llm_engine.has_unfinished_requests()
    handle.reset_caches()
    return {**found, "same": answers(llm) == before}


if __name__ == "__main__":
    print("FOUND " + json.dumps(run(sys.argv[1])), flush=True)
