"""A framework that this package has never seen: one port, and the session, the engine and the proof serve it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support import forks

pytestmark = pytest.mark.e2e

# one projection of a packed layer alone: vLLM wraps all of qkv_proj for it, and the framework names one part of it so
PART_OF_A_PACKED_LAYER = ["q_proj", "down_proj"]


@pytest.mark.parametrize(
    "mode, targets, cause",
    [("adapter", [], "double-count"), ("adapter", PART_OF_A_PACKED_LAYER, "double-count"), ("fused", [], None)],
)
def test_it_is_served_and_examined(mode: str, targets: list[str], cause: str | None, tmp_path: Path) -> None:
    model = forks.tiny_model(tmp_path, "qwen2", "bfloat16")
    done = forks.run(
        module="tests.support.new_framework",
        arguments=[str(model), mode, *targets],
        environment={**os.environ, "HF_HUB_OFFLINE": "1", "SWIFT_LORA_FIX_GATE_EVERY": "1"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stdout[-1500:] + done.stderr[-3000:]
    found = json.loads(lines[0].removeprefix("FOUND "))
    for mean, floor, control in found["means"]:
        assert mean < 4 * floor < control, found["means"]
    assert found["phase"] == "examined" and found["base_changed"] == 0
    assert found["metrics"]["lora_sync/policy_step"] == 2 and found["metrics"]["lora_sync/mismatch_mean"] > 0
    assert found["cause"] == cause if cause else found["cause"] in ("weights-changed", "base-changed")
