"""The gate's forwards under DeepSpeed ZeRO-3, on one rank: its trace does not end them, nor they the training's."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.support.driver import free_port

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="in the newest environment, which has DeepSpeed")

# The adapter whole while the first two forwards are made, as after a resume; then sharded again, as after a sync.
SCRIPT = """
import contextlib, sys
import deepspeed, torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM
from swift_lora_fix.frameworks.swift.encoding import untraced

sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # else compiled for a minute, for inference alone
deepspeed.init_distributed("gloo")
config = Qwen2Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, vocab_size=256)
model = get_peft_model(Qwen2ForCausalLM(config), LoraConfig(r=8, target_modules="all-linear")).to(torch.bfloat16)
engine = deepspeed.initialize(model=model, model_parameters=[p for p in model.parameters() if p.requires_grad], config={
    "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 0},
})[0]
lora = [p for name, p in model.named_parameters() if "lora_" in name]
ids = torch.arange(16)[None]

def score():
    with torch.no_grad():
        return model(input_ids=ids).logits

around = untraced if sys.argv[1] == "untraced" else lambda engine: contextlib.nullcontext()
with around(engine):
    with deepspeed.zero.GatheredParameters(lora):
        first = score(), score()
    later = score(), score()
    assert all(torch.equal(first[0], scores) for scores in (*first, *later))
for _ in range(3):
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
with around(engine):
    assert not torch.equal(score(), first[0]), "it was trained"
print("done")
"""


@pytest.mark.parametrize("way", ["traced", "untraced"])
def test_forwards_before_and_after_the_adapter_is_sharded_again(way: str) -> None:
    """``traced`` is what DeepSpeed alone does."""
    one_rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, way],
        env={**os.environ, **one_rank, "MASTER_PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=1200,  # beside other runs it took 173 s, most of it imports
    )
    if way == "traced":
        assert done.returncode != 0 and "tracing error at step" in done.stderr, done.stderr[-3000:]
    else:
        assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]
