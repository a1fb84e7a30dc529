"""A multimodal model: the gate asks it in text and about an image of the batch, and scores what it says with that."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest

from swift_lora_fix.install import releases
from swift_lora_fix.proof.gate import MEDIA_ALLOWED
from swift_lora_fix.proof.verdict import ALLOWED
from tests.support.driver import PLUGINS, Run, make_model, this_python

from .conftest import FAMILY

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(FAMILY.layout is releases.SWIFT_3, reason="the plugins here are for ms-swift 4"),
]

sees = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="its processor needs torchvision")


@sees
@pytest.mark.needs("media")
def test_the_gate_agrees_on_a_vision_language_model(run: Run) -> None:
    assert run.returncode == 0, run.log[-3000:]
    assert run.log.count("engine and trainer agree at step") == 3
    assert run.log.count("engine and trainer agree on media prompts at step") == 2, "the first batch has no image"
    for metrics in run.metrics():
        assert metrics["lora_sync/agrees"] == 1 and metrics["lora_sync/ratio"] < ALLOWED
    for metrics in run.metrics()[1:]:
        assert metrics["lora_sync/media_ratio"] < MEDIA_ALLOWED
    assert run.metrics()[-1]["lora_sync/control_base"] > 0.05, "a large LoRA"


@sees
@pytest.mark.needs("media")
def test_what_is_said_about_an_image_is_scored_with_it(run: Run) -> None:
    assert run.returncode == 0, run.log[-3000:]
    records = [json.loads(line) for line in (run.folder / "media.jsonl").read_text().splitlines()]
    assert records
    for record in records:
        assert record["same_ids"] and record["mean"] < 1e-3, record
        assert abs(record["mean"] - record["plain"]) < 1e-5, "as transformers' own processor has it"
        assert record["negative"] > 0.01, "another image is another answer"
    assert records[-1]["base"] > 0.05


@pytest.mark.parametrize(
    "kind", ["qwen2", pytest.param("qwen2_vl", marks=sees), pytest.param("qwen2_5_vl", marks=sees)]
)
def test_the_trainer_scores_as_transformers_does_however_its_template_pads(kind: str, tmp_path: Path) -> None:
    model = make_model(this_python(), tmp_path, kind, "float32")
    pictures = [] if kind == "qwen2" else [str(tmp_path / f"picture{index}.png") for index in range(2)]
    done = subprocess.run(
        [this_python(), "-m", "tests.support.template_scores", model, kind, "chatml" if kind == "qwen2" else kind]
        + pictures,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(PLUGINS.parents[2]), str(PLUGINS.parent / "vision")]),
        },
        text=True,
        capture_output=True,
        cwd=tmp_path,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr[-3000:]
    found = json.loads(lines[0].removeprefix("FOUND "))
    assert len(found["differences"]) == 6 and max(found["differences"].values()) < 1e-5, found
    if pictures and releases.installed_swift() == "4.0.1":
        assert "'NoneType' object has no attribute 'shape'" in found["ids_alone"], "what ids alone come to"
