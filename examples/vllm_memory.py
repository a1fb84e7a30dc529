#!/usr/bin/env python3
"""A vLLM program that takes LoRA adapters as tensors: no file between trainer and engine, and no ms-swift.

python3 examples/vllm_memory.py MODEL_FOLDER ADAPTER_FOLDER [PROMPT]
"""

from __future__ import annotations

import sys

from vllm import LLM, SamplingParams

from swift_lora_fix.memory import from_safetensors, update


def main() -> None:
    model, folder, *rest = sys.argv[1:]
    prompt = rest[0] if rest else "Hello"
    llm = LLM(model, enable_lora=True, max_lora_rank=64, max_model_len=256)
    sampling = SamplingParams(temperature=0, max_tokens=16)
    policy = from_safetensors(folder, lora_name="policy", lora_int_id=1)  # from_peft_model(model) takes a trainer's

    update(llm, policy)  # replaces what the engine holds under id 1
    for name, request in (("base", None), ("policy", policy)):
        (output,) = llm.generate(prompt, sampling, lora_request=request, use_tqdm=False)
        print(f"{name}: {list(output.outputs[0].token_ids)} {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
