"""The flags of ms-swift's examples on one GPU: the gate passes at the first syncs, three faults are found and repaired.

    SLF_GPU_MODELS=FOLDER python3 -m pytest tests/real/gpu/test_examples_gpu.py -q -o filterwarnings=default

FOLDER holds what ``python3 -m tests.support.tiny SHAPE FOLDER/SHAPE`` made, of qwen2-1.5b and qwen3-moe. QLoRA needs
bitsandbytes. Results are kept, dated, in README.md beside this file.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from swift_lora_fix.proof.verdict import ALLOWED
from tests.support import faults
from tests.support.driver import PLUGINS, Run, this_python

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SLEEPS = {"sleep_level": 1}
OFFLOADS = {"offload_model": "true", "offload_optimizer": "true", **SLEEPS}  # colocate_multi_node, dapo, gspo, ...
FUSED, ADAPTER = {"vllm_enable_lora": "false"}, {"vllm_enable_lora": "true"}
QLORA = {"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_quant_type": "nf4", **SLEEPS, **ADAPTER}
MOE = {"model_type": "qwen3_moe"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fused_offloaded": ("qwen2-1.5b", {**OFFLOADS, **FUSED, "move_model_batches": 10}),
    "adapter_offloaded": ("qwen2-1.5b", {**OFFLOADS, **ADAPTER}),
    "qlora": ("qwen2-1.5b", QLORA),
    "moe_fused_offloaded": ("qwen3-moe", {**MOE, **OFFLOADS, **FUSED}),
    "moe_adapter": ("qwen3-moe", {**MOE, **SLEEPS, **ADAPTER}),
}
FAULTS = {"policy_twice": "double-count", "policy_missing": "not-applied", "policy_stale": "stale"}  # from step 3 on
CHANGED = ("slots-changed", "weights-changed")  # what an audit says where the answers leave open what is served
CLEAN = 3


@pytest.mark.parametrize("name", CASES)
def test_the_gate_passes_and_faults_are_found(tmp_path: Path, name: str) -> None:
    shape, flags = CASES[name]
    if "quant_method" in flags and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    settings = {
        "lora_rank": 16,
        "lora_alpha": 32,
        "learning_rate": 2e-3,
        "max_steps": CLEAN + len(FAULTS),
        "save_steps": 100,
        "max_length": 900,
        "vllm_max_model_len": 1024,
        "vllm_max_num_seqs": 8,
    }
    model = Path(os.environ["SLF_GPU_MODELS"]) / shape
    made = Run(name, this_python(), model, tmp_path, True, arguments={**settings, **flags}, gpu=True, probe=False)
    made.last_plugins = (PLUGINS / "slf_faults.py",)
    made.environment = {
        **faults.environment(tmp_path),
        "SLF_FAULTS": ",".join(["none"] * (CLEAN - 1) + list(FAULTS)),  # from step 1 on; there is none at step 0
    }
    made.start()
    assert made.returncode == 0, made.log[-3000:]
    lines = [line for line in made.metrics() if "lora_sync/agrees" in line]
    for line in lines:
        print({key.removeprefix("lora_sync/"): round(line[key], 4) for key in sorted(line) if "lora_sync/" in key})
    for line in lines[:CLEAN]:
        assert line["lora_sync/agrees"] == 1 and line["lora_sync/ratio"] < ALLOWED
    assert lines[CLEAN - 1]["lora_sync/distinguishable"] == 1, "the adapter is large enough for its faults to matter"
    found: dict[int, list[str]] = {}
    for step, cause, _ in faults.messages(made):
        found.setdefault(step, []).append(cause)
    print(json.dumps(found))
    for step, cause in enumerate(FAULTS.values(), start=CLEAN):
        (named,) = found.pop(step)
        assert named == cause or (cause == "stale" and named in CHANGED), (step, cause, named)
    assert not found and made.log.count("repaired: the engine serves the trainer's policy again") == len(FAULTS)
