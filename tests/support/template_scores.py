"""Runs in a process of its own: a real model and template of ms-swift, scored through the port.

    python -m tests.support.template_scores MODEL_FOLDER MODEL_TYPE TEMPLATE [IMAGE ...]

The model is hooked as the trainer hooks it. For each padding side, with and without padding-free rows and sequence
parallelism, prints the largest |logprob difference| to transformers alone: one row at a time, nothing padded, no hook.
Says as well what calling the hooked model with ids alone comes to. One JSON object.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from swift_lora_fix.frameworks.swift.port import SwiftTrainer
from swift_lora_fix.proof import probe
from swift_lora_fix.trainer import Answer

TEXTS = ["Count to three.", "Say hello to the reader of this text.", "What is it?", "Name a colour."]
ANSWERS = [(33, 44, 55), (70, 71, 72, 73, 74), (80, 81), (90,)]


class Trainer:
    """What the port reads of ms-swift's for scoring."""

    vllm_mode = "colocate"

    def __init__(self, model: torch.nn.Module, template: Any) -> None:
        self.model, self.template, self.accelerator = model, template, self
        self.device = torch.device("cpu")

    def unwrap_model(self, model: torch.nn.Module) -> torch.nn.Module:
        return model

    @contextlib.contextmanager
    def _disable_sp_context(self) -> Iterator[None]:
        yield


def asked(template: Any, text: str, images: list[str], tokens: tuple[int, ...]) -> Answer:
    request = {"messages": [{"role": "user", "content": text}], "images": images}
    template.set_mode("transformers")
    prompt = template.encode(copy.deepcopy(request))["input_ids"]
    return Answer(tuple(prompt), tokens, (0.0,) * len(tokens), request)


def alone(model: torch.nn.Module, processor: Any, answer: Answer) -> list[float]:
    from PIL import Image

    pictures = [Image.open(path).convert("RGB") for path in answer.request["images"]]
    media = dict(processor.image_processor(images=pictures, return_tensors="pt")) if pictures else {}
    ids = torch.tensor([[*answer.prompt, *answer.tokens]])
    labels = torch.tensor([[-100] * len(answer.prompt) + list(answer.tokens)])
    return probe.logprobs_of(model, {"input_ids": ids, **media}, labels)[0]


@torch.no_grad()
def run(folder: str, kind: str, template_type: str, images: list[str]) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model
    from swift.model import get_model_processor
    from swift.template import get_template

    if images:
        sys.path.append(str(Path(__file__).parent / "plugins"))
        import slf_vision  # type: ignore[import-not-found]  # noqa: F401
    how = dict(model_type=kind, torch_dtype=torch.float32, device_map="cpu", attn_impl="sdpa")
    base, processor = get_model_processor(folder, **how)
    template = get_template(processor, template_type=template_type)
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(base, adapter).eval()
    given = [[], [], *[[image] for image in images]]
    answers = [asked(template, *each) for each in zip(TEXTS, given, ANSWERS)]
    expected = [alone(model, processor, answer) for answer in answers]
    if images:
        template.model = base
        template.register_post_encode_hook([model])
    template.set_mode("train")
    trainer, found = Trainer(model, template), {}
    for side in ("left", "right"):
        for packed, parts in ((False, 1), (True, 1), (False, 2)):
            template.padding_side, template.padding_free, template.sequence_parallel_size = side, packed, parts
            scores = probe.score(SwiftTrainer(trainer), answers)
            pairs = [pair for one, other in zip(expected, scores) for pair in zip(one, other)]
            assert [len(row) for row in scores] == [len(answer.tokens) for answer in answers]
            found[f"{side} {packed} {parts}"] = max(abs(a - b) for a, b in pairs)
    try:
        model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
        ids_alone = ""
    except Exception as error:
        ids_alone = f"{type(error).__name__}: {error}"
    return {"differences": found, "ids_alone": ids_alone}


if __name__ == "__main__":
    print("FOUND " + json.dumps(run(*sys.argv[1:4], sys.argv[4:])), flush=True)  # type: ignore[arg-type]
