"""Real TRL with a colocated vLLM engine that sleeps between rollouts (level 2), on one GPU, in both modes.

    SLF_GPU_MODEL=FOLDER python3 -m pytest tests/real/gpu/test_trl_gpu.py -q -s -o addopts= -o filterwarnings=default

As in test_gpu.py, in a Python with TRL. What is looked at is what tests/real/trl looks at on the CPU.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support.trl_driver import CHECKPOINT_STEP, Run

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

STEPS = 4
ARGUMENTS = {"use_cpu": False, "vllm_enable_sleep_mode": True, "vllm_gpu_memory_utilization": 0.3, "max_steps": STEPS}
PLACE = {"adapter": "engine's LoRA slots", "fused": "engine's weights, folded in"}


def started(folder: Path, mode: str, **options: str) -> Run:
    options = {"model": os.environ["SLF_GPU_MODEL"], "fixed": True, "arguments": ARGUMENTS, **options}
    run = Run(folder, options, {"SWIFT_LORA_FIX_MODE": mode, "SWIFT_LORA_FIX_GATE_EVERY": "1"}).start()
    if os.environ.get("SLF_KEEP"):
        shutil.copy(folder / "log.txt", Path(os.environ["SLF_KEEP"]) / f"trl-{mode}-{folder.name}.log")
    return run


def assert_serves(run: Run, mode: str, first: int = 0) -> None:
    assert run.returncode == 0, run.log[-3000:]
    probes = run.probes()
    assert [probe["step"] for probe in probes] == list(range(first, STEPS))
    for probe, line in zip(probes, run.metrics(), strict=True):
        noise = line["lora_sync/noise"]
        words = f"{probe['mean']:.4f} (noise {noise:.4f}, LoRA {probe['effect']:.3f})"
        print(f"step {probe['step']}: {words}, sync {1e3 * probe['seconds']:.1f} ms", end="; ")
        assert probe["mean"] < 2.5 * noise and line["lora_sync/agrees"] == 1, (probe, line)
        assert not any(probe[what] for what in ("base_changed", "lora_changed", "merges")), probe
        assert probe["lora_dtypes"] == ["torch.float32"]
    assert probes[-1]["effect"] > 5 * probes[-1]["mean"], "the LoRA must be large enough to be missed"


@pytest.mark.parametrize("mode", ["adapter", "fused"])
def test_the_engine_serves_the_trainers_policy(tmp_path: Path, mode: str) -> None:
    """From scratch, and resumed from a checkpoint."""
    whole = started(tmp_path / "whole", mode)
    assert_serves(whole, mode)
    resumed = started(tmp_path / "resumed", mode, resume=str(whole.checkpoint()))
    assert_serves(resumed, mode, CHECKPOINT_STEP)
    assert f"= trainer = {PLACE[mode]}" in resumed.log
