"""One run of ``swift-lora-fix verify`` under TRL, as a process of its own: GRPO without a reward, each sync measured.

    python -m swift_lora_fix.tools.verify.trl --model M --adapter FOLDER --prompts FILE [arguments of GRPOConfig]

It runs with the plugin, or with SWIFT_LORA_FIX=off as stock. The engine is in this process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ... import session as sessions
from ...arming import apply
from ...frameworks.trl import port as ports
from ...frameworks.trl.rollouts import TrlRollout
from ...trainer import RolloutPort
from . import observer


@dataclass
class Data:
    model: str
    adapter: str
    prompts: str


def no_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def make_trainer(words: Sequence[str]) -> Any:
    """From the command line's words."""
    import torch
    from datasets import load_dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer, TrlParser

    plain = ["--use_vllm", "true", "--vllm_mode", "colocate", "--bf16", "true"]
    config, data = TrlParser((GRPOConfig, Data)).parse_args_and_config([*plain, *words])
    base = AutoModelForCausalLM.from_pretrained(data.model, dtype=torch.bfloat16)
    return GRPOTrainer(
        model=PeftModel.from_pretrained(base, data.adapter, is_trainable=True),
        reward_funcs=no_reward,
        args=config,
        train_dataset=load_dataset("json", data_files=data.prompts, split="train"),
    )


def observe(trainer: Any) -> None:
    """Measure each sync of this trainer. With the plugin it is asked where the session looks; else where TRL asks."""
    ports.note_trainer(trainer)
    generation = trainer.vllm_generation
    session = sessions.session_of(generation)
    if session is not None:
        seen = observer.Observer(session.trainer, lambda: session.writer.serving)
        before = session.before_rollout

        def look(rollout: RolloutPort) -> None:
            before(rollout)
            seen.look(rollout)

        session.before_rollout = look  # type: ignore[method-assign]
    else:
        port = ports.TrlTrainer(generation)
        seen = observer.Observer(port)
        generate = generation.llm.generate

        def infer(*args: Any, **kwargs: Any) -> Any:
            seen.look(TrlRollout(port, generate, *args, **kwargs))
            return generate(*args, **kwargs)

        generation.llm.generate = infer
    synchronize = generation.sync_weights
    generation.sync_weights = lambda: seen.sync(synchronize)


def main(words: Sequence[str]) -> None:
    observer.keep_weights_on_a_cpu()
    apply()
    trainer = make_trainer(words)
    observe(trainer)
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1:])
