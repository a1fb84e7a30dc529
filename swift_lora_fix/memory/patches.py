"""The hooks into vLLM for adapters from memory. No logic here: each calls a function of ``swift_lora_fix.memory``."""

from __future__ import annotations

from dataclasses import replace

from ..install.registry import Patch, PatchSet
from . import loading, sending

_GONE = "vLLM takes tensors in a LoRARequest (https://github.com/vllm-project/vllm/issues/4068)"


def _patch(target: str, wrapper: object, why: str) -> Patch:
    return Patch(target, wrapper, why=why, goes_when=_GONE)  # type: ignore[arg-type]


def _bypass(target: str, wrapper: object, why: str) -> Patch:
    """A patch that does not call the function it wraps when the adapter is one from memory."""
    return replace(_patch(target, wrapper, why), bypasses=(target,))


# Sending side: the process that has the LLM or the AsyncLLM.
LLM_ENGINE = PatchSet(
    "vllm.v1.engine.llm_engine",
    (
        _patch("LLMEngine.add_lora", sending.add_lora, "the tensors would not reach the engine"),
        _patch("LLMEngine.remove_lora", sending.remove_lora, "a removed adapter would be taken for loaded"),
        _patch("LLMEngine.add_request", sending.add_request, "the tensors would not reach the engine"),
    ),
)
ASYNC_LLM = PatchSet(
    "vllm.v1.engine.async_llm",
    (
        _patch("AsyncLLM.add_lora", sending.add_lora_async, "the tensors would not reach the engine"),
        _patch("AsyncLLM.remove_lora", sending.remove_lora_async, "a removed adapter would be taken for loaded"),
        _patch("AsyncLLM.add_request", sending.add_request_async, "the tensors would not reach the engine"),
    ),
)
OUTPUT_PROCESSOR = PatchSet(
    "vllm.v1.engine.output_processor",
    (
        _patch(
            "OutputProcessor.add_request",
            sending.note_unfinished,
            "an adapter that is evicted while requests for it wait could not be loaded again",
        ),
    ),
)
# Worker side.
PEFT_HELPER = PatchSet(
    "vllm.lora.peft_helper",
    (_bypass("PEFTHelper.from_local_dir", loading.load_config, "vLLM would look for a folder"),),
)
LORA_MODEL = PatchSet(
    "vllm.lora.lora_model",
    (
        _patch("LoRAModel.from_local_checkpoint", loading.load_weights, "vLLM would look for a folder"),
        _patch("LoRAModel.from_lora_tensors", loading.take_tensors, "a write plan could not be learnt"),
    ),
)
RUNNER = PatchSet(
    "vllm.v1.worker.lora_model_runner_mixin",
    (_patch("LoRAModelRunnerMixin.add_lora", loading.add_lora, "another adapter under a taken id would be ignored"),),
)
# The process of the engine core, between the two.
EXECUTOR = PatchSet(
    "vllm.v1.executor.abstract",
    (_bypass("Executor.add_lora", loading.add_lora_everywhere, "why a worker refuses an adapter would be lost"),),
)

MEMORY = (PEFT_HELPER, LORA_MODEL, RUNNER, EXECUTOR, OUTPUT_PROCESSOR, LLM_ENGINE, ASYNC_LLM)
