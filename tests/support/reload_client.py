"""A ``RolloutServer`` as a trainer of the ``reload`` transport talks to it, request by request."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from swift_lora_fix.server.hosts import this_process
from swift_lora_fix.server.wire import BYTES, POLICY_HEADER, PREFIX, Policy
from tests.support.parcels import Sent, staged, write
from tests.support.rollout_server import RolloutServer

KEY = "sesame"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = ["Count to three. Count to three.", "What is two plus two?"]


@dataclass
class ReloadServer(RolloutServer):
    """``with ReloadServer(model, folder) as server``. Its key is `KEY`, and this process holds its lease."""

    known: dict[str, Any] = field(default_factory=dict)  # boot and epoch

    def __enter__(self) -> ReloadServer:
        self.arguments = {"api_key": KEY, **self.arguments}
        try:
            self.start().wait()
            self.lease("5eed")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def call(self, method: str, path: str, key: str | None = KEY, **content: Any) -> requests.Response:
        headers = {**({"Authorization": f"Bearer {key}"} if key else {}), **content.pop("headers", {})}
        return requests.request(method, self.url + path, headers=headers, timeout=120, **content)

    def status(self) -> dict[str, Any]:
        response = self.call("GET", f"{PREFIX}/status/")
        assert response.status_code == 200, response.text
        return dict(response.json())

    def lease(self, run: str, **changes: Any) -> requests.Response:
        return self.call("POST", f"{PREFIX}/lease/", json={"holder": {**this_process(run).as_dict(), **changes}})

    def order(self, verb: str, key: str | None = KEY, to: dict[str, Any] | None = None, **body: Any) -> Any:
        run = (body.get("policy") or {}).get("run", "5eed")
        status = self.status()
        whom = {"boot": status["boot"], "epoch": status["epoch"], "run": run, **(to or {})}
        return self.call("POST", f"{PREFIX}/{verb}/", key, json={"to": whom, **body})

    def announce(self, policy: Policy, sent: Sent, key: str | None = KEY) -> requests.Response:
        """After the server has made room for it."""
        run = {"run": policy.run}
        prepared: requests.Response = self.order("prepare", key, run, layout=sent.layout.as_dict())
        if prepared.status_code != 200:
            return prepared
        return self.order("stage", key, policy=policy.as_dict(), nccl=False)  # type: ignore[no-any-return]

    def stage(self, policy: Policy, sent: Sent, key: str | None = KEY) -> requests.Response:
        """Announced, written into the server's memory, and received from there."""
        announced = self.announce(policy, sent, key)
        if announced.status_code != 200:
            return announced
        write(announced.json()["memory"], sent)
        return self.order("receive", key, policy=policy.as_dict(), written=True)

    def stage_body(self, policy: Policy, sent: Sent, body: bytes | None = None) -> requests.Response:
        announced = self.announce(policy, sent)
        if announced.status_code != 200:
            return announced
        status = self.status()
        to = {"boot": status["boot"], "epoch": status["epoch"], "run": policy.run}
        headers = {"Content-Type": BYTES, POLICY_HEADER: json.dumps({"to": to, "policy": policy.as_dict()})}
        return self.call("POST", f"{PREFIX}/receive/", data=sent.body if body is None else body, headers=headers)

    def commit(self, policy: Policy, **more: Any) -> requests.Response:
        return self.order("commit", policy=policy.as_dict(), **more)  # type: ignore[no-any-return]

    def infer(self, expected: Policy | None = None) -> requests.Response:
        headers = {POLICY_HEADER: json.dumps(expected.as_dict())} if expected else {}
        return self.call("POST", "/infer/", json=rollout_request(), headers=headers)

    def rollouts(self, expected: Policy | None = None) -> tuple[list[Any], list[dict[str, Any]]]:
        """Tokens and logprobs of each prompt, and what the server says they came from."""
        response = self.infer(expected)
        assert response.status_code == 200, response.text + self.log[-2000:]
        return tokens_of(response.json()), [output["rollout_infos"] for output in response.json()]


def rollout_request() -> dict[str, Any]:
    config = {"max_tokens": 8, "temperature": 0, "return_details": True, "logprobs": True}
    queries = [{"messages": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    return {"infer_requests": queries, "request_config": config}


def tokens_of(outputs: Iterable[dict[str, Any]]) -> list[Any]:
    """Tokens and logprobs of each output."""
    choices = [output["response"]["choices"][0] for output in outputs]
    return [[c["token_ids"], [step["logprob"] for step in c["logprobs"]["content"]]] for c in choices]


def peft_model_of(model: Path, dtype: str, rank: int = 8, **config: Any) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, torch_dtype=getattr(torch, dtype))
    settings = {"r": rank, "lora_alpha": 12, "target_modules": TARGETS, **config}
    return get_peft_model(base, LoraConfig(**settings))


def set_adapter(adapted: Any, seed: int) -> None:
    """Random values for its LoRA, the same for the same seed."""
    import torch

    made = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=made) * 0.1)


def made_adapter(model: Path, seed: int, rank: int = 8, **config: Any) -> dict[str, Any]:
    """A random LoRA of ``model``, as a trainer has it staged: ``tensors`` in bfloat16 with the scaling in B, and the
    ``config`` of scaling 1."""
    import torch

    from swift_lora_fix.engine.vllm.slots import loader
    from swift_lora_fix.policy import adapter as adapters

    adapted = peft_model_of(model, "float32", rank, **config)
    set_adapter(adapted, seed)
    bound = adapters.bind(adapted)
    held = adapters.read_to_host(bound, torch.device("cpu"))
    tensors = {entry.key: (held[entry.key].float() * entry.scale).bfloat16() for entry in bound.entries}
    return {"tensors": tensors, "config": loader.plain_config(bound)}


def sent_of(made: dict[str, Any], digest: str | None = None) -> Sent:
    return staged(made["tensors"], made["config"], digest)
