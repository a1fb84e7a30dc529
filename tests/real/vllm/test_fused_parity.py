"""Fused mode against PEFT's own merge sent by stock ms-swift, in real vLLM engines on the CPU: each weight is one of
the two bf16 numbers around the merged one, and the update arrives."""

from __future__ import annotations

import pytest

from tests.support import forks

from .test_parity import OLD_VLLM, SYNCS, run_cases

pytestmark = pytest.mark.e2e

LORA = ["all-linear", "subset", "rslora", "patterns", "pissa", "bf16-trainer", "fp16-trainer"]
MORE = ["dora", "dora-embed", "modules_to_save", "bias", "lora-bias", "lm_head", "embed"]
# model, cases; "syncs" is a thousand policies one after the other
NEWEST = {"qwen2": [*LORA, *MORE, "syncs"], "llama": ["all-linear", "embed"], "qwen2_moe": ["all-linear"]}
ENGINES = {"qwen2": ["patterns", "dora", "modules_to_save", "syncs"]} if OLD_VLLM else NEWEST  # each costs its seconds


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict]]:
    folder = tmp_path_factory.mktemp("fused")
    models = {name: forks.tiny_model(folder, name) for name in ENGINES}
    return {name: run_cases("tests.support.fused_parity", model, ENGINES[name]) for name, model in models.items()}


@pytest.mark.parametrize("engine, case", [(name, case) for name, cases in ENGINES.items() for case in cases])
def test_the_engine_holds_what_peft_would_have_merged(results: dict, engine: str, case: str) -> None:
    found = results[engine][case]
    assert "error" not in found, found
    assert found["path"] == "fused"
    assert found["differing"] == 0 and found["moved"] > 10_000
    assert found["lost"] < 0.02
    assert found["audited"] == (SYNCS if case == "syncs" else 2)
    assert found["trainer_changed"] == 0 and found["base_changed"] == 0
    assert found["zero_differing"] == 0, "without the adapter it is the base again"
