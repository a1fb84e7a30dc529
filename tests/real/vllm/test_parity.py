"""Direct writes against vLLM's own loader, bit for bit, in real vLLM engines on the CPU (one process an engine)."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from swift_lora_fix.install import releases
from tests.support import forks

pytestmark = pytest.mark.e2e

OLD_VLLM = (releases.installed_vllm() or "").startswith("0.17")
LINEAR = ["all-linear", "subset", "low-rank", "rslora", "patterns", "bf16-trainer", "fp16-trainer"]
# model, its dtype, the engine's LoRA dtype, cases; "syncs" is a thousand policies one after the other
ENGINES = {
    "qwen2-bf16": ("qwen2", "bfloat16", "auto", [*LINEAR, "lm_head", "embed", "syncs"]),
    "llama-fp32": ("llama", "float32", "auto", ["all-linear", "patterns", "lm_head", "embed"]),
    "qwen3-fp16": ("qwen3", "bfloat16", "float16", ["all-linear", "rslora"]),
    "qwen2_moe-bf16": ("qwen2_moe", "bfloat16", "auto", ["all-linear"]),
    "qwen2_vl-bf16": ("qwen2_vl", "bfloat16", "auto", ["all-linear"]),
}
# vLLM has no LoRA layer there for Qwen2, and stock ms-swift would silently serve without it
NOT_SERVED = {("qwen2-bf16", "lm_head"): "lm_head", ("qwen2-bf16", "embed"): "model.embed_tokens"}
SYNCS = 1000
NOT_HERE = {}
if OLD_VLLM:
    NOT_HERE["qwen2_moe-bf16"] = "vLLM 0.17 cannot build a MoE model with LoRA on a CPU"
if importlib.util.find_spec("torchvision") is None:
    NOT_HERE["qwen2_vl-bf16"] = "Qwen2-VL's processor needs torchvision, which has no CPU build for this torch"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict]]:
    folder = tmp_path_factory.mktemp("parity")
    return {name: run_engine(name, folder) for name in ENGINES if name not in NOT_HERE}


def run_engine(name: str, folder: Path) -> dict[str, dict]:
    architecture, dtype, lora_dtype, cases = ENGINES[name]
    model = forks.tiny_model(folder / name, architecture, dtype)
    return run_cases("tests.support.parity", model, lora_dtype, cases)


def run_cases(module: str, model: Path, *arguments: str | list[str]) -> dict[str, dict]:
    """The records of one engine's process, by case; the cases are the last argument."""
    cases = arguments[-1]
    done = forks.run(
        module=module,
        arguments=[str(model), *map(str, arguments[:-1]), str(SYNCS), *cases],
        environment={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    lines = [line.split("PARITY ", 1)[1] for line in done.stdout.splitlines() if line.startswith("PARITY ")]
    assert done.returncode == 0 and len(lines) == len(cases), done.stdout[-1500:] + done.stderr[-3000:]
    return {record["case"]: record for record in map(json.loads, lines)}


@pytest.mark.parametrize("engine, case", [(e, c) for e, (_, _, _, cases) in ENGINES.items() for c in cases])
def test_slots_equal_the_loaders(results: dict, engine: str, case: str) -> None:
    if engine in NOT_HERE:
        pytest.skip(NOT_HERE[engine])
    found = results[engine][case]
    if (engine, case) in NOT_SERVED:
        assert found["error"].startswith("EngineStateError: vLLM applies no LoRA in 1 of the adapter's modules")
        assert NOT_SERVED[engine, case] in found["error"]
        return
    assert "error" not in found, found
    assert found["path"] == "direct"
    assert found["differing"] == 0 and found["filled"] > 10_000
    assert found["audited"] == (SYNCS if case == "syncs" else 3)
    assert found["trainer_changed"] == 0 and found["base_changed"] == 0


def test_a_thousand_syncs_do_not_grow(results: dict) -> None:
    assert results["qwen2-bf16"]["syncs"]["rss_growth_mib"] < 16
