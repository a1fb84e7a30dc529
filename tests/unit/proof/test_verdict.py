"""The verdict's arithmetic on made-up probes and on gaps recorded from real engines."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from swift_lora_fix.proof.verdict import BUDGET, KEPT, RESET, Evidence, Floor, judge, judge_floor

TOKENS = 64


def probe(seed: int, served: float = 1.0, effect: float = 0.2, noise: float = 0.01, asked: str = "") -> Evidence:
    """An engine that serves so many times the adapter, whose effect is ``effect`` nats."""
    draw = random.Random(seed)
    policy = [draw.gauss(-2, 1) for _ in range(TOKENS)]
    moved = [draw.gauss(0, effect) for _ in range(TOKENS)]

    def heavy() -> float:
        return draw.gauss(0, noise) * math.sqrt(3 / draw.gammavariate(1.5, 2))

    made = Evidence(
        engine=tuple(p + (served - 1) * m + heavy() for p, m in zip(policy, moved)),
        policy=tuple(policy),
        base=tuple(p - m for p, m in zip(policy, moved)),
        double=tuple(p + m for p, m in zip(policy, moved)),
        shaken=tuple(p + heavy() for p in policy),
        lengths=(16,) * 4,
    )
    return replace(made, asked=asked) if asked else made


def plain(noise: float = 0.01, engine: float = 0.01, shift: float = 0.0) -> Floor:
    draw = random.Random(99)
    base = [draw.gauss(-2, 1) for _ in range(TOKENS)]
    return Floor(
        tuple(b + draw.gauss(0, engine) + draw.gauss(0, shift) for b in base),
        tuple(base),
        tuple(b + draw.gauss(0, noise) for b in base),
    )


def test_a_sound_engine_is_told_from_everything_else_by_one_probe() -> None:
    verdict = judge([probe(1)], plain())
    assert verdict.agrees and not verdict.is_unsure and verdict.is_distinguishable and not verdict.reservation
    assert "the engine serves this policy; slope 1.0" in str(verdict)


@pytest.mark.parametrize("served, cause", [(2.0, "double-count"), (0.0, "not-applied"), (1.5, "unknown")])
def test_a_fault_is_named_once_a_second_probe_repeats_it(served: float, cause: str) -> None:
    first = judge([probe(1, served)], plain())
    assert first.is_unsure and first.cause == cause
    second = judge([probe(1, served), probe(2, served)], plain())
    assert second.disagrees and second.cause == cause, str(second)


def test_what_does_not_repeat_is_no_disagreement() -> None:
    asked = [probe(1, 2.0), probe(2)]
    assert judge(asked, plain()).ask == KEPT
    asked.append(probe(1, 1.0, asked=KEPT))  # not deterministic, not cached
    asked += [probe(seed) for seed in range(3, 7)]
    verdict = judge(asked, plain())
    assert not verdict.disagrees


def test_a_stale_cache_is_what_a_reset_mends_and_nothing_else_does() -> None:
    asked = [probe(1, 2.0), probe(2), probe(1, 2.0, asked=KEPT)]
    assert judge(asked, plain()).ask == RESET
    assert judge([*asked, probe(1, 1.0, asked=RESET)], plain()).cause == "stale-cache"
    assert not judge([*asked, probe(1, 2.0, asked=RESET)], plain()).disagrees


def test_an_adapter_within_the_noise_is_accepted_with_a_reservation() -> None:
    verdict = judge([probe(1, effect=0.0005)], plain())
    assert verdict.agrees and not verdict.is_distinguishable and not verdict.ask
    assert verdict.reservation == " (not distinguishable yet from the plain base and twice the adapter)"


def test_a_small_adapter_needs_more_probes() -> None:
    asked = [probe(1, effect=0.01)]
    while judge(asked, plain()).is_unsure and len(asked) < BUDGET:
        asked.append(probe(len(asked) + 1, effect=0.01))
    assert 1 < len(asked) <= BUDGET and judge(asked, plain()).is_distinguishable


def test_a_single_wild_token_decides_nothing() -> None:
    good = probe(1)
    wild = replace(good, engine=(good.engine[0] + 2.57, *good.engine[1:]))
    assert judge([wild], plain()).agrees


@pytest.mark.parametrize("side", ["engine", "trainer"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_a_side(side: str, value: float) -> None:
    good = probe(1)
    name = {"engine": "engine", "trainer": "policy"}[side]
    bad = replace(good, **{name: (value, *getattr(good, name)[1:])})
    verdict = judge([bad], plain())
    assert verdict.disagrees and verdict.cause == f"{side}-not-finite" and str(verdict)


def test_a_floor_must_be_explained_by_the_trainers_own_noise() -> None:
    assert judge_floor(plain())[0] == "agrees"
    assert judge_floor(plain(shift=0.05))[0] == "disagrees"
    assert judge_floor(replace(plain(), engine=(math.nan,) * TOKENS))[0] == "disagrees"


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="engine 64"):
        replace(probe(1), base=(0.0,))
    with pytest.raises(ValueError, match="begins"):
        judge([probe(1, asked=KEPT)], plain())
