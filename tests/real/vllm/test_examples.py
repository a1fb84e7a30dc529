"""``examples/vllm_memory.py``, run in a real vLLM engine on the CPU: the adapter changes what the base says."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support import forks, hangs
from tests.support.driver import REPOSITORY

pytestmark = pytest.mark.e2e

ADAPTER = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
model = get_peft_model(AutoModelForCausalLM.from_pretrained(sys.argv[1]), LoraConfig(r=8, target_modules="all-linear"))
torch.manual_seed(0)
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.2)
model.save_pretrained(sys.argv[2])
"""


def test_the_program_takes_an_adapter_from_memory(tmp_path: Path) -> None:
    model, adapter = forks.tiny_model(tmp_path / "qwen2"), tmp_path / "adapter"
    made = hangs.run([sys.executable, "-c", ADAPTER, str(model), str(adapter)])
    assert made.returncode == 0, made.stderr[-2000:]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": "swift_lora_fix"}
    command = [sys.executable, str(REPOSITORY / "examples" / "vllm_memory.py"), str(model), str(adapter)]
    done = hangs.run(command, env=environment)
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines() if line.startswith(("base: ", "policy: ")))
    assert set(said) == {"base", "policy"} and said["base"] != said["policy"], done.stdout[-2000:] + done.stderr[-3000:]
