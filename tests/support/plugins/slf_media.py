"""Records, after every rollout that has an image in it, how the trainer scores what the engine says about that image.

One JSON line a rollout goes to ``$SLF_MEDIA_FILE``: ``step``; mean |logprob engine - trainer| in nats of the trainer as
it is (``mean``), without its adapter (``base``), with a negative of the image (``negative``), and of the same model
called with transformers' processor in place of ms-swift's template (``plain``); ``same_ids``: whether the template
writes the ids that the engine says it was given. Load it after the plugin: what it asks goes past the gate.
"""

import dataclasses
import json
import os

import wrapt

# the second is longer than --max_length: the engine is given less of it
PROMPTS = ["Look at this picture.", "What is in it? " * 12, "Name its colours.", "Say in one word what it shows."]
MODULES = ("swift.rlhf_trainers.rollout_mixin", "swift.trainers.rlhf_trainer.rollout_mixin")


def _plain(port, answers):
    """Row by row without padding, and without the template's forward hook."""
    import torch

    from swift_lora_fix.proof import probe

    template, model, found = port.trainer.template, port.model, []
    handles = [hook for _, hook in template._handles]
    hooks, model._forward_pre_hooks = model._forward_pre_hooks, type(model._forward_pre_hooks)()
    assert handles, "ms-swift has hooked the model"
    try:
        for answer in answers:
            picture = _opened(answer.request)
            inputs = template.processor.image_processor(images=[picture], return_tensors="pt")
            ids = torch.tensor([[*answer.prompt, *answer.tokens]])
            labels = torch.tensor([[-100] * len(answer.prompt) + list(answer.tokens)])
            found += probe.logprobs_of(model, {"input_ids": ids, **inputs}, labels)
    finally:
        model._forward_pre_hooks = hooks
    return found


def _opened(request):
    from PIL import Image

    fields = request if isinstance(request, dict) else vars(request)
    image = fields["images"][0]
    image = image.get("path") if isinstance(image, dict) else image
    return Image.open(image).convert("RGB")


def _negative(answer):
    import copy

    from PIL import ImageOps

    request = copy.deepcopy(answer.request)
    fields = request if isinstance(request, dict) else vars(request)
    fields["images"] = [ImageOps.invert(_opened(answer.request))]
    return dataclasses.replace(answer, request=request)


def _mean(answers, scores):
    gaps = [abs(a - b) for answer, row in zip(answers, scores) for a, b in zip(answer.logprobs, row)]
    return sum(gaps) / len(gaps)


def _record(port, rollout):
    import torch

    from swift_lora_fix.proof import probe

    with probe.same_random_state(port.device), torch.no_grad():
        answers = rollout.ask(PROMPTS, 16, with_media=True)
        modes = [(module, module.training) for module in port.model.modules()]
        port.model.eval()
        scored = {
            "mean": probe.score(port, answers),
            "base": probe.score(port, answers, port.model.disable_adapter()),
            "negative": probe.score(port, [_negative(answer) for answer in answers]),
            "plain": _plain(port, answers),
        }
        for module, training in modes:
            module.training = training
        inputs = port.encoded(answers)
        written = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    found = {name: _mean(answers, scores) for name, scores in scored.items()}
    same = written == [[*answer.prompt, *answer.tokens] for answer in answers]
    with open(os.environ["SLF_MEDIA_FILE"], "a") as file:
        file.write(json.dumps({"step": port.step, "same_ids": same, **found}) + "\n")


def _infer(wrapped, trainer, args, kwargs):
    from swift_lora_fix.frameworks.swift.port import SwiftTrainer
    from swift_lora_fix.frameworks.swift.rollouts import SwiftRollout

    port = SwiftTrainer(trainer)
    rollout = SwiftRollout(port, wrapped, *args, **kwargs)
    result = wrapped(*args, **kwargs)
    if rollout.has_media:
        _record(port, rollout)
    return result


def _wrap(module):
    wrapt.wrap_function_wrapper(module, "RolloutTrainerMixin._engine_infer", _infer)


for name in MODULES:
    wrapt.register_post_import_hook(_wrap, name)
