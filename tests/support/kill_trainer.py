"""Trainers to be killed: this package's whole trainer's side against a real server, without GRPO around it.

    python -m tests.support.kill_trainer MODEL URL REFERENCES

For each line on its input the process forks a trainer, which syncs and makes rollouts for ever, and prints its id. What
a trainer prints: ``rollout STEP DIGEST`` after each rollout that came from the policy that was asked for, ``WRONG ...``
after any other, and ``end ...`` with the error that ends it. REFERENCES: a file with the tokens by digest.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import requests
import torch

from swift_lora_fix.frameworks.swift.port import SwiftTrainer
from swift_lora_fix.policy import adapter
from swift_lora_fix.server.trainer import remote
from swift_lora_fix.server.trainer.client import Bearer
from swift_lora_fix.server.trainer.writer import RemoteWriter
from tests.support.kills import say
from tests.support.reload_client import KEY, peft_model_of, rollout_request, set_adapter, tokens_of

SEEDS = (1, 2, 3)


class Trainer(SimpleNamespace):
    """A namespace that can be referred to weakly."""


def train(model: Any, url: str, references: dict[str, Any]) -> None:
    session = requests.Session()
    session.auth = Bearer(KEY)
    client = SimpleNamespace(
        base_urls=[url], sessions=[session], num_servers=1, close_communicator=lambda: None, pynccl_comms=[]
    )
    accelerator = SimpleNamespace(
        is_main_process=True, num_processes=1, device=torch.device("cpu"), unwrap_model=lambda found: found
    )
    state = SimpleNamespace(global_step=0)
    trainer = Trainer(model=model, vllm_client=client, accelerator=accelerator, state=state, vllm_mode="server")
    port = SwiftTrainer(trainer)
    writer = RemoteWriter(port, remote.RemoteEngine(port), adapter.bind(model))
    writer.send_base()

    def infer() -> Any:
        response = session.post(f"{url}/infer/", json=rollout_request())
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}, {response.text}")
        return [SimpleNamespace(**output) for output in response.json()]

    while True:
        set_adapter(model, SEEDS[state.global_step % len(SEEDS)])
        writer.begin_validation()
        writer.validate()
        digest = writer.write().digest
        writer.engine.make_ready()
        outputs = writer.engine.generate(infer)
        right = tokens_of(vars(output) for output in outputs) == references[digest]
        say(f"{'rollout' if right else 'WRONG'} {state.global_step} {digest}")
        state.global_step += 1


def main() -> None:
    folder, url, file = sys.argv[1:]
    torch.set_num_threads(1)
    model, references = peft_model_of(Path(folder), "bfloat16"), json.loads(Path(file).read_text())
    say("ready")
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                train(model, url, references)
            except Exception as error:
                say(f"end {type(error).__name__}: {error}".replace("\n", " "))
            os._exit(1)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever ends is gone at once
        say(f"trainer {child}")


if __name__ == "__main__":
    main()
