"""Records, at every rollout of a real run, what the engine serves against what the trainer holds.

One JSON line a rollout goes to ``$SLF_PROBE_FILE`` (``.rankN`` appended for ranks above 0). Fields: ``step``;
``tokens`` (greedy continuations of fixed prompts); ``mean``, ``max`` (|logprob engine - trainer| on those tokens);
``lora_effect`` (mean |logprob trainer with LoRA - without|); ``base_changed`` (share of the trainer's base entries that
differ from the start of the run); ``lora_changed_by_sync`` (LoRA entries that the syncs so far changed);
``lora_dtypes``; ``merge_calls``; ``shared_storage`` (trainer storages found in the engine).
It measures from outside and knows nothing of swift_lora_fix. Load it after the plugin under test, so that its wrappers
are the outer ones.

More environment variables: ``SLF_FREEZE=1`` keeps the learning rate at 0 whatever the checkpoint says;
``SLF_KILL_AT_STEP=N`` kills the process as it begins the rollout of step N; ``SLF_DROP_ADAPTER_AT_STEP=N`` removes
every adapter from the engine just before that rollout. ``gradients`` digests the LoRA gradients of the last step.
"""

import copy
import json
import os
import signal

import wrapt

PROMPTS = ["Count to three.", "Which animal barks?", "Is water wet?", "Give me a number below ten."]
MODULES = ("swift.rlhf_trainers.rollout_mixin", "swift.trainers.rlhf_trainer.rollout_mixin")
NEW_TOKENS = int(os.environ.get("SLF_PROBE_TOKENS", "12"))


def _callback(recorder):
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Digest the gradients that the optimizer is about to use, and freeze the policy when asked to."""

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradients = [p.grad for p in recorder.model.parameters() if p.grad is not None]
            local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
            recorder.gradients = float(sum(g.double().pow(2).sum() for g in local)) if local else None
            if os.environ.get("SLF_FREEZE"):
                for group in kwargs["optimizer"].param_groups:
                    group["lr"] = 0.0

    return Watch()


class Recorder:
    def __init__(self, trainer):
        import torch

        self.torch = torch
        self.gradients = None
        trainer.add_callback(_callback(self))
        self.model = trainer.accelerator.unwrap_model(trainer.model)
        self.start = {n: self._local(p).clone() for n, p in self.model.named_parameters()}
        self.lora_changed = 0
        self.dtypes = set()
        self.objects = {n: id(p) for n, p in self.model.named_parameters()}
        self.new_objects = 0
        self.merge_calls = 0
        self._count_merges()

    @staticmethod
    def _local(parameter):
        data = parameter.detach()
        return data.to_local() if hasattr(data, "to_local") else data

    def _count_merges(self):
        from peft.tuners.tuners_utils import BaseTuner

        recorder = self

        @wrapt.patch_function_wrapper(BaseTuner, "merge_adapter")
        def count(wrapped, instance, args, kwargs):
            recorder.merge_calls += 1
            return wrapped(*args, **kwargs)

    def lora(self):
        return {n: self._local(p).clone() for n, p in self.model.named_parameters() if "lora_" in n}

    def around_sync(self, before):
        for name, tensor in self.lora().items():
            old = before[name]
            self.dtypes.add(str(tensor.dtype))
            if old.dtype != tensor.dtype or old.shape != tensor.shape:
                self.lora_changed += tensor.numel()
            else:
                self.lora_changed += int((old != tensor).sum())
        self.new_objects += sum(
            self.objects.get(name) != id(parameter) for name, parameter in self.model.named_parameters()
        )

    def base_changed(self):
        changed = total = 0
        for name, parameter in self.model.named_parameters():
            if "lora_" not in name:
                now = self._local(parameter)
                changed += int((now != self.start[name]).sum()) if now.shape == self.start[name].shape else 0
                total += now.numel()
        return changed / max(total, 1)

    def logprobs(self, prompt, completion):
        ids = self.torch.tensor([prompt + completion], device=next(self.model.parameters()).device)
        logits = self.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        chosen = self.torch.tensor(completion, device=logits.device)[:, None]
        return logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()

    def trainer_logprobs(self, pairs):
        training = self.model.training
        self.model.eval()
        try:
            with self.torch.no_grad():
                with_lora = [self.logprobs(*pair) for pair in pairs]
                with self.model.disable_adapter():
                    without = [self.logprobs(*pair) for pair in pairs]
        finally:
            self.model.train(training)
        return with_lora, without

    def shared_storage(self, trainer):
        engine = {p.untyped_storage().data_ptr() for p in trainer.engine.inner_model.state_dict().values()}
        for module in trainer.engine.inner_model.modules():
            for name in ("lora_a_stacked", "lora_b_stacked"):
                for tensor in getattr(module, name, ()):
                    engine.add(tensor.untyped_storage().data_ptr())
        engine.discard(0)
        return sum(self._local(p).untyped_storage().data_ptr() in engine for p in self.model.parameters())


def _probe(wrapped, trainer, infer_requests, request_config, kwargs):
    recorder = trainer._slf_recorder
    requests = []
    for index, prompt in enumerate(PROMPTS):
        request = copy.deepcopy(infer_requests[0])
        fields = request if isinstance(request, dict) else vars(request)
        fields["messages"] = [{"role": "user", "content": prompt}]
        for name in ("uuid", "request_id"):
            if name in fields:
                fields[name] = f"slf-probe-{trainer.state.global_step}-{index}"
        requests.append(request)
    config = copy.copy(request_config)
    config.temperature, config.max_tokens, config.logprobs, config.n = 0.0, NEW_TOKENS, True, 1
    config.top_k, config.top_p, config.repetition_penalty = -1, 1.0, 1.0
    config.return_details, config.stop = True, []
    outputs = wrapped(requests, config, **kwargs)
    choices = [output.response.choices[0] for output in outputs]
    prompts = [output.response.prompt_token_ids for output in outputs]
    tokens = [list(choice.token_ids) for choice in choices]
    engine = [[item["logprob"] for item in choice.logprobs["content"]] for choice in choices]
    with_lora, without = recorder.trainer_logprobs([(list(p), t) for p, t in zip(prompts, tokens)])
    gaps = [abs(a - b) for e, t in zip(engine, with_lora) for a, b in zip(e, t)]
    effect = [abs(a - b) for x, y in zip(with_lora, without) for a, b in zip(x, y)]
    record = {
        "step": trainer.state.global_step,
        "mean": sum(gaps) / len(gaps),
        "max": max(gaps),
        "lora_effect": sum(effect) / len(effect),
        "lora_effect_max": max(effect),
        "base_changed": recorder.base_changed(),
        "lora_changed_by_sync": recorder.lora_changed,
        "lora_dtypes": sorted(recorder.dtypes),
        "new_parameter_objects": recorder.new_objects,
        "merge_calls": recorder.merge_calls,
        "shared_storage": recorder.shared_storage(trainer),
        "gradients": recorder.gradients,
        "lora_sum": float(sum(t.double().sum() for t in recorder.lora().values())),
        "lora_norm": float(sum((t.float() ** 2).sum() for t in recorder.lora().values()) ** 0.5),
        "tokens": tokens,
    }
    rank = trainer.accelerator.process_index
    with open(os.environ["SLF_PROBE_FILE"] + (f".rank{rank}" if rank else ""), "a") as file:
        file.write(json.dumps(record) + "\n")


def _install(module):
    mixin = module.RolloutTrainerMixin

    @wrapt.patch_function_wrapper(mixin, "_move_model_to_vllm")
    def sync(wrapped, trainer, args, kwargs):
        if not hasattr(trainer, "_slf_recorder"):
            trainer._slf_recorder = Recorder(trainer)
        before = trainer._slf_recorder.lora()
        result = wrapped(*args, **kwargs)
        trainer._slf_recorder.around_sync(before)
        return result

    @wrapt.patch_function_wrapper(mixin, "_engine_infer")
    def infer(wrapped, trainer, args, kwargs):
        step = trainer.state.global_step
        if step == int(os.environ.get("SLF_KILL_AT_STEP", "-1")):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == int(os.environ.get("SLF_DROP_ADAPTER_AT_STEP", "-1")):
            for adapter in list(trainer.engine.engine.list_loras()):
                trainer.engine.engine.remove_lora(adapter)
        kwargs = dict(kwargs)
        requests = args[0] if args else kwargs.pop("infer_requests")
        config = args[1] if len(args) > 1 else kwargs.pop("request_config")
        _probe(wrapped, trainer, requests, config, kwargs)
        return wrapped(requests, config, **kwargs)


for _name in MODULES:
    wrapt.register_post_import_hook(_install, _name)
