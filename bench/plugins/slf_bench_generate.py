"""Times generation inside a real run: output tokens a second of the run's own vLLM engine, by what it serves.

In step ``$SLF_BENCH_STEP``, after the sync, the engine generates in turn with the adapter in vLLM's LoRA kernels
(``adapter``, not where the engine has no LoRA layers), with the adapter folded into its weights (``fused``), and with
the plain weights (``base``); then the run is ended. One JSON object goes to ``$SLF_BENCH_FILE``. Every request has
``$SLF_BENCH_PROMPT`` random prompt tokens and gets ``$SLF_BENCH_TOKENS`` new ones; there are ``$SLF_BENCH_ROUNDS``
rounds for each of the batch sizes ``$SLF_BENCH_BATCHES``, after one that warms up.

The requests go to vLLM's ``LLMEngine`` itself, without detokenization, so that nothing but the model's time is in it
that the three would share.
"""

import contextlib
import functools
import itertools
import json
import os
import time

from slf_bench_step import measure_with


class _Bench:
    def __init__(self, trainer):
        from vllm.lora.request import LoRARequest

        from swift_lora_fix.engine.vllm import handle
        from swift_lora_fix.engine.vllm.weights import base
        from swift_lora_fix.engine.vllm.weights.fused import FusedWriter
        from swift_lora_fix.frameworks.swift.port import SwiftTrainer
        from swift_lora_fix.policy import adapter, merging

        model = trainer.accelerator.unwrap_model(trainer.model)
        bound, modules = adapter.bind(model, apart=False), merging.bind(model, adapter.DEFAULT_ADAPTER)
        self.trainer, self.handle, self.ids = trainer, handle.EngineHandle(trainer.engine.engine), itertools.count()
        port = SwiftTrainer(trainer)
        reload = functools.partial(base.reload, port, self.handle, bound)
        self.writer = FusedWriter(self.handle, bound, modules, port.device, reload)
        self.writer.accept_base(base.push(port, self.handle, bound, self.writer.changing))
        self.report = self.writer.write()
        self.writer.finish()
        self.lora = LoRARequest(handle.ADAPTER_NAME, handle.ADAPTER_ID, handle.ADAPTER_PATH)  # as ms-swift makes it
        self.ways = ("adapter", "fused", "base") if self.handle.lora_config else ("fused", "base")
        self.prompt_tokens, self.new_tokens = (int(os.environ[f"SLF_BENCH_{name}"]) for name in ("PROMPT", "TOKENS"))

    @contextlib.contextmanager
    def serving(self, way):
        """The engine with the weights and ms-swift's engine with the switch of ``way``; the caches are empty."""
        self.trainer.engine.enable_lora = way == "adapter"
        with contextlib.nullcontext() if way == "fused" else self.writer.plain_base():
            self.handle.reset_caches()
            yield

    def generate(self, prompts, **sampling):
        """The finished outputs of vLLM, in no order."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, outputs = self.handle.llm_engine, []
        params = SamplingParams(detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **sampling)
        lora = self.lora if self.trainer.engine.enable_lora else None
        for prompt in prompts:
            engine.add_request(f"slf-{next(self.ids)}", {"prompt_token_ids": prompt}, params, lora_request=lora)
        while engine.has_unfinished_requests():
            outputs += [output for output in engine.step() if output.finished]
        return outputs

    def prompts(self, batch, seed):
        """Random token ids that every tokenizer here has, none of them special: ``batch`` lists."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        return torch.randint(10, 500, (batch, self.prompt_tokens), generator=generator).tolist()

    def rate(self, way, batch, seed):
        """Output tokens a second, prefill included."""
        import torch

        prompts = self.prompts(batch, seed)
        with self.serving(way):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = time.perf_counter()
            outputs = self.generate(prompts, temperature=1.0, max_tokens=self.new_tokens, ignore_eos=True)
            seconds = time.perf_counter() - started
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        assert tokens == batch * self.new_tokens, (tokens, batch, self.new_tokens)
        return tokens / seconds

    def logprobs(self, way):
        """Of the tokens of one prompt but the first, as the engine sees them: what it serves, to be compared."""
        (prompt,) = self.prompts(1, seed=0)
        with self.serving(way):
            (output,) = self.generate([prompt], temperature=0.0, max_tokens=1, prompt_logprobs=0)
        return [found[token].logprob for found, token in zip(output.prompt_logprobs[1:], prompt[1:])]

    def gaps(self):
        """By pair of ways the mean |difference| of these, in nats a token."""
        seen = {way: self.logprobs(way) for way in self.ways}
        return {
            f"{one}/{other}": sum(abs(a - b) for a, b in zip(seen[one], seen[other])) / len(seen[one])
            for one, other in itertools.combinations(self.ways, 2)
        }

    def rates(self, batches, rounds):
        """By way and batch size, one number a round; in each round another way begins."""
        found = {way: {batch: [] for batch in batches} for way in self.ways}
        for batch in batches:
            for number in range(rounds + 1):
                first = number % len(self.ways)
                for way in self.ways[first:] + self.ways[:first]:
                    rate = self.rate(way, batch, seed=number)
                    if number:  # else it warmed up
                        found[way][batch].append(rate)
        return found


def _policy_that_shows(trainer):
    """After two steps the adapter is too small to tell from rounding, and no way could be told from another."""
    import torch

    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)


def _bench(wrapped, trainer):
    import torch

    import swift_lora_fix

    _policy_that_shows(trainer)
    wrapped(skip_async_check=True)
    bench = _Bench(trainer)
    config = bench.handle.llm_engine.vllm_config
    record = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "ms_swift": swift_lora_fix.status().ms_swift,
        "vllm": swift_lora_fix.status().vllm,
        "mode": swift_lora_fix.status().run["mode"],
        "enforce_eager": config.model_config.enforce_eager,
        "specialize_lora": getattr(config.compilation_config, "cudagraph_specialize_lora", None),
        "path": bench.report.path,
        "gaps": bench.gaps(),
        "tokens_per_second": bench.rates(
            [int(batch) for batch in os.environ["SLF_BENCH_BATCHES"].split()], int(os.environ["SLF_BENCH_ROUNDS"])
        ),
    }
    with open(os.environ["SLF_BENCH_FILE"], "w") as file:
        json.dump(record, file)


measure_with(_bench)
