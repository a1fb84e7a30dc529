"""The verdict's arithmetic on made-up probes and on gaps recorded from real engines."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from bench import simulate_verdict as simulate
from swift_lora_fix.proof.verdict import BUDGET, KEPT, RESET, Evidence, Floor, Verdict, judge, judge_floor

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
    assert "slope 1.0" in str(verdict) and not verdict.reservation


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
    assert judge_floor(plain(shift=0.05))[0] == "noisy"
    assert judge_floor(plain(shift=0.3))[0] == "disagrees"
    assert judge_floor(replace(plain(), engine=(math.nan,) * TOKENS))[0] == "disagrees"


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="engine 64"):
        replace(probe(1), base=(0.0,))
    with pytest.raises(ValueError, match="begins"):
        judge([probe(1, asked=KEPT)], plain())


# --- gaps recorded from real engines: bench/record_gaps.py

RUNS = {(run.name, run.fault): run for run in simulate.load()}
POLICIES = sorted({name for name, _ in RUNS})


def of(*faults: str) -> pytest.MarkDecorator:
    """Every recorded run with one of these faults."""
    runs = [run for run in RUNS.values() if run.fault in faults]
    return pytest.mark.parametrize("run", runs, ids=[f"{run.name} {run.fault}" for run in runs])


def examined(run: simulate.Run, start: int = 0) -> Verdict:
    """An examination to its end, 4 recorded prompts a probe from ``start`` on."""
    floor = simulate.floor_of(run, range(8))
    asked: list[Evidence] = []
    while not asked or (verdict := judge(asked, floor)).is_unsure:
        first = start + 4 * len(asked)
        asked.append(simulate.evidence(run, [(first + i) % run.prompts for i in range(4)]))
    return verdict


def moved_by(run: simulate.Run) -> float:
    """By how many noise floors of a sound engine the fault moves the mean."""
    sound = RUNS[run.name, "none"]
    return (run.mean("e") - sound.mean("e")) / float(np.abs(sound.floor["e"] - sound.floor["p"]).mean())


def test_what_is_recorded() -> None:
    tiny = {"qwen2 tiny", "qwen2 small", "qwen2 large", "qwen2 large fused", "qwen2 confident", "qwen2 confident fused"}
    experts = {f"qwen2_moe {policy} fused" for policy in ("small", "large", "confident")}
    assert set(POLICIES) == tiny | experts | {"smollm2 small", "smollm2 confident"}


@of("none")
def test_sound_engines_agree_on_every_recorded_prompt(run: simulate.Run) -> None:
    assert judge_floor(simulate.floor_of(run, range(len(run.floor["p"]))))[0] == "agrees"
    for start in range(0, run.prompts, 4):
        verdict = examined(run, start)
        assert verdict.agrees and verdict.is_distinguishable, (start, str(verdict))


@of("double-count", "not-applied", "stale")
def test_recorded_faults_that_the_trainer_can_compute_are_named(run: simulate.Run) -> None:
    verdict = examined(run)
    if run.fault == "stale" and not verdict.disagrees:
        assert "stale" in verdict.near and moved_by(run) < 0.5, "the policy before is as good as this one"
    else:
        assert verdict.disagrees and verdict.cause == run.fault, str(verdict)


@of("module-doubled", "scaling-1.5", "another-model", "stale-cache")
def test_other_recorded_faults_are_found_where_they_move_the_mean_by_three_floors(run: simulate.Run) -> None:
    verdict = examined(run)
    if moved_by(run) > 3:
        assert verdict.disagrees and verdict.cause in ("unknown", "double-count", "stale"), str(verdict)


def test_a_double_count_on_a_trained_model_is_found_where_four_floors_are_too_many() -> None:
    run = RUNS["smollm2 small", "double-count"]
    verdict = examined(run)
    allowed_before = simulate.OLD_FLOORS * verdict.floor.mean
    assert verdict.cause == "double-count" and verdict.distance.mean < allowed_before, str(verdict)


def test_a_cache_that_was_not_reset_is_named() -> None:
    stale, sound = RUNS["qwen2 large", "stale-cache"], RUNS["qwen2 large", "none"]
    floor = simulate.floor_of(sound, range(8))
    asked = [simulate.evidence(stale, range(4)), simulate.evidence(sound, range(4, 8))]
    assert judge(asked, floor).ask == KEPT
    asked.append(simulate.evidence(stale, range(4), asked=KEPT))
    assert judge(asked, floor).ask == RESET
    verdict = judge([*asked, simulate.evidence(sound, range(4), asked=RESET)], floor)
    assert verdict.disagrees and verdict.cause == "stale-cache"


@of("base-ulp")
def test_one_bit_of_the_base_is_below_what_logprobs_show(run: simulate.Run) -> None:
    assert examined(run).agrees and judge_floor(simulate.floor_of(run, range(run.prompts)))[0] == "agrees"


@of("another-model", "base-bent")
def test_a_fault_that_the_floor_and_the_match_share_is_found_in_the_floor(run: simulate.Run) -> None:
    outcome, ratio = judge_floor(simulate.floor_of(run, range(run.prompts)))
    _, sound = judge_floor(simulate.floor_of(RUNS[run.name, "none"], range(run.prompts)))
    assert outcome == "disagrees" if ratio > 3 * sound else outcome != "agrees" or ratio < 2 * sound, (ratio, sound)


def test_a_token_as_wild_as_the_one_that_stopped_a_sound_run_stops_nothing() -> None:
    run = RUNS["qwen2 confident", "none"]
    wild = np.zeros((4, 16))
    wild[2, 5] = 2.57
    verdict = judge([simulate.evidence(run, range(4), wild)], simulate.floor_of(run, range(8)))
    assert verdict.agrees and verdict.distance.max > 2.5 and "slope 1.0" in str(verdict)


@pytest.mark.parametrize("kind", ["recorded", "wild", "flips"])
def test_no_false_alarm_in_a_small_simulation(kind: str) -> None:
    simulation = simulate.Simulation(seed=3)
    for policy in POLICIES:
        found = simulation.alarms(RUNS[policy, "none"], kind, 40 if kind == "flips" else 400)
        assert found["alarms"] == 0, (policy, found)


def test_the_simulations_arithmetic_is_the_packages() -> None:
    simulate.check(list(RUNS.values())[::7], simulate.Simulation(seed=5), 8)
