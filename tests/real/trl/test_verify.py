"""``swift-lora-fix verify`` under TRL, on a real checkpoint: two real runs a mode."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.driver import Verification

from .conftest import Runs

pytestmark = pytest.mark.e2e
MODES = ("fused", "adapter") if os.environ.get("SLF_SOAK") else ("fused",)  # both on request: SLF_SOAK=1


@pytest.mark.needs("killed")
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_is_proved(runs: Runs, mode: str, tmp_path: Path) -> None:
    adapter = runs.get("killed").checkpoint()
    extra = ("--vllm_max_model_length", "256", "--vllm_gpu_memory_utilization", "0.2")
    arguments = ("--framework", "trl", "--syncs", "3", "--json")
    environment = {"SWIFT_LORA_FIX_MODE": mode}
    done = Verification(runs.model, adapter, tmp_path, arguments, extra, environment).start().done
    assert done is not None and done.returncode == 0, done
    result = json.loads(done.stdout)
    ours, stock = result["ours"]["syncs"], result["stock"]["syncs"]
    assert result["proved"] and result["framework"] == "TRL" and len(ours) == len(stock) == 3
    assert all(sync["agrees"] and sync["is_distinguishable"] for sync in ours)
    assert not any(sync["base_changed"] or sync["lora_changed"] for sync in ours)
    assert all(sync["agrees"] for sync in stock), "it serves the policy"
    assert 0 < stock[0]["base_changed"] <= stock[-1]["base_changed"], "and each merge leaves a rest in the base"
    assert result["stock"]["floors"] == result["ours"]["floors"] != {}
    assert "Stock TRL here: it changed" in result["verdict"]
