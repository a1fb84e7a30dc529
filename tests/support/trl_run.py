"""A user's TRL script, as a process of its own: a real trainer with a real colocated vLLM engine.

    python -m tests.support.trl_run FOLDER '{"model": ..., "fixed": true, ...}'

Keys: ``model``; ``fixed`` (import swift_lora_fix and apply()); ``trainer`` (of ``TRAINERS``); ``adapter`` (a folder
that PEFT loads); ``resume`` (a checkpoint); ``arguments`` (for the config); ``lora`` (for LoraConfig); ``kill`` (the
step whose rollout ends the process); ``faults`` (one a step from step 1 on, of plugins/slf_faults.py, or
``plain_base``: the engine gets the trainer's base without the LoRA; ``unload``: the server forgets the policy);
``example`` (a script of examples/, whose trainer it is); ``server`` (url of a ``vllm serve``, in place of a colocated
engine); ``bench`` (a file whose ``begin`` gets the trainer, in place of the probe); ``images`` (the model is
``make_vision_model``'s, and the data set has images); ``rollout`` (a ``rollout_func`` that asks the engine itself, in
turn by ``chat`` and by ``generate``); ``dtype`` (of the trainer's model).

At each rollout one line goes to FOLDER/probe.jsonl: ``mean``, ``max`` (|logprob engine - trainer|, nats, over greedy
continuations of fixed prompts), ``effect`` (of the LoRA on the trainer's own logprobs), ``base_changed`` (entries of
the trainer's frozen base that differ from the start), ``lora_changed`` (LoRA entries that syncs changed),
``lora_dtypes``, ``merges`` (calls of ``merge_adapter``), ``seconds`` (of the sync), ``lora_sum``, ``tokens``; of a
server ``asked`` (the names that this rollout's requests asked for) and ``held`` (those that the server knows); with
images ``image_mean``, ``image_max``, ``image_effect`` (the same of questions about an image), ``image_other`` (how far
off another image would be), ``images`` (prompts of this rollout that have one) and ``longer`` (tokens by which vLLM's
prompts are longer than TRL's). It is measured from outside, and knows nothing of swift_lora_fix.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import runpy
import signal
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "plugins"))
import slf_cpu_shims  # noqa: E402, F401
import slf_grow  # noqa: E402, F401
import slf_sharded_shims  # noqa: E402, F401

if not os.path.exists("/dev/nvidiactl"):
    import slf_sleep_shims  # noqa: F401

NEW_TOKENS = 12
TRAINERS = {"GRPO": "trl", "RLOO": "trl", "Distillation": "trl"} | {
    name: f"trl.experimental.{name.lower()}" for name in ("SDFT", "SDPO", "GOLD")
}


def rewards(completions: list[Any], **kwargs: Any) -> list[float]:
    """Each completion's place in an order that the texts decide: never a tie, and no state."""
    marks = [(zlib.crc32(f"{os.environ.get('RANK', '0')} {text}".encode()), i) for i, text in enumerate(completions)]
    return [sorted(marks).index(mark) / len(marks) for mark in marks]


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """A user's, which names no adapter."""
    from vllm import SamplingParams

    llm, how = trainer.vllm_generation.llm, SamplingParams(temperature=1.0, max_tokens=16, logprobs=0)
    if trainer.state.global_step % 2:
        outputs = llm.generate(prompts, how, use_tqdm=False, lora_request=None)
    else:
        outputs = llm.chat([[{"role": "user", "content": text}] for text in prompts], how, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    return {
        "prompt_ids": [output.prompt_token_ids for output in outputs],
        "completion_ids": [list(answer.token_ids) for answer in answers],
        "logprobs": [[at[token].logprob for at, token in zip(a.logprobs, a.token_ids)] for a in answers],
    }


def whole(parameter: Any) -> Any:
    """What all ranks together hold, under FSDP2."""
    value = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


class Probe:
    """Wraps ``sync_weights`` and ``generate`` of one trainer's ``VLLMGeneration``, from outside."""

    def __init__(self, trainer: Any, file: Path, options: dict[str, Any]) -> None:
        from peft.tuners.tuners_utils import BaseTuner

        self.trainer, self.file, self.options = trainer, file, options
        self.generation = trainer.vllm_generation
        self.start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
        self.client = self.generation.vllm_client if "server" in options else None
        self.lora_changed = self.merges = 0
        self.of_rollout: dict[str, int] = {}
        self.seconds = 0.0
        self.dtypes: set[str] = set()
        sync, generate, merge = self.generation.sync_weights, self.generation.generate, BaseTuner.merge_adapter

        def counted(tuner: Any, *args: Any, **kwargs: Any) -> Any:
            self.merges += 1
            return merge(tuner, *args, **kwargs)

        def synchronize() -> None:
            # an engine that sleeps has lost them, and on a GPU nobody may look
            before, slots = self.lora(), self.slots() if "faults" in self.options and not self.client else []
            started = time.perf_counter()
            sync()
            self.seconds = time.perf_counter() - started
            after = self.lora()
            self.dtypes |= {str(value.dtype) for value in after.values()}
            self.lora_changed += sum(int((before[name] != value).sum()) for name, value in after.items())
            self.break_something(slots)

        def rollout(*args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step == options.get("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            return generate(*args, **kwargs)

        def answered(prompts: Any, *args: Any, **kwargs: Any) -> Any:
            """The engine may sleep as soon as TRL has its answers."""
            outputs = self.ask(prompts, *args, **kwargs)
            completions = [list(output.outputs[0].token_ids) for output in outputs]
            if "images" in options:
                if trainer._image_pad_token_id in sum(completions, []):
                    return answered(prompts, *args, **kwargs)  # one token in 500, and TRL cannot score it
                self.of_rollout = {
                    "images": sum("multi_modal_data" in prompt for prompt in prompts),
                    "longer": sum(len(output.prompt_token_ids) for output in outputs)
                    - sum(len(prompt["prompt_token_ids"]) for prompt in prompts),
                }
            self.record(completions)
            return outputs

        BaseTuner.merge_adapter = counted
        self.asked: list[str] = []
        if self.client:
            self.watch_server()
        else:
            self.ask = self.generation.llm.generate
            self.generation.llm.generate = answered
        self.generation.sync_weights, self.generation.generate = synchronize, rollout

    def watch_server(self) -> None:
        """Notes which names requests ask for, and asks for the newest by itself."""
        client, post = self.client, self.client._post

        def noted(url: str, **kwargs: Any) -> Any:
            if url.endswith("/v1/completions"):
                self.asked.append(kwargs["json"]["model"])
            return post(url, **kwargs)

        def answered(*args: Any, **kwargs: Any) -> Any:
            outputs = generate(*args, **kwargs)
            self.record(outputs["completion_ids"])
            return outputs

        generate = client.generate
        client._post, client.generate = noted, answered

    def answers(self, ids: list[list[int]]) -> list[tuple[list[int], list[float]]]:
        """Greedy answers of the engine to these prompts, and their logprobs."""
        if self.client:
            name = self.held()[-1]
            request = dict(model=name, prompt=ids, temperature=0, max_tokens=NEW_TOKENS, logprobs=0)
            request |= dict(return_token_ids=True, return_tokens_as_token_ids=True)
            choices = self.client.session.post(f"{self.client.base_url}/v1/completions", json=request).json()["choices"]
            return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]
        return self.answers_of_llm([{"prompt_token_ids": i} for i in ids])

    def answers_of_llm(self, requests: list[dict[str, Any]]) -> list[tuple[list[int], list[float]]]:
        from vllm import SamplingParams

        how = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=0)
        found = []
        for output in self.ask(requests, how, use_tqdm=False):
            answer = list(output.outputs[0].token_ids)
            found.append((answer, [at[token].logprob for at, token in zip(output.outputs[0].logprobs, answer)]))
        return found

    def held(self) -> list[str]:
        models = self.client.session.get(f"{self.client.base_url}/v1/models").json()["data"]
        return [model["id"] for model in models]

    def lora(self) -> dict[str, Any]:
        return {n: whole(p).clone() for n, p in self.trainer.model.named_parameters() if p.requires_grad}

    def record(self, completions: list[list[int]]) -> None:
        processing = self.trainer.processing_class
        tokenizer = getattr(processing, "tokenizer", processing)
        ids = [tokenizer(text)["input_ids"] for text in ("Count to three.", "Which animal barks?", "Is water wet?")]
        gaps, effects, tokens = [], [], []
        for prompt, (answer, engine) in zip(ids, self.answers(ids)):
            held, plain = self.score(prompt, answer)
            gaps += [abs(a - b) for a, b in zip(engine, held)]
            effects += [abs(a - b) for a, b in zip(held, plain)]
            tokens.append(answer)
        parameters = dict(self.trainer.model.named_parameters())
        self.write(
            step=self.trainer.state.global_step,
            mean=sum(gaps) / len(gaps),
            max=max(gaps),
            effect=sum(effects) / len(effects),
            base_changed=sum(int((value != whole(parameters[name])).sum()) for name, value in self.start.items()),
            lora_changed=self.lora_changed,
            lora_dtypes=sorted(self.dtypes),
            lora_sum=float(sum(value.double().sum() for value in self.lora().values())),
            merges=self.merges,
            seconds=self.seconds,
            tokens=tokens,
            completions=completions,
            **({"asked": self.asked, "held": self.held()} if self.client else {}),
            **(self.of_images() if "images" in self.options else {}),
        )
        self.asked = []

    def of_images(self) -> dict[str, float]:
        from . import trl_images

        first, second = trl_images.pictures(Path(self.options["model"]))
        gaps, effects, others = [], [], []
        for text, picture, other in zip(trl_images.QUESTIONS, (first, second), (second, first)):
            asked = trl_images.Asked(self.trainer.processing_class, text, picture, other)
            ((answer, engine),) = self.answers_of_llm([asked.request])
            answer = list(itertools.takewhile(self.trainer._image_pad_token_id.__ne__, answer))  # see ``answered``
            held, plain = self.score(asked.ids, answer, asked.inputs)
            blind, _ = self.score(asked.ids, answer, asked.inputs_of_other)
            gaps += [abs(a - b) for a, b in zip(engine, held)]
            effects += [abs(a - b) for a, b in zip(held, plain)]
            others += [abs(a - b) for a, b in zip(held, blind)]
        of = {"image_mean": gaps, "image_effect": effects, "image_other": others}
        means = {name: sum(found) / len(found) for name, found in of.items()}
        return {"image_max": max(gaps), **means, **self.of_rollout}

    def score(
        self, prompt: list[int], answer: list[int], seen: dict[str, Any] | None = None
    ) -> tuple[list[float], list[float]]:
        """With the policy, and without the LoRA. seen: the processor's encoding of a prompt about an image."""
        import torch

        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        training = model.training
        model.eval()
        ids = torch.tensor([prompt + answer], device=model.device)
        chosen = torch.tensor(answer, device=model.device)[:, None]
        more = {name: value for name, value in (seen or {}).items() if name not in ("input_ids", "attention_mask")}
        if "mm_token_type_ids" in more:
            more["mm_token_type_ids"] = torch.nn.functional.pad(more["mm_token_type_ids"], (0, len(answer)))
        more = {name: value.to(model.device) for name, value in more.items()}

        def logprobs() -> list[float]:
            logits = model(input_ids=ids, **more).logits[0, len(prompt) - 1 : -1].float()
            return logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()

        with torch.no_grad():
            held = logprobs()
            with model.disable_adapter():
                plain = logprobs()
        model.train(training)
        return held, plain

    @property
    def engine(self) -> Any:
        return self.generation.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model

    def slots(self) -> list[Any]:
        modules = list(self.engine.modules())
        sides = [getattr(m, f"lora_{side}_stacked", ()) for side in "ab" for m in modules]
        return [buffer.clone() for buffers in sides for buffer in buffers]

    def break_something(self, slots: list[Any]) -> None:
        faults, step = self.options.get("faults", []), self.trainer.state.global_step
        if not 1 <= step <= len(faults):
            return
        if faults[step - 1] == "unload":
            for name in self.held()[1:]:
                self.client.session.post(f"{self.client.base_url}/v1/unload_lora_adapter", json={"lora_name": name})
            return
        if faults[step - 1] == "plain_base":
            self.engine.load_weights(list(self.plain_base()))
            return
        import slf_faults

        engine = SimpleNamespace(inner_model=self.engine, engine=self.generation.llm.llm_engine)
        accelerator, model = self.trainer.accelerator, self.trainer.model
        seen = SimpleNamespace(engine=engine, accelerator=accelerator, model=model, _slf_previous=slots)
        seen.session_key = self.generation
        getattr(slf_faults, faults[step - 1])(seen)

    def plain_base(self) -> Any:
        for name, parameter in self.trainer.model.named_parameters():
            if "lora_" not in name:
                yield name.removeprefix("base_model.model.").replace(".base_layer", ""), parameter.data

    def write(self, **fields: Any) -> None:
        with open(self.file, "a") as file:
            file.write(json.dumps(fields) + "\n")


def build(folder: Path, options: dict[str, Any]) -> Any:
    if options.get("fixed"):
        import swift_lora_fix

        swift_lora_fix.apply()
    import torch
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from tests.support import trl_images
    from tests.support.tiny import PROMPTS

    kind = options.get("trainer", "GRPO")
    defaults: dict[str, Any] = dict(
        output_dir=str(folder / "run"),
        use_vllm=True,
        vllm_mode="colocate",
        use_cpu=True,
        bf16=True,
        vllm_max_model_length=256,
        max_completion_length=16,
        num_generations=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        max_steps=4,
        save_steps=2,
        learning_rate=0.002,
        lr_scheduler_type="constant",
        max_grad_norm=100,
        beta=0.0,
        logging_steps=1,
        report_to="none",
        seed=7,
    )
    if "server" in options:
        defaults.update(vllm_mode="server", vllm_server_base_url=options["server"])
    if "example" in options:
        return of_example(folder, options, {**defaults, **options.get("arguments", {})})
    module = importlib.import_module(TRAINERS[kind])
    config_class = getattr(module, f"{kind}Config")
    known = {field.name for field in dataclasses.fields(config_class)}
    defaults = {name: value for name, value in defaults.items() if name in known}
    config = config_class(**{**defaults, **options.get("arguments", {})})
    auto = AutoModelForImageTextToText if "images" in options else AutoModelForCausalLM
    model = auto.from_pretrained(options["model"], dtype=getattr(torch, options.get("dtype", "bfloat16")))
    lora = None
    if "adapter" in options:
        model = PeftModel.from_pretrained(model, options["adapter"], is_trainable=True)
    else:
        wanted = dict(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        lora = LoraConfig(**{**wanted, **options.get("lora", {})})
    own = dict(reward_funcs=rewards) if kind in ("GRPO", "RLOO", "SDPO") else {}
    if kind in ("Distillation", "GOLD"):
        own = dict(teacher_model=options["model"])
    if "rollout" in options:
        own["rollout_func"] = rollout
    rows = {"prompt": PROMPTS, **({"privileged_context": PROMPTS} if kind in ("SDFT", "SDPO") else {})}
    if kind == "GOLD":  # it wants answers, too, though with lmbda 1 it learns from its own
        rows = {"prompt": PROMPTS, "completion": PROMPTS}
    return getattr(module, f"{kind}Trainer")(
        model=model,
        args=config,
        train_dataset=trl_images.dataset(Path(options["model"])) if "images" in options else Dataset.from_dict(rows),
        peft_config=lora,
        **own,
    )


def of_example(folder: Path, options: dict[str, Any], arguments: dict[str, Any]) -> Any:
    """The trainer of a script in ``examples/``, by the command line that a user gives it."""
    from tests.support.tiny import PROMPTS

    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    arguments |= {"model_name_or_path": options["model"], "dataset": prompts, "lora_r": 8, "lora_alpha": 16}
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    return runpy.run_path(options["example"])["make_trainer"](words)


def main(folder: Path, options: dict[str, Any]) -> None:
    trainer = build(folder, options)
    rank = trainer.accelerator.process_index
    if "bench" in options:
        sys.path.insert(0, str(Path(options["bench"]).parent))
        runpy.run_path(options["bench"])["begin"](trainer)
    else:
        Probe(trainer, folder / f"probe.jsonl{f'.rank{rank}' if rank else ''}", options)
    trainer.train(resume_from_checkpoint=options.get("resume"))
    if rank:
        return
    with open(folder / "metrics.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in trainer.state.log_history)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
