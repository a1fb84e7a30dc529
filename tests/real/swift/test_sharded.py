"""Two ranks under ZeRO-3 and FSDP2: neither holds a whole adapter, both engines serve one, nothing else is gathered."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.support import bounds, premises
from tests.support.driver import Run

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="in the newest environment, which has DeepSpeed"),
]


def sharded(test):  # type: ignore[no-untyped-def]
    runs = [pytest.param(name, marks=pytest.mark.needs(name)) for name in ("zero3_fixed", "fsdp2_fixed")]
    return pytest.mark.parametrize("name", runs)(test)


@sharded
def test_both_engines_serve_the_policy_at_every_batch(run: Run, name: str) -> None:
    assert run.returncode == 0
    for rank in (0, 1):
        first, *later = run.probes(rank)
        assert [probe["step"] for probe in (first, *later)] == [0, 1, 2, 3]
        premises.plain_base(first)
        assert bounds.is_floor(first)
        premises.large_lora(later, first["mean"])
        for probe in later:
            assert bounds.agrees(probe, first), probe


@sharded
def test_both_slots_hold_the_same_bits_and_follow_the_training(run: Run, name: str) -> None:
    slots = [[probe["slots"] for probe in run.probes(rank)] for rank in (0, 1)]
    assert slots[0] == slots[1] and len(set(slots[0])) == 4


@sharded
def test_the_trainer_is_only_read(run: Run, name: str) -> None:
    for rank in (0, 1):
        assert all(bounds.only_read(probe) for probe in run.probes(rank))


@sharded
def test_only_the_adapter_is_gathered_after_the_first_sync(run: Run, name: str) -> None:
    for rank in (0, 1):
        first, *later = run.probes(rank)
        assert first["gathered"] >= first["model_elements"] > 10 * first["lora_elements"], "the base, once"
        parted = first["lora_elements"] - first["lora_persistent"]
        assert {probe["gathered"] for probe in later} == {parted} and parted > 0


@sharded
def test_the_adapter_goes_straight_into_the_slots(run: Run, name: str) -> None:
    for rank in (0, 1):
        assert {probe["loader_calls"] for probe in run.probes(rank)} == {1}, "once, to learn from"
    assert "goes straight into vLLM's LoRA slots" in run.log
    assert "vLLM's own loader for the rest" not in run.log and "parameters unwritten" not in run.log
