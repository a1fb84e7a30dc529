"""A multimodal model: the gate asks it in text and about an image of the batch, and scores what it says with that."""

from __future__ import annotations

import importlib.util
import json

import pytest

from swift_lora_fix.install import releases
from swift_lora_fix.proof.gate import MEDIA_ALLOWED
from swift_lora_fix.proof.verdict import ALLOWED
from tests.support.driver import Run

from .conftest import FAMILY

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        importlib.util.find_spec("torchvision") is None or FAMILY.layout is releases.SWIFT_3,
        reason="its processor needs torchvision, and the plugins here ms-swift 4",
    ),
]


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


@pytest.mark.needs("media")
def test_what_is_said_about_an_image_is_scored_with_it(run: Run) -> None:
    assert run.returncode == 0, run.log[-3000:]
    records = [json.loads(line) for line in (run.folder / "media.jsonl").read_text().splitlines()]
    assert records
    for record in records:
        assert record["same_ids"] and record["mean"] < 0.01, record
        assert abs(record["mean"] - record["plain"]) < 0.003, "as transformers' own processor has it"
        assert record["negative"] > 10 * record["mean"], "another image is another answer"
    assert records[-1]["base"] > 0.05
