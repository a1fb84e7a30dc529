"""A vision-language model and a data set with images, colocated: what the engine serves, and what its rollouts are.

.venv-trl has no torchvision (its wheels are for CUDA, and cannot be loaded beside a CPU torch as they are). Beside it:

    .venv-trl/bin/python -m pip install --no-deps --target .matrix/.venv-trl torchvision==0.28.0
    export PYTHONPATH=$PWD/.matrix/.venv-trl:$PWD/tests/matrix/site
    .venv-trl/bin/python -m pytest tests/real/trl/test_images.py
"""

from __future__ import annotations

import pytest

from swift_lora_fix.proof.gate import MEDIA_ALLOWED
from swift_lora_fix.proof.verdict import ALLOWED
from tests.support.trl_driver import CHECKPOINT_STEP, Run

from .conftest import HAS_VISION, IMAGES, STEPS, Runs

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not HAS_VISION, reason="image processors need torchvision: see the head of test_images.py"),
]
both = pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.needs(name)) for name in IMAGES])


@both
def test_the_engine_serves_the_policy_on_questions_about_an_image_too(run: Run, name: str) -> None:
    assert run.returncode == 0, run.log[-3000:]
    probes, metrics = run.probes(), run.metrics()
    first = CHECKPOINT_STEP if "resumed" in name else 0
    assert [probe["step"] for probe in probes] == list(range(first, STEPS))
    for probe, line in zip(probes, metrics, strict=True):
        noise = line["lora_sync/noise"]
        assert 0 < noise < 0.05 and line["lora_sync/agrees"] == 1 and line["lora_sync/ratio"] < ALLOWED
        assert probe["mean"] < 5 * noise and probe["image_mean"] < 5 * noise, (probe, line)
        assert probe["image_other"] > 5 * probe["image_mean"], "another image is another answer"
        if probe["step"]:
            assert min(probe["effect"], probe["image_effect"]) > 20 * noise
        assert not any(probe[what] for what in ("base_changed", "lora_changed", "merges")), probe


@both
def test_the_gate_asks_about_an_image_of_the_rollout(run: Run, name: str) -> None:
    probes, metrics = run.probes(), run.metrics()
    ratios = [line.get("lora_sync/media_ratio") for line in metrics]
    for probe, ratio in zip(probes, ratios, strict=True):
        assert ratio is None or (probe["images"] and ratio < MEDIA_ALLOWED)
    # the tiny model says the image's own token one time in 500, and then no forward takes its answer
    failed = run.log.count("the probe with media prompts failed")
    assert failed == run.log.count("ValueError: Image features and image tokens do not match")
    asked = sum(bool(probe["images"]) for probe in probes)
    assert asked == sum(ratio is not None for ratio in ratios) + failed and failed < asked
    assert "engine and trainer agree on media prompts at step" in run.log


@both
def test_rollouts_about_another_prompt_than_the_trainers_are_told(run: Run, name: str) -> None:
    """TRL 1.16 gives vLLM placeholders that are expanded already: vLLM expands the first of them once more."""
    probes, metrics = run.probes(), run.metrics()
    assert {bool(probe["longer"]) for probe in probes} == {True, False}
    assert run.log.count("(https://github.com/huggingface/trl/issues/6294)") == 1
    for probe, line in zip(probes, metrics, strict=True):
        assert bool(probe["longer"]) == bool(probe["images"])
        theirs = line["sampling/sampling_logp_difference/mean"]
        assert line["lora_sync/batch_mean"] == pytest.approx(theirs, rel=1e-3)
        far = f"step {probe['step']}: the gate found the engine sound, but the rollouts are farther" in run.log
        assert far == bool(probe["longer"]) == (theirs > 5 * line["lora_sync/noise"]), (probe, line)


@pytest.mark.needs(*IMAGES)
def test_a_resume_is_compared_with_its_file(runs: Runs) -> None:
    run, checkpoint = runs.get("adapter_images_resumed"), runs.get("images").checkpoint()
    assert f"{checkpoint} at step {CHECKPOINT_STEP}, SHA-256 " in run.log
    assert ", the trainer's tensors equal the file's" in run.log
    assert "= trainer = engine's LoRA slots" in run.log
