"""Judges, before each rollout of a real run, how far the engine is from the trainer; past the plugin's own gate.

One JSON line a rollout goes to ``$SLF_JUDGE_FILE`` (``.rankN`` appended for ranks above 0): ``step``; for ``text``, and
for ``media`` where the rollout has an image, mean |logprob engine - trainer| in nats of the trainer as it is
(``mean``), without its adapter (``base``) and, where its LoRA reaches a vision tower, without that part of it
(``without_towers``); for ``media`` also what was asked about (``of``: image, audio), or, in ``media_why_not``, why
nothing could be compared; ``base_changed`` and ``lora_changed``: entries of the trainer's frozen weights and of what it
trains that the syncs changed; ``merges``: PEFT merges so far. ``SLF_KILL_AT_STEP=N`` kills the process in place of the
rollout of step N. Load it after the plugin.
"""

import contextlib
import json
import os
import signal

import wrapt

PROMPTS = ["Count to three.", "Which animal barks?", "Is water wet?", "Give me a number below ten."]
MODULES = ("swift.rlhf_trainers.rollout_mixin", "swift.trainers.rlhf_trainer.rollout_mixin")
NEW_TOKENS = 12


def _local(parameter):
    data = getattr(parameter, "ds_tensor", parameter).detach()
    return data.to_local() if hasattr(data, "to_local") else data


def _held(trainer, trained):
    model = trainer.accelerator.unwrap_model(trainer.model)
    named = dict(model.named_parameters())
    if "_slf_shards" not in vars(trainer) and any(hasattr(parameter, "to_local") for parameter in named.values()):
        trainer._slf_shards = named  # FSDP2: after a forward its layers show whole parameters, and not these
    named = vars(trainer).get("_slf_shards", named)
    packed = (".qweight", ".qzeros", ".scales")  # GPTQ's and AWQ's, in buffers
    named = {**named, **{name: value for name, value in model.named_buffers() if name.endswith(packed)}}
    return {name: _local(p) for name, p in named.items() if p.requires_grad == trained}


def _changed(before, now):
    return sum(
        int((old != now[name]).sum()) if old.shape == now[name].shape and old.dtype == now[name].dtype else old.numel()
        for name, old in before.items()
    )


def _mean(answers, scores):
    gaps = [abs(a - b) for answer, row in zip(answers, scores) for a, b in zip(answer.logprobs, row)]
    return sum(gaps) / len(gaps)


def _measure(port, rollout, with_media):
    import torch

    from swift_lora_fix.proof import probe

    with probe.same_random_state(port.device), torch.no_grad(), probe.evaluating(port.model):
        answers = rollout.ask(PROMPTS, NEW_TOKENS, with_media=with_media)
        mean = _mean(answers, probe.score(port, answers))
        found = {"mean": mean, "base": _mean(answers, probe.score(port, answers, port.model.disable_adapter()))}
        if with_media:
            asked = answers[0].request
            fields = asked if isinstance(asked, dict) else vars(asked)
            found["of"] = [kind for kind in ("image", "audio") if fields.get(f"{kind}s")]
        towers = _towers(port.model)
        if with_media and towers:
            found["without_towers"] = _mean(answers, probe.score(port, answers, _off(towers)))
        return found


def _towers(model):
    from peft.tuners.lora import LoraLayer

    named = model.named_modules()
    return [module for name, module in named if isinstance(module, LoraLayer) and "visual" in name]


@contextlib.contextmanager
def _off(layers):
    before = [layer.scaling["default"] for layer in layers]
    for layer in layers:
        layer.scaling["default"] = 0.0
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before):
            layer.scaling["default"] = scaling


def _infer(wrapped, trainer, args, kwargs):
    from swift_lora_fix.frameworks.swift.port import SwiftTrainer
    from swift_lora_fix.frameworks.swift.rollouts import SwiftRollout

    step = trainer.state.global_step
    if step == int(os.environ.get("SLF_KILL_AT_STEP", "-1")):
        os.kill(os.getpid(), signal.SIGKILL)
    port = SwiftTrainer(trainer)
    rollout = SwiftRollout(port, wrapped, *args, **kwargs)
    result = wrapped(*args, **kwargs)
    if rollout.has_requests and trainer._slf_judged != step:
        trainer._slf_judged = step
        record = {"step": step, "text": _measure(port, rollout, False)}
        record["media"] = None
        try:
            record["media"] = _measure(port, rollout, True) if rollout.has_media else None
        except ValueError as error:  # template and vLLM make other tokens of the same prompt
            record["media_why_not"] = str(error)
        record["base_changed"] = _changed(trainer._slf_base, _held(trainer, False))
        record.update(lora_changed=trainer._slf_lora_changed, merges=_merges[0])
        rank = trainer.accelerator.process_index
        with open(os.environ["SLF_JUDGE_FILE"] + (f".rank{rank}" if rank else ""), "a") as file:
            file.write(json.dumps(record) + "\n")
    return result


def _unpack(model):
    """Weights that lie packed in a quantised base are unpacked in the model's first forward (compressed-tensors)."""
    import torch

    if getattr(model.config, "quantization_config", None) is not None:
        with torch.no_grad():
            model(input_ids=torch.tensor([[1, 2]], device=model.device))


def _sync(wrapped, trainer, args, kwargs):
    attributes = vars(trainer)
    if "_slf_base" not in attributes:
        _unpack(trainer.model)
        trainer._slf_base = {name: value.clone() for name, value in _held(trainer, False).items()}
        trainer._slf_lora_changed, trainer._slf_judged = 0, -1
    before = {name: value.clone() for name, value in _held(trainer, True).items()}
    result = wrapped(*args, **kwargs)
    trainer._slf_lora_changed += _changed(before, _held(trainer, True))
    return result


_merges = [0]


@wrapt.when_imported("peft.tuners.tuners_utils")
def _count(module):
    @wrapt.patch_function_wrapper(module.BaseTuner, "merge_adapter")
    def merge(wrapped, tuner, args, kwargs):
        _merges[0] += 1
        return wrapped(*args, **kwargs)


def _wrap(module):
    wrapt.wrap_function_wrapper(module, "RolloutTrainerMixin._engine_infer", _infer)
    wrapt.wrap_function_wrapper(module, "RolloutTrainerMixin._move_model_to_vllm", _sync)


for name in MODULES:
    wrapt.register_post_import_hook(_wrap, name)
