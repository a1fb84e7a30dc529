"""Adapters from memory in real vLLM engines on GPUs: the worker here, elsewhere, and two of them (tensor parallel).

    python3 -m pytest tests/real/gpu/test_memory_gpu.py -q -o addopts= -o filterwarnings=default

The model is made on the spot. What is looked at is what tests/real/vllm looks at on the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.driver import REPOSITORY, make_model, this_python

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

KINDS = [
    "in-process",
    "processes",
    "async",
    pytest.param("two-workers", marks=two_gpus),
    pytest.param("async-two-workers", marks=two_gpus),
]


@pytest.mark.parametrize("kind", KINDS)
def test_memory_equals_the_folder(kind: str, tmp_path: Path) -> None:
    model = make_model(this_python(), tmp_path / "qwen2", "qwen2")
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.memory", kind, str(model), "500"],
        cwd=REPOSITORY,
        env={**os.environ, "SLF_GPU": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line.split("MEMORY ", 1)[1] for line in done.stdout.splitlines() if line.startswith("MEMORY ")]
    assert lines, done.stdout[-1500:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(lines[0])
    assert found["differ"] and found["equal"] and found["peft"] and found["replaced"] and found["updated"]
    assert found["evicted"] == [True] * 6 and found["after"] and found["untouched"]
    assert found["open"] == found["open_after"] == found["open_last"] == 0
    assert found["growth_mib"] < 64 and found["new_in_shm"] == []
    for name in ("rank", "module", "dora"):
        assert found[f"{name}-add"][0] == found[f"{name}-generate"][0] == "UnsupportedAdapterError"
