"""Runs in a process of its own: one real vLLM engine on the CPU whose LoRA layers are dense, against PEFT in float32.

    python -m tests.support.dense MODEL_FOLDER ADAPTER_FOLDER [FAULT]

Prints one JSON object. ``dense``, ``gated``: how many layers are. ``said``: this package's log lines. ``adapted``,
``plain``: mean |logprob difference| to PEFT of the tokens of requests with the adapter, and of those without, which are
answered in one batch. ``effect``: of the adapter itself. ``weights_changed``: base parameters that are not the file's.
``again``: whether the same requests got the same logprobs, bit for bit.

FAULT, from ``FAULTS``, makes the sums wrong before the engine is built.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, Callable

import swift_lora_fix  # noqa: F401  arms the dense layers
from tests.support.parity import PROJECTIONS, build_engine, peft_model

PROMPTS = [[7, 3, 11, 200, 42, 9, 77, 5], [300, 4, 4, 18, 90], [61, 62, 63, 64, 65, 66, 67]]
WITH_ADAPTER = (True, False, True)
TOKENS = 8


def fault_scale(combine: Callable[..., None]) -> Callable[..., None]:
    """The update counts twice."""
    return lambda out, base, shrunk, b, *rest: combine(out, base, 2 * shrunk, b, *rest)


def fault_slices(combine: Callable[..., None]) -> Callable[..., None]:
    """Each slice takes A·x of the first."""

    def wrong(out: Any, base: Any, shrunk: Any, b: Any, indices: Any, slices: Any) -> None:
        combine(out, base, shrunk[:, : b.shape[1]].repeat(1, len(slices)), b, indices, slices)

    return wrong


def fault_everybody(combine: Callable[..., None]) -> Callable[..., None]:
    """Tokens without adapter get it, too."""
    return lambda out, base, shrunk, b, indices, slices: combine(out, base, shrunk, b, 0 * indices, slices)


def fault_raises(combine: Callable[..., None]) -> Callable[..., None]:
    def wrong(*_: Any) -> None:
        raise RuntimeError("out of shared memory")

    return wrong


FAULTS = {"scale": fault_scale, "slices": fault_slices, "everybody": fault_everybody, "raises": fault_raises}


Answers = list[tuple[list[int], list[float]]]  # of each prompt, the tokens generated and their logprobs


def peft_logprobs(model: Path, adapter: Path, given: Answers, use_adapter: bool) -> list[list[float]]:
    """Of the tokens of ``given``, after their prompts, in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32)
    trained = PeftModel.from_pretrained(base, adapter) if use_adapter else base
    found = []
    for prompt, (tokens, _) in zip(PROMPTS, given):
        with torch.no_grad():
            logits = trained(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        found.append(logits.float().log_softmax(-1)[range(len(tokens)), tokens].tolist())
    return found


def answers(llm: Any, adapter: Path) -> Answers:
    """What the engine generates, asked for in one batch, with the adapter or without."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    request = LoRARequest("dense", 1, str(adapter))
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0, logprobs=0),
        lora_request=[request if use else None for use in WITH_ADAPTER],
        use_tqdm=False,
    )
    return [
        (list(one.token_ids), [row[token].logprob for row, token in zip(one.logprobs, one.token_ids)])
        for one in (output.outputs[0] for output in outputs)
    ]


def distance(first: list[list[float]], second: list[list[float]]) -> float:
    gaps = [abs(a - b) for one, other in zip(first, second) for a, b in zip(one, other)]
    return sum(gaps) / len(gaps)


def chosen(rows: list[list[float]], wanted: bool) -> list[list[float]]:
    return [row for row, use in zip(rows, WITH_ADAPTER) if use == wanted]


def main() -> None:
    model, adapter = Path(sys.argv[1]), Path(sys.argv[2])
    if not adapter.is_dir():
        peft_model(model, 1, {"target_modules": PROJECTIONS, "r": 8}, "float32").save_pretrained(adapter)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("swift.lora_fix").addHandler(handler)
    logging.getLogger("swift.lora_fix").setLevel(logging.INFO)
    from swift_lora_fix.engine.vllm.dense import op

    if sys.argv[3:]:
        op.combine = FAULTS[sys.argv[3]](op.combine)
    engine = build_engine(model, "bfloat16")
    from safetensors.torch import load_file

    files = load_file(next(model.glob("*.safetensors")))
    layers = [module for module in engine.inner_model.modules() if hasattr(module, "lora_a_stacked")]
    down = {name: tensor for name, tensor in files.items() if name.endswith(("o_proj.weight", "down_proj.weight"))}
    held = dict(engine.inner_model.named_parameters())
    changed = [
        name for name, tensor in down.items() if not held[name.replace(".weight", ".base_layer.weight")].equal(tensor)
    ]
    given = answers(engine.llm, adapter)
    engine.llm.llm_engine.reset_prefix_cache()
    again = answers(engine.llm, adapter)
    got = [logprobs for _, logprobs in given]
    adapted, plain = (peft_logprobs(model, adapter, given, use) for use in (True, False))
    record = {
        "dense": sum(hasattr(layer, "dense_rows") for layer in layers),
        "gated": sum("gated" in layer.apply.__func__.__module__ for layer in layers),
        "layers": len(layers),
        "said": said,
        "adapted": distance(chosen(got, True), chosen(adapted, True)),
        "plain": distance(chosen(got, False), chosen(plain, False)),
        "effect": distance(adapted, plain),
        "weights_changed": changed,
        "again": given == again,
        "mark": engine.engine.vllm_config.additional_config,
    }
    print("DENSE " + json.dumps(record), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
