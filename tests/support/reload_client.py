"""A ``RolloutServer`` as a trainer of the ``reload`` transport talks to it, request by request."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from swift_lora_fix.server.content import content_digest
from swift_lora_fix.server.wire import BYTES, CONFIG, POLICY_HEADER, PREFIX, WEIGHTS, Policy
from tests.support.rollout_server import RolloutServer

KEY = "sesame"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = ["Count to three. Count to three.", "What is two plus two?"]


@dataclass
class ReloadServer(RolloutServer):
    """``with ReloadServer(model, folder) as server``. Its root is ``folder/root``, its key `KEY`."""

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def __enter__(self) -> ReloadServer:
        self.root.mkdir(parents=True, exist_ok=True)
        self.arguments = {"api_key": KEY, **self.arguments}
        self.environment = {"SWIFT_LORA_FIX_ROOT": str(self.root), **self.environment}
        try:
            self.start().wait()
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

    def post(self, verb: str, key: str | None = KEY, **body: Any) -> requests.Response:
        return self.call("POST", f"{PREFIX}/{verb}/", key, json=body)

    def stage(
        self, policy: Policy, folder: Path, digest: str | None = None, key: str | None = KEY
    ) -> requests.Response:
        body = {"policy": policy.as_dict(), "digest": digest or digest_of(folder), "folder": str(folder)}
        return self.post("stage", key, **body)

    def stage_bytes(self, policy: Policy, folder: Path, digest: str | None = None) -> requests.Response:
        about = {"policy": policy.as_dict(), "digest": digest or digest_of(folder)}
        config = json.loads((folder / CONFIG).read_text())
        headers = {"Content-Type": BYTES, POLICY_HEADER: json.dumps({**about, "config": config})}
        return self.call("POST", f"{PREFIX}/stage/", data=(folder / WEIGHTS).read_bytes(), headers=headers)

    def commit(self, policy: Policy) -> requests.Response:
        return self.post("commit", policy=policy.as_dict())

    def infer(self, expected: Policy | None = None) -> requests.Response:
        config = {"max_tokens": 8, "temperature": 0, "return_details": True, "logprobs": True}
        queries = [{"messages": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
        headers = {POLICY_HEADER: json.dumps(expected.as_dict())} if expected else {}
        body = {"infer_requests": queries, "request_config": config}
        return self.call("POST", "/infer/", json=body, headers=headers)

    def rollouts(self, expected: Policy | None = None) -> tuple[list[Any], list[dict[str, Any]]]:
        """Tokens and logprobs of each prompt, and what the server says they came from."""
        response = self.infer(expected)
        assert response.status_code == 200, response.text + self.log[-2000:]
        choices = [output["response"]["choices"][0] for output in response.json()]
        made = [[c["token_ids"], [step["logprob"] for step in c["logprobs"]["content"]]] for c in choices]
        return made, [output["rollout_infos"] for output in response.json()]


def digest_of(folder: Path) -> str:
    return content_digest((folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes())


def make_adapter(model: Path, folder: Path, seed: int, rank: int = 8, **config: Any) -> Path:
    """A PEFT folder with a random LoRA of ``model``, as a trainer writes it: its config in sorted JSON."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model)
    settings = {"r": rank, "lora_alpha": 12, "target_modules": TARGETS, **config}
    adapted = get_peft_model(base, LoraConfig(**settings))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * 0.1
    adapted.save_pretrained(folder)
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()), sort_keys=True))
    return folder
