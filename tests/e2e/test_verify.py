"""``swift-lora-fix verify`` on a real checkpoint: two real runs, and mistakes that cost none."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from swift_lora_fix import releases
from tests.support.driver import Run, this_python

from .conftest import FAMILY, Runs

pytestmark = pytest.mark.e2e
SCRIPT = this_python().parent / "swift-lora-fix"


def verify(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": "none", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(SCRIPT), "verify", *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.needs("train_fixed")
def test_a_checkpoint_is_proved(run: Run, runs: Runs, tmp_path: Path) -> None:
    assert FAMILY is not None
    swift = ["--model_type", "qwen2", "--template", "chatml", "--vllm_max_model_len", "256"]
    done = verify(
        "--model", runs.model, "--adapter", runs.checkpoint, "--syncs", 3, "--out", tmp_path, "--json", "--", *swift
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(done.stdout)
    ours, stock = result["ours"]["syncs"], result["stock"]["syncs"]
    assert result["proved"] and len(ours) == len(stock) == 3
    assert all(sync["agrees"] and sync["is_distinguishable"] and not sync["base_changed"] for sync in ours)
    assert stock[-1]["base_changed"] > 0 and stock[0]["floor"] == ours[0]["floor"]
    causes = [sync["cause"] for sync in stock]
    assert not any(sync["lora_changed"] for sync in ours)
    if FAMILY.has(releases.LORA_DOWNCAST):
        # and on a CPU vLLM scales in place what it was given: the trainer's own LoRA, doubled at each sync
        assert [sync["lora_changed"] for sync in stock] == [28, 14, 14] and not any(sync["agrees"] for sync in stock)
    elif FAMILY.has(releases.DOUBLE_COUNT):
        assert causes == [None, "double-count", "double-count"] and "the LoRA is counted twice" in result["verdict"]
    else:
        assert causes == [None, None, None]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--adapter", "/nowhere/adapter"), "no local folder"),
        (("--adapter", "."), "adapter_config.json is no PEFT LoRA configuration"),
        (("--adapter", ".", "--syncs", "1"), "--syncs 1: at least 2"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = verify("--model", "some/model", "--out", tmp_path, *arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
