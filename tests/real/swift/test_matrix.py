"""One cell of each class of the matrix (tests/matrix, scripts/matrix): trained, interrupted, resumed, and judged."""

from __future__ import annotations

import importlib.util

import pytest

from swift_lora_fix.install import releases

from .conftest import FAMILY, Runs

pytestmark = pytest.mark.e2e
NEWEST = FAMILY is not None and FAMILY.last == releases.NEWEST_KNOWN


@pytest.mark.needs("cell_rank")
def test_a_rank_that_vllm_does_not_take(runs: Runs) -> None:
    record = runs.get("cell_rank").record  # type: ignore[attr-defined]
    assert record["outcome"] == "passed", record
    assert record["mode"] == "adapter" and [sync["step"] for sync in record["syncs"]] == [0, 1, 2, 3]


@pytest.mark.needs("cell_rank_by_pattern")
def test_a_rank_above_the_one_that_was_asked_for(runs: Runs) -> None:
    """``rank_pattern`` gives one module rank 12, and ``--lora_rank`` is left at 8."""
    record = runs.get("cell_rank_by_pattern").record  # type: ignore[attr-defined]
    assert record["outcome"] == "passed", record
    assert record["mode"] == "adapter" and [sync["step"] for sync in record["syncs"]] == [0, 1, 2, 3]


@pytest.mark.skipif(not NEWEST, reason="transformers stacks experts from 5 on")
@pytest.mark.needs("cell_experts")
def test_stacked_experts_are_folded(runs: Runs) -> None:
    record = runs.get("cell_experts").record  # type: ignore[attr-defined]
    assert record["outcome"] == "passed", record


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="image processors need torchvision")
@pytest.mark.needs("cell_towers")
def test_a_lora_in_the_vision_tower_is_served_by_vllms_own_layers(runs: Runs) -> None:
    record = runs.get("cell_towers").record  # type: ignore[attr-defined]
    assert record["outcome"] == "passed", record
    assert record["mode"] == "adapter"
    for sync in record["syncs"][1:]:
        assert sync["media"]["mean"] < sync["media"]["without_towers"] / 4, "a tower without its LoRA would be seen"
