"""Records, at every rollout of a real run, what the engine serves against what the trainer holds.

One JSON line a rollout goes to ``$SLF_PROBE_FILE`` (``.rankN`` appended for ranks above 0). Fields: ``step``;
``tokens`` (greedy continuations of fixed prompts), ``margins`` (by how much, in nats, the trainer prefers its first
choice over its second at each of them); ``mean``, ``max`` (|logprob engine - trainer| on those tokens);
``lora_effect`` (mean |logprob trainer with LoRA - without|); ``base_changed`` (share of the trainer's base entries that
differ from the start of the run); ``lora_changed_by_sync`` (LoRA entries that the syncs so far changed);
``lora_dtypes``; ``merge_calls``; ``shared_storage`` (trainer storages found in the engine); ``slots`` (digest of the
engine's LoRA slots); ``loader_calls`` (how often vLLM was told to load an adapter); ``gathered`` (elements that the
last sync gathered whole, under ZeRO-3 and FSDP2), ``lora_elements``, ``lora_persistent`` (those of them that ZeRO-3
never parts), ``model_elements``, ``policies`` (digest of the policy that each rollout says made it). Under sharding,
what is compared is what this rank holds. With rollout servers nobody sees their engines from here.
It measures from outside and knows nothing of swift_lora_fix. Load it after the plugin under test, so that its wrappers
are the outer ones.

More environment variables: ``SLF_FREEZE=1`` keeps the learning rate at 0 whatever the checkpoint says;
``SLF_KILL_AT_STEP=N`` kills the process as it begins the rollout of step N. Just before that rollout,
``SLF_DROP_ADAPTER_AT_STEP=N`` removes every adapter from the engine, ``SLF_PLAIN_BASE_AT_STEP=N`` loads the trainer's
plain base into it (fused mode), ``SLF_SET_AT_STEP=N:NAME=VALUE`` sets an environment variable, and
``SLF_RUN_AT_STEP=N:COMMAND`` runs a command. ``gradients`` digests the LoRA gradients of the last step.
"""

import copy
import faulthandler
import hashlib
import json
import os
import signal
import subprocess
import sys

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
        self.parameters = dict(self.model.named_parameters())
        self.start = {n: self._local(p).clone() for n, p in self.parameters.items()}
        self.frozen = {n for n, p in self.parameters.items() if not p.requires_grad}
        self.lora_changed = 0
        self.dtypes = set()
        self.objects = {n: id(p) for n, p in self.parameters.items()}
        self.new_objects = 0
        self.merge_calls = self.loader_calls = self.gathered = 0
        self._count_merges()
        if trainer.vllm_mode == "colocate":
            self._count_loader_calls(trainer.engine.engine)
        self._count_gathers()

    @staticmethod
    def _local(parameter):
        data = getattr(parameter, "ds_tensor", parameter).detach()
        return data.to_local() if hasattr(data, "to_local") else data

    def held(self):
        """What this rank holds, by name. After a forward FSDP2 shows whole parameters; the start's are its shards."""
        fsdp2 = any(hasattr(parameter, "to_local") for parameter in self.parameters.values())
        return self.parameters if fsdp2 else dict(self.model.named_parameters())

    def elements(self, part=""):
        return sum(getattr(p, "ds_numel", p.numel()) for n, p in self.parameters.items() if part in n)

    def persistent(self):
        """LoRA elements in parameters so small that ZeRO-3 keeps them whole on every rank."""
        named = self.parameters.items()
        return sum(p.ds_numel for n, p in named if "lora_" in n and getattr(p, "ds_persist", False))

    def _count_merges(self):
        from peft.tuners.tuners_utils import BaseTuner

        recorder = self

        @wrapt.patch_function_wrapper(BaseTuner, "merge_adapter")
        def count(wrapped, instance, args, kwargs):
            recorder.merge_calls += 1
            return wrapped(*args, **kwargs)

    def _count_loader_calls(self, engine):
        recorder = self

        @wrapt.patch_function_wrapper(type(engine), "add_lora")
        def count(wrapped, instance, args, kwargs):
            recorder.loader_calls += 1
            return wrapped(*args, **kwargs)

    def _count_gathers(self):
        recorder = self
        if "deepspeed" in sys.modules:
            import deepspeed

            @wrapt.patch_function_wrapper(deepspeed.zero.GatheredParameters, "__enter__")
            def zero3(wrapped, context, args, kwargs):
                recorder.gathered += sum(parameter.ds_numel for parameter in getattr(context, "params", ()))
                return wrapped(*args, **kwargs)

        if "torch.distributed.tensor" in sys.modules:

            @wrapt.patch_function_wrapper(sys.modules["torch.distributed.tensor"].DTensor, "full_tensor")
            def fsdp2(wrapped, tensor, args, kwargs):
                recorder.gathered += tensor.numel()
                return wrapped(*args, **kwargs)

    def lora(self):
        return {n: self._local(p).clone() for n, p in self.held().items() if "lora_" in n or n not in self.frozen}

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
        for name, parameter in self.held().items():
            if name in self.frozen:
                now = self._local(parameter)
                changed += int((now != self.start[name]).sum()) if now.shape == self.start[name].shape else 0
                total += now.numel()
        return changed / max(total, 1)

    def logprobs(self, prompt, completion):
        ids = self.torch.tensor([prompt + completion], device=next(self.model.parameters()).device)
        logits = self.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        chosen = self.torch.tensor(completion, device=logits.device)[:, None]
        first, second = logits.topk(2, dim=-1).values.unbind(-1)
        self.margins.append((first - second).tolist())
        return logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()

    def trainer_logprobs(self, pairs):
        training = self.model.training
        self.model.eval()
        try:
            with self.torch.no_grad():
                self.margins = []
                with_lora = [self.logprobs(*pair) for pair in pairs]
                with self.model.disable_adapter():
                    without = [self.logprobs(*pair) for pair in pairs]
        finally:
            self.model.train(training)
        return with_lora, without

    @staticmethod
    def slots(trainer):
        if trainer.vllm_mode != "colocate":
            return
        for module in trainer.engine.inner_model.modules():
            for name in ("lora_a_stacked", "lora_b_stacked"):
                yield from getattr(module, name, ())

    def slots_digest(self, trainer):
        digest = hashlib.sha256()
        for tensor in self.slots(trainer):
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def shared_storage(self, trainer):
        if trainer.vllm_mode != "colocate":
            return 0
        engine = {p.untyped_storage().data_ptr() for p in trainer.engine.inner_model.state_dict().values()}
        engine |= {tensor.untyped_storage().data_ptr() for tensor in self.slots(trainer)}
        engine.discard(0)
        return sum(self._local(p).untyped_storage().data_ptr() in engine for p in self.held().values())


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
        "slots": recorder.slots_digest(trainer),
        "loader_calls": recorder.loader_calls,
        "gathered": recorder.gathered_by_sync,
        "lora_elements": recorder.elements("lora_"),
        "lora_persistent": recorder.persistent(),
        "model_elements": recorder.elements(),
        "gradients": recorder.gradients,
        "lora_sum": float(sum(t.double().sum() for t in recorder.lora().values())),
        "lora_norm": float(sum((t.float() ** 2).sum() for t in recorder.lora().values()) ** 0.5),
        "policies": [getattr(output, "rollout_infos", {}).get("policy_digest") for output in outputs],
        "tokens": tokens,
        "margins": recorder.margins[: len(tokens)],
    }
    rank = trainer.accelerator.process_index
    with open(os.environ["SLF_PROBE_FILE"] + (f".rank{rank}" if rank else ""), "a") as file:
        file.write(json.dumps(record) + "\n")


def _plain_base(model):
    for name, parameter in model.named_parameters():
        if "lora_" not in name and "modules_to_save" not in name:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
            yield name, parameter.data


def _install(module):
    mixin = module.RolloutTrainerMixin

    @wrapt.patch_function_wrapper(mixin, "_move_model_to_vllm")
    def sync(wrapped, trainer, args, kwargs):
        if not hasattr(trainer, "_slf_recorder"):
            trainer._slf_recorder = Recorder(trainer)
        recorder = trainer._slf_recorder
        before = recorder.lora()
        recorder.gathered = 0
        result = wrapped(*args, **kwargs)
        recorder.gathered_by_sync = recorder.gathered
        recorder.around_sync(before)
        return result

    @wrapt.patch_function_wrapper(mixin, "_engine_infer")
    def infer(wrapped, trainer, args, kwargs):
        step = trainer.state.global_step
        if step == int(os.environ.get("SLF_KILL_AT_STEP", "-1")):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == int(os.environ.get("SLF_DROP_ADAPTER_AT_STEP", "-1")):
            for adapter in list(trainer.engine.engine.list_loras()):
                trainer.engine.engine.remove_lora(adapter)
        if step == int(os.environ.get("SLF_PLAIN_BASE_AT_STEP", "-1")):
            trainer.engine.inner_model.load_weights(_plain_base(trainer._slf_recorder.model))
        when, _, what = os.environ.get("SLF_SET_AT_STEP", "").partition(":")
        if when == str(step):
            os.environ.update([what.split("=", 1)])
        when, _, command = os.environ.get("SLF_RUN_AT_STEP", "").partition(":")
        if when == str(step):
            subprocess.run(command, shell=True, check=True)
        kwargs = dict(kwargs)
        requests = args[0] if args else kwargs.pop("infer_requests")
        config = args[1] if len(args) > 1 else kwargs.pop("request_config")
        if requests:  # a multi-turn loop asks once more, for nobody
            _probe(wrapped, trainer, requests, config, kwargs)
        return wrapped(requests, config, **kwargs)


if os.environ.get("SLF_DUMP_AFTER"):  # where a run that hangs stands
    faulthandler.dump_traceback_later(float(os.environ["SLF_DUMP_AFTER"]))
for _name in MODULES:
    wrapt.register_post_import_hook(_install, _name)
