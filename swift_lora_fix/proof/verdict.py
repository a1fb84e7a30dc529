"""Which policy does the engine serve? The statistics of a proof, without torch: numbers in, a verdict out.

One examination is one or more probes. Each token of a probe has the engine's logprob, and the trainer's logprob of the
same token under several hypotheses: this policy, the plain base, twice the adapter, and the policy before if it is
known (``hypotheses.py`` weighs them). The trainer also scores it once more with each layer's output shaken by a
rounding step of the compute dtype: that shows what numerics alone may change. No fault of the engine can raise this
noise. It grows with the adapter, as the engine's own rounding does, and it is largest at the tokens where a sound
engine is furthest off (a confident adapter; an expert router near its threshold).

How it is decided. All numbers are recorded in bench/recorded_gaps, and bench/simulate_verdict.py shows them:

- fit: the engine may be ``ALLOWED`` times as far from this policy as the noise explains. The scale is that of a Student
  distribution, which outliers do not move.
- hypotheses: Huber's censored likelihood ratio. Each token counts at most 1 nat for or against, so that a few outliers
  decide nothing. ``DECISIVE`` nats decide.
- slope: where the engine stands on the way from this policy to another. Partial faults (one module counted twice,
  another scaling) move the slope even if they do not move the fit.
- floor: on the plain base, the trainer's own noise must explain the distance between engine and trainer. Up to
  ``FLOOR_ALLOWED`` times it does; from ``FLOOR_WRONG`` on no rounding explains it.
- repetition: a disagreement counts only with a second probe, of other prompts, and if ``SHARE`` of all prompts show it,
  each by itself. Tokens of one prompt are not independent: an expert router that flips moves all that follow.

Prompts of a special kind (longer than a kernel's tile, with images) need an examination of their own: among other
prompts, a fault that only they show would be in the minority.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .hypotheses import Estimate, Noise, weigh

MINIMUM_FLOOR = 1e-5  # nats; float32's own rounding of a logprob, when both sides compute alike

LARGEST_GAP = 50.0  # nats; larger ones are cut before exp()
ALLOWED = 2.0  # times what the noise explains, see above
DECISIVE = 12.0  # nats of evidence between two hypotheses: odds of 160,000 to 1
PART = 0.15  # of the way to another hypothesis; a sound engine's rounding does not go that far
SHARE = 2 / 3  # of the prompts must each show what is concluded from all
ERRORS = 4.0  # standard errors by which a fit or a slope must exceed its bound
FLOOR_ALLOWED = 1.5  # times the trainer's own shaken noise, between the engine's base and the trainer's
FLOOR_WRONG = 5.0  # times: more than any kernel's rounding; between the two bounds the engine is only noisy
BUDGET = 6  # probes with other prompts in one examination, before the question stays open

OTHER, KEPT, RESET = "other prompts", "the first prompts again", "the first prompts again, caches reset"
NAMES = {"not-applied": "the plain base", "double-count": "twice the adapter", "stale": "the policy before"}


@dataclass(frozen=True)
class Distance:
    """|engine - trainer| over the probe's tokens, in nats: mean and maximum; kl is the k3 estimate of
    KL(engine || trainer), the mean of r - 1 - log r with r = p_trainer / p_engine
    (http://joschu.net/blog/kl-approx.html).
    """

    mean: float
    max: float
    kl: float


@dataclass(frozen=True)
class Floor:
    """The plain base on both sides: logprobs in nats, one a token.

    engine: the engine's without the adapter. base: the trainer's. shaken: the trainer's again, as in ``Evidence``.
    lengths: tokens of each prompt; empty: all belong to one prompt."""

    engine: tuple[float, ...]
    base: tuple[float, ...]
    shaken: tuple[float, ...]
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _same_length(self, ("base", "shaken"))


@dataclass(frozen=True)
class Evidence:
    """One probe: logprobs in nats of the tokens that the engine chose, one a token. Raises ValueError when the columns
    differ in length or are empty.

    engine: the engine's own.
    policy: the trainer's with this policy; in fused mode with the weights as the engine rounds them.
    base, double, previous: the trainer's with the plain base, twice the adapter, the policy before (None: unknown).
    shaken: like ``policy``, but each layer's output x becomes x * (1 + u * step), rounded to its dtype; u is random in
        [-1, 1], step is the rounding step of the trainer's or the engine's dtype, the coarser (bf16: 2^-8, fp16:
        2^-11).
    exact: in fused mode the trainer's with base and adapter apart, unrounded. It shows what the rounding moves, and how
        far off ``double`` and ``previous`` may be, which are not rounded.
    lengths: tokens of each prompt, in order; empty: all belong to one prompt.
    asked: OTHER for prompts that are new in this examination (the first probe too); KEPT, RESET for the first probe's
        prompts again, without or with a reset of the engine's caches.
    """

    engine: tuple[float, ...]
    policy: tuple[float, ...]
    base: tuple[float, ...]
    double: tuple[float, ...]
    shaken: tuple[float, ...]
    previous: tuple[float, ...] | None = None
    exact: tuple[float, ...] | None = None
    lengths: tuple[int, ...] = ()
    asked: str = OTHER

    def __post_init__(self) -> None:
        _same_length(self, ("policy", "base", "double", "shaken", "previous", "exact"))

    @property
    def alternatives(self) -> dict[str, tuple[float, ...]]:
        """By cause: the trainer's logprobs under each fault that it can compute."""
        found = {"not-applied": self.base, "double-count": self.double}
        return found if self.previous is None else {**found, "stale": self.previous}


def _same_length(record: Floor | Evidence, names: Sequence[str]) -> None:
    size = len(record.engine)
    lengths = {name: len(getattr(record, name)) for name in names if getattr(record, name) is not None}
    if not size or any(length != size for length in lengths.values()):
        raise ValueError(f"a probe needs as many logprobs of each kind: engine {size}, {lengths}")
    if record.lengths and (sum(record.lengths) != size or min(record.lengths) < 1):
        raise ValueError(f"the prompts' lengths {record.lengths} are not those of {size} tokens")


def _spans(records: Sequence[Floor | Evidence]) -> list[slice]:
    """The span of each prompt in the concatenated tokens of all records."""
    found, start = [], 0
    for record in records:
        for length in record.lengths or (len(record.engine),):
            found.append(slice(start, start + length))
            start += length
    return found


@dataclass(frozen=True)
class Hypothesis:
    """The evidence about one policy that is not this one.

    cause: a key of ``causes.CAUSES``.
    weight: censored log likelihood ratio in nats, positive for this policy, negative when the engine is closer to the
        other. reach: the weight that an engine with exactly this policy would give in ``BUDGET`` probes.
    slope, error: where the engine stands on the way, 0 this policy and 1 the other, and its standard error (NaN when
    both
        are the same). mean: mean |logprob difference| engine - hypothesis, nats."""

    cause: str
    weight: float
    slope: float
    error: float
    mean: float
    reach: float

    @property
    def is_rejected(self) -> bool:
        return self.weight >= DECISIVE

    @property
    def can_be_told(self) -> bool:
        """Whether more probes could tell it from this policy."""
        return self.reach >= DECISIVE


@dataclass(frozen=True)
class Verdict:
    """One examination: all its probes with different prompts together.

    outcome: ``agrees``, ``disagrees`` or ``unsure`` (with an empty ``ask`` it stays open, which is only worth a
    warning).
    cause: with ``disagrees`` a key of ``causes.CAUSES``; with ``unsure`` what is suspected, or "".
    ask: what to ask next (OTHER, KEPT, RESET); "" when nothing would help.
    distance: to this policy (fused: as rounded). floor: the same on the plain base.
    control_base, control_double: mean |logprob difference| in nats to the trainer without and with twice the adapter.
    rounding: in fused mode the mean |difference| by which rounding the merged weights moves the trainer; otherwise 0.
    noise: mean |difference| in nats that rounding explains with this policy: the trainer's own, times ``engine_noise``.
    ratio, error: the engine's robust distance in units of that noise, and its relative standard error.
    engine_noise: this engine's noise in units of the trainer's own, measured on the plain base.
    allowed: the largest sound ratio. hypotheses: the alternatives. probes: those with different prompts.
    """

    outcome: str
    cause: str
    ask: str
    distance: Distance
    floor: Distance
    control_base: float
    control_double: float
    rounding: float = 0.0
    noise: float = math.nan
    ratio: float = math.nan
    error: float = math.nan
    engine_noise: float = math.nan
    allowed: float = ALLOWED
    hypotheses: tuple[Hypothesis, ...] = ()
    probes: int = 1
    note: str = ""

    @property
    def agrees(self) -> bool:
        return self.outcome == "agrees"

    @property
    def disagrees(self) -> bool:
        return self.outcome == "disagrees"

    @property
    def is_open(self) -> bool:
        return self.outcome == "unsure"

    @property
    def is_unsure(self) -> bool:
        """Whether asking ``ask`` could decide it."""
        return self.is_open and bool(self.ask)

    @property
    def near(self) -> tuple[str, ...]:
        """Causes that this examination does not rule out."""
        return tuple(hypothesis.cause for hypothesis in self.hypotheses if not hypothesis.is_rejected)

    @property
    def is_distinguishable(self) -> bool:
        """Whether the plain base and twice the adapter are ruled out. (The policy before may be nearly the same.)"""
        return bool(self.hypotheses) and not {"not-applied", "double-count"} & set(self.near)

    @property
    def reservation(self) -> str:
        """What a match does not rule out yet, in words; empty if nothing."""
        near = [NAMES[cause] for cause in self.near if cause != "stale"]
        return f" (not distinguishable yet from {' and '.join(near)})" if near else ""

    def __str__(self) -> str:
        parts = [*([] if self.agrees else [self._said()]), *self._slopes()]
        parts.append(
            f"mean |logprob difference| {self.distance.mean:.3g} (largest {self.distance.max:.3g}, KL "
            f"{self.distance.kl:.3g}), {self.ratio:.2g} times the noise of this policy's own numerics "
            f"({self.noise:.3g}; up to {self.allowed:g} times is sound)"
        )
        if self.rounding:
            parts.append(f"rounding the merged weights moves {self.rounding:.3g}")
        parts.append(f"to the plain base {self.control_base:.3g}, to twice the adapter {self.control_double:.3g}")
        return f"{'; '.join(parts)}; {self.probes} probe{'s' * (self.probes > 1)}{self.note and f' ({self.note})'}"

    def _said(self) -> str:
        if self.cause.endswith("not-finite"):
            return f"the {self.cause.split('-')[0]}'s logprobs are not finite [{self.cause}]"
        if self.disagrees:
            served = {**NAMES, "stale-cache": "cached keys and values of an earlier policy"}
            return f"the engine serves {served.get(self.cause, 'something else than this policy')} [{self.cause}]"
        suspected = f", suspected: {self.cause}" if self.cause else ""
        return f"not decided{suspected}{f', ask {self.ask}' if self.ask else ''}"

    def _slopes(self) -> list[str]:
        ways = [(h.cause, h.slope, h.error) for h in self.hypotheses if math.isfinite(h.slope) and h.can_be_told]
        found = []
        for cause, slope, error in ways:
            if cause == "not-applied":  # shown as the way from the plain base to this policy
                found.append(f"slope {1 - slope:.3f} +- {error:.3f} (plain base 0, this policy 1)")
            else:
                found.append(f"{slope:.3f} +- {error:.3f} of the way to {NAMES[cause]}")
        return found


def judge(evidence: Sequence[Evidence], floor: Floor, allowed: float = ALLOWED) -> Verdict:
    """The verdict of one examination so far.

    While ``is_unsure``, ask what ``ask`` says, append the probe and call again. That ends: after ``BUDGET`` probes of
    other prompts and one each of KEPT and RESET. ``disagrees`` needs a second probe that repeats it, or a reset of the
    caches that mends it; logprobs that are not finite need no repetition. Raises ValueError if the first is not OTHER.

    Args:
        evidence: probes in the order they were asked, the first one with ``asked=OTHER``.
        floor: of this engine's plain base; check it with ``judge_floor`` first. Here it only sets the factor, 0.5 to
            ``FLOOR_WRONG``, by which this engine's noise differs from the trainer's own.
        allowed: times what the noise explains, see the module's docstring.
    """
    if not evidence or evidence[0].asked != OTHER:
        raise ValueError("an examination begins with a probe of its own prompts")
    for one in evidence:
        wrong = _not_finite(one)
        if wrong:
            return replace(_verdict([one], floor, None), outcome="disagrees", cause=wrong)
    fresh = [one for one in evidence if one.asked == OTHER]
    engine = _engine_factor(floor)
    looks = [_Look([one], engine, allowed) for one in fresh]
    together = looks[0] if len(fresh) == 1 else _Look(fresh, engine, allowed)
    verdict = _verdict(fresh, floor, together)
    outcome, cause, ask, note = _decide(evidence, looks, together)
    return replace(verdict, outcome=outcome, cause=cause, ask=ask, note=note)


def judge_floor(floor: Floor) -> tuple[str, float]:
    """Whether the trainer's own noise explains how far the engine's plain base is from the trainer's.

    Returns the outcome, and the ratio of the two scales. ``agrees``: at most ``FLOOR_ALLOWED``. ``noisy``: more, worth
    a warning (an fp8 cache, kernels of another accuracy, a small constant fault: this cannot tell which).
    ``disagrees``: more than ``FLOOR_WRONG``, or not finite. ``unsure``: measure again with more prompts, and append
    them.
    """
    if not all(map(math.isfinite, (*floor.engine, *floor.base, *floor.shaken))):
        return "disagrees", math.nan
    noise = Noise.of([s - b for s, b in zip(floor.shaken, floor.base)], MINIMUM_FLOOR)
    gaps = [e - b for e, b in zip(floor.engine, floor.base)]
    fitted = noise.fit(gaps, noise.scales)
    spread = math.exp(3 * fitted.error)
    if fitted.ratio * math.sqrt(spread) <= FLOOR_ALLOWED:
        return "agrees", fitted.ratio
    ratios = [noise.fit(gaps[span], noise.scales[span]).ratio for span in _spans([floor])]
    for outcome, bound in (("disagrees", FLOOR_WRONG), ("noisy", FLOOR_ALLOWED)):
        if fitted.ratio / spread > bound and sum(ratio > bound for ratio in ratios) >= SHARE * len(ratios):
            return outcome, fitted.ratio
    return "unsure", fitted.ratio


class _Look:
    """The numbers of some probes together, and what they say alone: ``good``, ``bad`` (with a cause) or ``open``."""

    def __init__(self, evidence: Sequence[Evidence], engine: float, allowed: float) -> None:
        self.allowed = allowed
        self.spans = _spans(evidence)
        self.probe_tokens = self.spans[-1].stop / len(evidence)
        gaps = [e - p for one in evidence for e, p in zip(one.engine, one.policy)]
        shaken = [s - p for one in evidence for s, p in zip(one.shaken, one.policy)]
        noise = Noise.of(shaken, MINIMUM_FLOOR)
        scales = [engine * scale for scale in noise.scales]
        self.student = noise.fit(gaps, scales)
        self.ratios = [noise.fit(gaps[span], scales[span]).ratio for span in self.spans]
        self.engine = engine
        self.estimates: dict[str, Estimate] = {}
        for cause in evidence[0].alternatives:
            if not all(cause in one.alternatives for one in evidence):
                continue
            ways, again, extra = [], [], []
            for one in evidence:
                ways += [h - p for h, p in zip(one.alternatives[cause], one.policy)]
                again += [h - s for h, s in zip(one.alternatives[cause], one.shaken)]
                unrounded = one.exact if one.exact is not None and cause != "not-applied" else one.policy
                extra += [x - p for x, p in zip(unrounded, one.policy)]
            self.estimates[cause] = weigh(noise, gaps, scales, ways, again, extra, self.spans)

    def reach(self, cause: str) -> float:
        return self.estimates[cause].gain * self.probe_tokens * BUDGET

    @property
    def state(self) -> str:
        if self.cause:
            return "bad"
        ratio, error = self.student.ratio, self.student.error
        if ratio > self.allowed or ratio * math.exp(error) > 1.5 * self.allowed:
            return "open"
        told = (name for name in self.estimates if name != "stale" and self.reach(name) >= DECISIVE)
        return "good" if all(self.estimates[name].weight >= DECISIVE for name in told) else "open"

    @property
    def cause(self) -> str:
        """What is wrong; "" if nothing is, or if it is not certain."""
        named = self._nearer(-DECISIVE)
        if named:
            return named
        is_far = self.student.ratio * math.exp(-ERRORS * self.student.error) > self.allowed
        if is_far and self._is_shared([ratio > self.allowed for ratio in self.ratios]):
            return self._nearer(0.0) or "unknown"
        for name, there in self.estimates.items():
            if self.reach(name) >= DECISIVE and abs(there.slope) - ERRORS * there.error > PART:
                side = math.copysign(1.0, there.slope)
                if self._is_shared([side * slope > PART / 2 for slope in there.slopes]):
                    return self._nearer(0.0) or "unknown"
        return ""

    def _nearer(self, weight: float) -> str:
        """The hypothesis that the engine is closest to, if it explains the engine; else "". The slope must be near 1,
        the distance to it allowed or less than half of that to this policy, and most prompts must favour it."""
        near = {n: e for n, e in self.estimates.items() if e.weight <= weight and e.ratio < self.student.ratio}
        found = min(near, key=lambda name: near[name].ratio, default="")
        if not found:
            return ""
        there = near[found]
        is_close = there.ratio < max(self.allowed, 0.5 * self.student.ratio)
        is_there = is_close and abs(there.slope - 1) <= PART + 3 * there.error
        return found if is_there and self._is_shared([part < 0 for part in there.weights]) else ""

    def _is_shared(self, shown: Sequence[bool]) -> bool:
        return sum(shown) >= SHARE * len(shown)


def _decide(evidence: Sequence[Evidence], looks: Sequence[_Look], together: _Look) -> tuple[str, str, str, str]:
    """outcome, cause, ask and note."""
    cause, more = together.cause, OTHER if len(looks) < BUDGET else ""
    if cause and len(looks) > 1:
        return "disagrees", cause, "", ""
    if len(looks) > 1 and looks[0].state == "bad" and all(look.state != "bad" for look in looks[1:]):
        kept = [look for look in evidence if look.asked == KEPT]
        reset = [look for look in evidence if look.asked == RESET]
        if not kept:
            return "unsure", "stale-cache", KEPT, ""
        engine, allowed = together.engine, together.allowed
        if _Look(kept, engine, allowed).state == "bad":
            if not reset:
                return "unsure", "stale-cache", RESET, ""
            if _Look(reset, engine, allowed).state == "good":
                return "disagrees", "stale-cache", "", "gone once the caches were reset"
    odd = sum(look.state == "bad" for look in looks) if len(looks) > 1 else 0
    note = f"{odd} of them stood out, which the others did not repeat" if odd else ""
    if together.state == "good" or (
        together.state == "open" and not more and together.student.ratio <= together.allowed
    ):
        return "agrees", "", "", note
    return "unsure", cause, more, note


def _engine_factor(floor: Floor) -> float:
    """This engine's noise over the trainer's own, measured on the plain base, clipped to 0.5 .. FLOOR_WRONG."""
    finite = all(map(math.isfinite, (*floor.engine, *floor.base, *floor.shaken)))
    return min(max(judge_floor(floor)[1] if finite else 1.0, 0.5), FLOOR_WRONG)


def _not_finite(one: Evidence) -> str:
    if not all(map(math.isfinite, one.engine)):
        return "engine-not-finite"
    others = (one.policy, one.base, one.double, one.shaken, one.previous or (), one.exact or ())
    return "" if all(math.isfinite(value) for values in others for value in values) else "trainer-not-finite"


def _verdict(fresh: Sequence[Evidence], floor: Floor, look: _Look | None) -> Verdict:
    def distance(name: str, other: str) -> Distance:
        return distance_between([a - b for one in fresh for a, b in zip(getattr(one, name), getattr(one, other))])

    held = Verdict(
        "unsure",
        "",
        OTHER,
        distance("policy", "engine"),
        distance_between([b - e for b, e in zip(floor.base, floor.engine)]),
        distance("base", "engine").mean,
        distance("double", "engine").mean,
        distance("exact", "policy").mean if all(one.exact is not None for one in fresh) else 0.0,
        probes=len(fresh),
    )
    if look is None:
        return held
    hypotheses = tuple(
        Hypothesis(cause, e.weight, e.slope, e.error, e.mean, look.reach(cause)) for cause, e in look.estimates.items()
    )
    noise = look.engine * distance("shaken", "policy").mean
    return replace(
        held,
        noise=max(noise, MINIMUM_FLOOR),
        ratio=look.student.ratio,
        error=look.student.error,
        engine_noise=look.engine,
        allowed=look.allowed,
        hypotheses=hypotheses,
    )


def distance_between(gaps: Sequence[float]) -> Distance:
    """Statistics of the gaps logprob trainer - engine, in nats, one a token; NaN if empty or not all finite."""
    if not gaps or not all(map(math.isfinite, gaps)):
        return Distance(math.nan, math.nan, math.nan)
    kl = [math.exp(min(gap, LARGEST_GAP)) - 1 - gap for gap in gaps]
    sizes = [abs(gap) for gap in gaps]
    return Distance(sum(sizes) / len(sizes), max(sizes), sum(kl) / len(kl))
