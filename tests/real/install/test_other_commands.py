"""A checkpoint that was trained with the plugin names it in its args.json, and each command that reads that loads it.

Where nothing is trained with rollouts, nothing is patched, and vLLM need not be there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from swift_lora_fix.tools.plugin import PLUGIN_FILE
from tests.support import forks, hangs
from tests.support.environments import Environment, clean_environment


@pytest.mark.e2e
def test_a_checkpoint_is_exported_where_there_is_no_vllm(tmp_path: Path) -> None:
    model = forks.tiny_model(tmp_path)
    checkpoint, merged = tmp_path / "checkpoint-1", tmp_path / "merged"
    made = forks.run(ADAPTER.format(model=str(model), checkpoint=str(checkpoint)))
    assert made.returncode == 0, made.stderr[-2000:]
    said = {"external_plugins": [str(PLUGIN_FILE)], "model": str(model), "model_type": "qwen2", "template": "qwen2_5"}
    said |= {"tuner_type": "lora", "train_type": "lora", "task_type": "causal_lm", "swift_version": "4.0.1"}
    (checkpoint / "args.json").write_text(json.dumps(said))
    environment = Environment(tmp_path / "environment").without("vllm", "vllm*.dist-info")
    command = environment.site / "swift" / "cli" / "export.py"
    arguments = ["--adapters", checkpoint, "--merge_lora", "true", "--output_dir", merged, "--device_map", "cpu"]
    done = hangs.run(
        [environment.script.parent / "python", command, *arguments],
        env=clean_environment(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert "Successfully imported external_plugins" in done.stdout + done.stderr, "it was to be loaded"
    assert (merged / "model.safetensors").is_file() and "lora_fix]" not in done.stdout + done.stderr


ADAPTER = """
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({model!r}, dtype="bfloat16")
get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained({checkpoint!r})
"""


@pytest.mark.parametrize(
    "command, is_loaded",
    [
        ("swift/cli/rlhf.py", True),
        ("swift/cli/rollout.py", True),
        ("mine/train.py", True),
        ("mine/cli/export.py", True),
        ("swift/cli/infer.py", False),
        ("swift/cli/sft.py", False),
        ("swift/cli/_megatron/export.py", False),
    ],
)
def test_the_plugin_loads_the_package_where_it_is_needed(command: str, is_loaded: bool, tmp_path: Path) -> None:
    program = f"""
import importlib, multiprocessing, sys
multiprocessing.parent_process = lambda: "a dataloader's"  # there nothing is applied, which would take longer
sys.argv = [{str(tmp_path / command)!r}]
sys.path.insert(0, {str(PLUGIN_FILE.parent)!r})
importlib.import_module({PLUGIN_FILE.stem!r})
print("swift_lora_fix" in sys.modules)
"""
    done = hangs.run([sys.executable, "-c", program], env={**os.environ, "VLLM_PLUGINS": "none"})
    assert done.stdout.strip() == str(is_loaded), done.stderr


def test_ms_swift_finds_no_other_package_beside_the_plugin() -> None:
    """A folder there would be a package of that name to whoever asks whether it is installed."""
    names = {entry.name for entry in PLUGIN_FILE.parent.iterdir()} - {"__pycache__"}
    assert names == {PLUGIN_FILE.name}
