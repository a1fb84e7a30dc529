#!/usr/bin/env python3
"""GRPO with TRL, a LoRA, and vLLM in the trainer's process: one GPU. Needs TRL, vLLM and PEFT.

    python3 examples/trl_grpo.py --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct --dataset prompts.jsonl \\
        --output_dir output
    ... --resume_from_checkpoint output/checkpoint-100

DATASET: a file of lines such as {"prompt": "..."}. Every other argument is one of TRL's GRPOConfig or ModelConfig.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import swift_lora_fix

swift_lora_fix.apply()  # raises, saying why, where this run cannot be protected; an import alone would warn

from datasets import load_dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser  # noqa: E402


@dataclass
class Data:
    """dataset: a file of JSON lines with a ``prompt`` each."""

    dataset: str


def different_words(completions: Sequence[str], **_: object) -> list[float]:
    """Put your own reward here. This one is the share of words that are not repeated."""
    words = [re.findall(r"\w+", text.lower()) for text in completions]
    return [len(set(said)) / max(1, len(said)) for said in words]


def make_trainer(arguments: Sequence[str]) -> GRPOTrainer:
    """From the command line's arguments."""
    plain = ["--use_vllm", "true", "--vllm_mode", "colocate", "--dtype", "bfloat16"]
    config, model, data = TrlParser((GRPOConfig, ModelConfig, Data)).parse_args_and_config([*plain, *arguments])
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model.model_name_or_path, dtype=model.dtype),
        reward_funcs=different_words,
        args=config,
        train_dataset=load_dataset("json", data_files=data.dataset, split="train"),
        peft_config=LoraConfig(r=model.lora_r, lora_alpha=model.lora_alpha, target_modules="all-linear"),
    )


if __name__ == "__main__":
    trainer = make_trainer(sys.argv[1:])
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
