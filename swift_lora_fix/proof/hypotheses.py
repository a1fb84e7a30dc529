"""Robust statistics on the gaps of a probe: heavy-tailed noise, and a limit on what one token may say for a hypothesis.

The noise model. Each token's noise is normal with its own variance, and these variances follow a scaled inverse
chi-square distribution with ``DEGREES`` degrees of freedom. Then the gaps follow Student's t (Gelman et al., Bayesian
Data Analysis, section 3.2). One measurement n of a token's noise informs about its variance: given n, the gap is again
Student's t, with one more degree of freedom and the squared scale (DEGREES * scale^2 + n^2) / (DEGREES + 1). So tokens
whose logprob changes when the trainer merely computes it again count for less.

The weight of a hypothesis is Huber's censored likelihood ratio (A robust version of the probability ratio test, Annals
of Mathematical Statistics 36, 1965): each token's log likelihood ratio, cut at +-``CENSOR``, summed. This is the
minimax test if any share of the tokens may come from elsewhere.

The slope of (engine - policy) on (hypothesis - policy) is biased: the policy's own rounding is on both sides. Where the
adapter's effect is about as large as the noise, that bends the slope from 0 towards 1 (on a sound SmolLM2, to 0.44 of
the way to the policy before). So the way to the hypothesis is measured a second time from the shaken policy, whose
rounding is independent: an instrument (Durbin, Errors in variables, 1954). What both ways have in common is also the
part of a hypothesis that is more than noise.

Nothing here needs torch or numpy: a probe has some tens of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

DEGREES = 3.0
CENSOR = 1.0  # nats a token
LEVERAGE = 3.0  # in a slope, a token's way counts up to this many times the median way
ROUNDS = 60


@dataclass(frozen=True)
class Student:
    """ratio: scale of Student's t fitted to gaps, in units of their noise. error: standard error of its logarithm."""

    ratio: float
    error: float


@dataclass(frozen=True)
class Estimate:
    """One hypothesis against this policy; see ``verdict.Hypothesis``.

    ratio: the engine's distance to the hypothesis, in units of noise. gain: the weight a token that an engine with
        exactly this policy would give. weights, slopes: from each prompt's tokens alone."""

    weight: float
    slope: float
    error: float
    mean: float
    ratio: float
    gain: float
    weights: tuple[float, ...] = ()
    slopes: tuple[float, ...] = ()


@dataclass(frozen=True)
class Noise:
    """scales: of each token's noise, in nats."""

    scales: tuple[float, ...]

    @classmethod
    def of(cls, again: Sequence[float], least: float) -> Noise:
        """From one measurement of each token's noise. least: the smallest scale allowed, in nats."""
        scale = max(scale_of(again, DEGREES), least)
        return cls(tuple(math.sqrt((DEGREES * scale**2 + n**2) / (DEGREES + 1)) for n in again))

    def fit(self, gaps: Sequence[float], scales: Sequence[float]) -> Student:
        degrees = DEGREES + 1
        ratio = scale_of([gap / scale for gap, scale in zip(gaps, scales)], degrees)
        # Fisher information of the log scale of Student's t: 2 v / (v + 3) a token
        return Student(ratio, math.sqrt((degrees + 3) / (2 * degrees * len(gaps))))


def scale_of(values: Sequence[float], degrees: float) -> float:
    """Maximum likelihood scale of Student's t around 0, by expectation maximisation."""
    squares = [value * value for value in values]
    squared = sorted(squares)[len(squares) // 2] or sum(squares) / len(squares)
    for _ in range(ROUNDS):
        if squared <= 0:
            return 0.0
        after = sum((degrees + 1) * square / (degrees + square / squared) for square in squares) / len(squares)
        if abs(after - squared) <= 1e-6 * squared:
            break
        squared = after
    return math.sqrt(squared)


def weigh(
    noise: Noise,
    gaps: Sequence[float],
    scales: Sequence[float],
    ways: Sequence[float],
    again: Sequence[float],
    extra: Sequence[float],
    spans: Sequence[slice],
) -> Estimate:
    """Weigh one hypothesis. All arguments in nats, one value a token.

    gaps: engine - this policy. ways: hypothesis - this policy. again: hypothesis - the shaken policy. scales: of the
        noise. extra: how far off the hypothesis itself may be. spans: the tokens of each prompt."""
    degrees = DEGREES + 1
    wider = [math.sqrt(scale**2 + more**2) for scale, more in zip(scales, extra)]
    left = [gap - way for gap, way in zip(gaps, ways)]
    here, there = noise.fit(gaps, scales).ratio, noise.fit(left, wider).ratio
    # widen the noise until the better of the two fits: if it were too narrow, every outlier would seem decisive
    factor = max(1.0, min(here, there))
    share = math.sqrt(meant(ways, again, scales))
    parts, gain = [], 0.0
    for gap, rest, way, scale, wide in zip(gaps, left, ways, scales, wider):
        scale, wide = factor * scale, factor * wide
        parts.append(_cut(_log(gap / scale, degrees) - _log(rest / wide, degrees) + math.log(wide / scale)))
        gain += _cut(-_log(share * way / wide, degrees))
    slope, error, slopes = slope_of(gaps, ways, again, [max(here, 1e-9) * scale for scale in scales], degrees, spans)
    weights = tuple(sum(parts[span]) for span in spans)
    mean = sum(map(abs, left)) / len(left)
    return Estimate(sum(parts), slope, error, mean, there, gain / len(gaps), weights, slopes)


def meant(ways: Sequence[float], again: Sequence[float], scales: Sequence[float]) -> float:
    """The share, 0 to 1, of the ways' squares that is not rounding at either end."""
    cap = _cap(ways, scales)
    first = [max(-cap, min(cap, way / scale)) for way, scale in zip(ways, scales)]
    second = [max(-cap, min(cap, way / scale)) for way, scale in zip(again, scales)]
    whole = sum(a * a for a in first)
    common = sum(a * b for a, b in zip(first, second)) / whole if whole else 0.0
    return min(1.0, max(0.0, 2 * common - 1))  # the rest is the rounding of one end, and the other end has as much


def _cap(ways: Sequence[float], scales: Sequence[float]) -> float:
    sizes = sorted(abs(way) / scale for way, scale in zip(ways, scales))
    return LEVERAGE * sizes[len(sizes) // 2]


def slope_of(
    gaps: Sequence[float],
    ways: Sequence[float],
    again: Sequence[float],
    scales: Sequence[float],
    degrees: float,
    spans: Sequence[slice],
) -> tuple[float, float, tuple[float, ...]]:
    """Robust slope of gaps on ways through the origin, with ``again`` as the instrument; its sandwich standard error,
    as if tokens were independent; each prompt's slope alone, with the same weights. NaN when there is no way.

    An M-estimate with Student weights on the gaps and Mallows weights on the ways. It is started from 0 and from 1, and
    the better fit is kept."""
    none = (math.nan, math.nan, (math.nan,) * len(spans))
    cap = _cap(again, scales)
    if cap <= 0:
        return none
    pulls = [way / scale**2 * min(1.0, cap * scale / abs(way)) if way else 0.0 for way, scale in zip(again, scales)]
    best: tuple[float, tuple[float, float, tuple[float, ...]]] = (math.inf, none)
    for slope in (0.0, 1.0):
        tops, bottoms = [0.0], [0.0]
        for _ in range(ROUNDS):
            before = slope
            trusts = [(degrees + 1) / (degrees + ((g - slope * w) / s) ** 2) for g, w, s in zip(gaps, ways, scales)]
            tops = [trust * pull * gap for trust, pull, gap in zip(trusts, pulls, gaps)]
            bottoms = [trust * pull * way for trust, pull, way in zip(trusts, pulls, ways)]
            if sum(bottoms) <= 0:
                break
            slope = sum(tops) / sum(bottoms)
            if abs(slope - before) < 1e-6:
                break
        if sum(bottoms) <= 0:
            continue
        misfit = -sum(_log((gap - slope * way) / scale, degrees) for gap, way, scale in zip(gaps, ways, scales))
        if misfit < best[0]:
            meat = sum((top - slope * bottom) ** 2 for top, bottom in zip(tops, bottoms))
            error = math.sqrt(meat * len(gaps) / max(1, len(gaps) - 1)) / sum(bottoms)
            sums = [(sum(tops[span]), sum(bottoms[span])) for span in spans]
            best = misfit, (slope, error, tuple(top / bottom if bottom > 0 else math.nan for top, bottom in sums))
    return best[1]


def _log(value: float, degrees: float) -> float:
    """Log density of Student's t, up to a constant."""
    return -(degrees + 1) / 2 * math.log1p(value * value / degrees)


def _cut(value: float) -> float:
    return min(CENSOR, max(-CENSOR, value))
