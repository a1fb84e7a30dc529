"""Dense LoRA layers in real vLLM engines on the CPU, one process an engine: right, or not used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from swift_lora_fix.install import releases
from tests.support import forks

pytestmark = pytest.mark.e2e

MODELS = ("qwen2", "llama", "qwen3")  # with biases; tied embeddings; norms of heads


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dense")


def run(folder: Path, model: str, kernels: str, *fault: str) -> Any:
    if not (folder / model).is_dir():
        forks.tiny_model(folder, model)
    return forks.run(
        module="tests.support.dense",
        arguments=[str(folder / model), str(folder / f"{model}-adapter"), *fault],
        environment={**os.environ, "HF_HUB_OFFLINE": "1", "SWIFT_LORA_FIX_KERNELS": kernels},
    )


def record(done: Any) -> dict[str, Any]:
    lines = [line.split("DENSE ", 1)[1] for line in done.stdout.splitlines() if line.startswith("DENSE ")]
    assert done.returncode == 0 and len(lines) == 1, done.stdout[-1500:] + done.stderr[-3000:]
    return json.loads(lines[0])


@pytest.fixture(scope="module")
def by_vllm(folder: Path) -> dict[str, Any]:
    """The default, on a CPU."""
    return record(run(folder, "qwen2", "auto"))


@pytest.mark.parametrize("model", MODELS)
def test_one_batch_with_and_without_the_adapter(folder: Path, model: str) -> None:
    found = record(run(folder, model, "dense"))
    assert found["dense"] == 8 and found["gated"] == 2 and not found["weights_changed"]
    assert any("dense LoRA layers: 8, each kind proved" in line for line in found["said"])
    assert found["adapted"] < 0.03 * found["effect"] and found["plain"] < 0.03 * found["effect"]
    assert found["again"], "the same tokens give the same bits"
    assert list(found["mark"]) == ["swift_lora_fix_dense"], "vLLM's compile cache must not serve another's graphs"


def test_vllms_own_kernels_stay_on_a_cpu_where_nobody_asked(by_vllm: dict[str, Any]) -> None:
    assert by_vllm["dense"] == 0 and not by_vllm["mark"] and by_vllm["adapted"] < 0.03 * by_vllm["effect"]
    # before 0.33, vLLM's CPU kernels take index -1 for the last slot, and there is one: requests without adapter get it
    is_mended = Version(releases.installed_vllm() or "0") >= Version("0.33")
    assert (by_vllm["plain"] < 0.03 * by_vllm["effect"]) is is_mended


# of tests/support/dense.py, whose import would change this process's environment
@pytest.mark.parametrize("fault", ["scale", "everybody", "raises"])
def test_sums_that_are_wrong_are_not_trusted(folder: Path, fault: str) -> None:
    """Asked for by name, which is impossible then; the words of what the proof saw are passed on."""
    done = run(folder, "qwen2", "dense", fault)
    assert done.returncode != 0
    word = "RuntimeError: out of shared memory" if fault == "raises" else "error is"
    assert "SWIFT_LORA_FIX_KERNELS='dense': no LoRA layer of this engine can be dense" in done.stderr
    assert word in done.stderr


def test_layers_that_are_wrong_alone_keep_vllms_kernels(folder: Path, by_vllm: dict[str, Any]) -> None:
    found = record(run(folder, "qwen2", "dense", "slices"))
    assert (found["dense"], found["gated"]) == (4, 0), "o and down have one slice; the fault is in the others"
    assert any("4 keep" in line or "2 keep vLLM's kernels" in line for line in found["said"]), found["said"]
    assert found["adapted"] < 0.03 * found["effect"] and not found["weights_changed"]
    whole = record(run(folder, "qwen2", "dense"))
    assert found["mark"] != whole["mark"], "which layers are dense is part of the key of vLLM's compile cache"
