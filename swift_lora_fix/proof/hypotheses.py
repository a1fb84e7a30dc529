"""Robust arithmetic on the gaps of a probe: a heavy-tailed noise, and how much a token may say for a hypothesis.

The noise model. A token's noise is normal with a variance of its own, and these variances are spread like a scaled
inverse chi-square with ``DEGREES`` degrees of freedom. Then the gaps are Student's t (Gelman et al., Bayesian Data
Analysis, section 3.2), and one look at a token's noise, n, tells of its variance: given n, its gap is again Student's
t, with one degree more and the squared scale (DEGREES * scale^2 + n^2) / (DEGREES + 1). So tokens whose logprob moves
by itself when the trainer computes it once more count for less.

The weight of a hypothesis is Huber's censored likelihood ratio (A robust version of the probability ratio test, Annals
of Mathematical Statistics 36, 1965): the log likelihood ratio of each token, cut at +-``CENSOR``. It is the minimax
test where any share of the tokens may come from elsewhere. Nothing here needs torch or numpy: a probe has some tens of
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

DEGREES = 3.0
CENSOR = 1.0  # nats a token
LEVERAGE = 3.0  # in a slope, a token counts for its way up to this many times the median of all ways
ROUNDS = 60


@dataclass(frozen=True)
class Student:
    """ratio: scale of a Student distribution fitted to gaps, in units of their noise. error: standard error of its log.
    """

    ratio: float
    error: float


@dataclass(frozen=True)
class Estimate:
    """Of a hypothesis against this policy: see ``verdict.Hypothesis``. ratio: of the engine's distance to the
    hypothesis, in units of noise. gain: the weight a token that an engine that says exactly this policy would give.
    weights, slopes: of each prompt's tokens alone."""

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
        """From one look at the noise of each token; ``least``: the smallest scale, in nats."""
        scale = max(scale_of(again, DEGREES), least)
        return cls(tuple(math.sqrt((DEGREES * scale**2 + n**2) / (DEGREES + 1)) for n in again))

    def fit(self, gaps: Sequence[float], scales: Sequence[float]) -> Student:
        degrees = DEGREES + 1
        ratio = scale_of([gap / scale for gap, scale in zip(gaps, scales)], degrees)
        # Fisher's information of the log scale of Student's t is 2 v / (v + 3) a token
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
    extra: Sequence[float],
    spans: Sequence[slice],
) -> Estimate:
    """gaps: engine - this policy. ways: hypothesis - this policy. scales: of the noise. extra: by how much the
    hypothesis itself may be off. All in nats, one a token. spans: the tokens of each prompt."""
    degrees = DEGREES + 1
    wider = [math.sqrt(scale**2 + more**2) for scale, more in zip(scales, extra)]
    left = [gap - way for gap, way in zip(gaps, ways)]
    here, there = noise.fit(gaps, scales).ratio, noise.fit(left, wider).ratio
    # as wide as the better of the two needs it: with too narrow a noise every wild token would be certain
    factor = max(1.0, min(here, there))
    parts, gain = [], 0.0
    for gap, rest, way, scale, wide in zip(gaps, left, ways, scales, wider):
        scale, wide = factor * scale, factor * wide
        parts.append(_cut(_log(gap / scale, degrees) - _log(rest / wide, degrees) + math.log(wide / scale)))
        gain += _cut(-_log(way / wide, degrees) + math.log(wide / scale))
    slope, error, slopes = slope_of(gaps, ways, [max(here, 1e-9) * scale for scale in scales], degrees, spans)
    weights = tuple(sum(parts[span]) for span in spans)
    mean = sum(map(abs, left)) / len(left)
    return Estimate(sum(parts), slope, error, mean, there, gain / len(gaps), weights, slopes)


def slope_of(
    gaps: Sequence[float], ways: Sequence[float], scales: Sequence[float], degrees: float, spans: Sequence[slice]
) -> tuple[float, float, tuple[float, ...]]:
    """Robust slope of gaps on ways through the origin, its sandwich standard error (Huber 1967, the tokens as if
    independent), and the slope of each prompt alone with the same weights; NaN where all ways are 0.

    An M-estimate with Student's weights in the gaps, which start from the weighted median of gap / way, and Mallows'
    weights in the ways."""
    sizes = sorted(abs(way) / scale for way, scale in zip(ways, scales))
    cap = LEVERAGE * sizes[len(sizes) // 2]
    if cap <= 0:
        return math.nan, math.nan, (math.nan,) * len(spans)
    pulls = [way / scale**2 * min(1.0, cap * scale / abs(way)) if way else 0.0 for way, scale in zip(ways, scales)]
    ratios = sorted((gap / way, pull * way) for gap, way, pull in zip(gaps, ways, pulls) if way)
    half, passed, slope = sum(weight for _, weight in ratios) / 2, 0.0, 0.0
    for slope, weight in ratios:  # noqa: B007  the weighted median
        passed += weight
        if passed >= half:
            break
    tops: list[float] = []
    bottoms: list[float] = []
    for _ in range(ROUNDS):
        before = slope
        trusts = [(degrees + 1) / (degrees + ((g - slope * w) / s) ** 2) for g, w, s in zip(gaps, ways, scales)]
        tops = [trust * pull * gap for trust, pull, gap in zip(trusts, pulls, gaps)]
        bottoms = [trust * pull * way for trust, pull, way in zip(trusts, pulls, ways)]
        slope = sum(tops) / sum(bottoms)
        if abs(slope - before) < 1e-7:
            break
    meat = sum((top - slope * bottom) ** 2 for top, bottom in zip(tops, bottoms))
    alone = tuple(sum(tops[span]) / (sum(bottoms[span]) or math.nan) for span in spans)
    return slope, math.sqrt(meat * len(gaps) / max(1, len(gaps) - 1)) / sum(bottoms), alone


def _log(value: float, degrees: float) -> float:
    """Log density of Student's t, but for a constant."""
    return -(degrees + 1) / 2 * math.log1p(value * value / degrees)


def _cut(value: float) -> float:
    return min(CENSOR, max(-CENSOR, value))
