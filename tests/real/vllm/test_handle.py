"""What the gate needs of a real vLLM engine in this process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support import forks

pytestmark = pytest.mark.e2e


def test_what_a_call_that_failed_left_behind_is_aborted(tmp_path: Path) -> None:
    """vLLM's CPU backend, for one, cannot continue a prompt that it takes in parts where a seed is asked for."""
    model = forks.tiny_model(tmp_path)
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "none", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = forks.run(
        module="tests.support.unfinished",
        arguments=[str(model)],
        environment={**os.environ, "HF_HUB_OFFLINE": "1", **alone},
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    found = json.loads(line.removeprefix("FOUND "))
    assert "division" in found["error"] and "reset_prefix_cache() reported that it was not done" in found["reset"]
    assert not found["unfinished"] and found["same"], found
    assert found["processors"] == ["Keep", "tests.support.processors:Keep"]
