"""The same proof behind the port of each framework: what the gate asks, how the trainer scores it, what it finds.

The trainer has a real language model with a LoRA. The engine is a copy of it, with a policy of its own, and is asked
as the framework asks vLLM.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from swift_lora_fix.engine.vllm.colocated import AdapterServing
from swift_lora_fix.frameworks.swift.port import SwiftTrainer
from swift_lora_fix.frameworks.swift.rollouts import SwiftRollout
from swift_lora_fix.frameworks.trl import port as trl
from swift_lora_fix.frameworks.trl.rollouts import TrlRollout
from swift_lora_fix.policy import adapter as adapters
from swift_lora_fix.proof.gate import Gate, Judgement
from swift_lora_fix.proof.probe import SHORT
from tests.support.fakes.engine import Accelerator

VOCABULARY, LONGEST, BLOCK = 96, 160, 16


class Tokenizer:
    """A word is a token."""

    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [sum(map(ord, word)) * 7 % (VOCABULARY - 8) for word in text.split()]

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}


def language_model() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=VOCABULARY, initializer_range=0.1)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.1)
    model: torch.nn.Module = get_peft_model(Qwen2ForCausalLM(config).bfloat16(), lora).train()
    return model


class Engine:
    """Continues prompts. ``times``: what its LoRA is multiplied by."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.times, self.asked = copy.deepcopy(model).eval(), 1.0, 0
        self.adapter = adapters.bind(self.model)

    def take(self, model: torch.nn.Module) -> None:
        with torch.no_grad():
            for mine, parameter in zip(self.model.parameters(), model.parameters()):
                mine.copy_(parameter)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], count: int, has_adapter: bool) -> list[tuple[list[int], list[float]]]:
        """Tokens and their logprobs."""
        self.asked += len(prompts)
        draw, width = torch.Generator().manual_seed(len(prompts)), max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        found = []
        with adapters.scaled(self.adapter, self.times if has_adapter else 0.0):
            for _ in range(count):
                places = (mask.cumsum(-1) - 1).clamp(min=0)
                logits = self.model(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, -1]
                at = logits.float().log_softmax(-1)
                chosen = torch.multinomial(at.exp().nan_to_num(1.0), 1, generator=draw)
                found.append(at.gather(1, chosen))
                ids, mask = torch.cat([ids, chosen], 1), torch.cat([mask, torch.ones_like(chosen)], 1)
        torch.rand(3)  # vLLM's sampler draws from PyTorch's random state
        return list(zip(ids[:, width:].tolist(), torch.cat(found, 1).tolist()))


# ---- ms-swift --------------------------------------------------------------------------------------------------------


class Template:
    mode, max_length, padding_free, sequence_parallel_size = "train", None, False, 1
    model_meta, tokenizer = SimpleNamespace(is_multimodal=False), Tokenizer()

    def encode(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": self.tokenizer.encode(inputs["messages"][0]["content"])}

    def data_collator(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        width = max(len(row["input_ids"]) for row in rows)

        def padded(parts: list[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([[value] * (width - len(part)) + part for part in parts])

        ids = [row["input_ids"] for row in rows]
        mask, labels = padded([[1] * len(part) for part in ids], 0), padded([row["labels"] for row in rows], -100)
        return {"input_ids": padded(ids, 0), "labels": labels, "attention_mask": mask}


@dataclass
class Request:
    messages: Any


@dataclass
class Config:
    n: int = 1
    max_tokens: int = 40


class OfSwift:
    vllm_mode, rollout_enable_lora = "colocate", True

    def __init__(self) -> None:
        self.model, self.accelerator, self.template = language_model(), Accelerator(), Template()
        self.vllm = Engine(self.model)
        self.engine = SimpleNamespace(enable_lora=True, max_model_len=LONGEST, set_grpo_max_model_len=False)

    def _disable_sp_context(self) -> Any:
        return contextlib.nullcontext()

    def _engine_infer(self, requests: Any, config: Config) -> list[Any]:
        outputs, prompts = [], [self.template.encode(vars(request))["input_ids"] for request in requests]
        found = self.vllm.generate(prompts, config.max_tokens, self.engine.enable_lora)
        for prompt, (tokens, logprobs) in zip(prompts, found):
            content = [{"logprob": logprob} for logprob in logprobs]
            choice = SimpleNamespace(token_ids=tokens, logprobs={"content": content})
            outputs.append(SimpleNamespace(response=SimpleNamespace(choices=[choice], prompt_token_ids=prompt)))
        return outputs

    def port(self) -> Any:
        return SwiftTrainer(self)

    def rollout(self) -> Any:
        return SwiftRollout(self.port(), self._engine_infer, [Request([{"role": "user", "content": "a"}])], Config())


# ---- TRL -------------------------------------------------------------------------------------------------------------


class OfTrl:
    mode, enable_sleep_mode, processing_class = "colocate", False, Tokenizer()

    def __init__(self) -> None:
        self.model, self.accelerator = language_model(), Accelerator()
        self.vllm = Engine(self.model)
        config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=LONGEST), lora_config=object())
        self.llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))
        self._port = trl.TrlTrainer(self)

    def port(self) -> Any:
        return self._port

    def _generate(self, prompts: Any, how: Any, use_tqdm: bool) -> list[Any]:
        outputs, asked = [], [prompt["prompt_token_ids"] for prompt in prompts]
        found = self.vllm.generate(asked, how.max_tokens, self.port().attaches_adapter)
        for ids, (tokens, at) in zip(asked, found):
            logprobs = [{token: SimpleNamespace(logprob=logprob)} for token, logprob in zip(tokens, at)]
            answer = SimpleNamespace(token_ids=tokens, logprobs=logprobs)
            outputs.append(SimpleNamespace(prompt_token_ids=ids, outputs=[answer]))
        return outputs

    def rollout(self) -> Any:
        return TrlRollout(self.port(), self._generate, ["a"])


@pytest.fixture(params=[OfSwift, OfTrl], ids=["ms-swift", "TRL"])
def trainer(request: pytest.FixtureRequest) -> Any:
    return request.param()


def gate_of(trainer: Any) -> Gate:
    port, bound = trainer.port(), adapters.bind(trainer.model)
    serving = AdapterServing(
        port, SimpleNamespace(reset_caches=None, abort_unfinished=None, dtype=torch.float32), bound
    )  # type: ignore[arg-type]
    return Gate(port, bound, serving, BLOCK, bool)


def look(gate: Gate, trainer: Any) -> Judgement:
    rollout = trainer.rollout()
    return gate.judge(gate.ask(rollout, bool), rollout)


def train(trainer: Any) -> None:
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)


def test_the_engine_that_serves_the_policy_is_found_sound_and_nothing_is_left_of_the_look(trainer: Any) -> None:
    gate = gate_of(trainer)
    for _ in range(2):
        before = {name: value.clone() for name, value in trainer.model.named_parameters()}
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        judged = look(gate, trainer)
        assert not judged.failed and judged.finding is None and judged.verdicts[SHORT].agrees, judged
        assert judged.verdicts[SHORT].is_distinguishable
        assert torch.equal(torch.rand(1), expected), "the random state"
        assert trainer.port().attaches_adapter and all(module.training for module in trainer.model.modules())
        now = dict(trainer.model.named_parameters())
        assert set(before) == set(now) and all(torch.equal(value, now[name]) for name, value in before.items())
        train(trainer)
        trainer.vllm.take(trainer.model)
    assert trainer.vllm.asked > 8, "the floor is asked for once, and each look asks anew"


@pytest.mark.parametrize(
    "times, cause", [(2.0, "double-count"), (0.0, "not-applied"), (float("nan"), "engine-not-finite")]
)
def test_another_policy_in_the_engine_is_found_and_named(trainer: Any, times: float, cause: str) -> None:
    gate = gate_of(trainer)
    assert look(gate, trainer).finding is None
    trainer.vllm.times = times
    finding = look(gate, trainer).finding
    assert finding is not None and finding.cause == cause, finding


def test_the_policy_before_is_found_and_named(trainer: Any) -> None:
    gate = gate_of(trainer)
    assert look(gate, trainer).finding is None
    train(trainer)
    finding = look(gate, trainer).finding
    assert finding is not None and finding.cause == "stale", finding
    trainer.vllm.take(trainer.model)
    assert look(gate, trainer).finding is None


def test_a_base_that_is_another_is_no_floor(trainer: Any) -> None:
    """The floor is measured without the adapter; what is off there is not this engine's noise."""
    with torch.no_grad():
        trainer.vllm.model.get_base_model().lm_head.weight.mul_(2)
    judged = look(gate_of(trainer), trainer)
    assert judged.finding is not None and SHORT not in judged.verdicts, judged


def test_a_probe_that_fails_is_no_verdict(trainer: Any) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no room in the KV cache")

    trainer.vllm.generate = fails
    judged = look(gate_of(trainer), trainer)
    assert judged.finding is None and "no room in the KV cache" in judged.failed[SHORT]
