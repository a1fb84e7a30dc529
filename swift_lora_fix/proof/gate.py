"""The agreement gate: fixed probes, answered by the engine over the path of the rollouts and scored by the trainer.

The engine continues fixed prompts with a fixed seed and reports the logprob of each token it chose. The trainer scores
the same tokens with its policy, as other policies that an engine might serve (the plain base, twice the adapter), and
once more with its own numerics shaken; verdict.py says which of them the engine serves. The first time both sides
answer without the adapter, too: the floor, which shows how this engine's kernels differ from the trainer's.

There is an examination of each kind of prompts, each with a floor of its own. All are longer than a block of vLLM's
prefix cache, so that a cache that was not reset shows. (With ``prompt_logprobs`` it would not: vLLM then skips the
cache.)

Asking and judging are apart: the engine is asked when it makes rollouts, the trainer scores when its model is where it
computes, which may be later. What an examination may need then is asked ahead.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from ..engine.port import ServingPort
from ..errors import CacheResetError, SwiftLoraFixError
from ..policy import adapter as adapters
from ..policy.adapter import Adapter
from ..trainer import Answer, RolloutPort, TrainerPort
from . import probe
from .causes import Finding
from .noise import shaken
from .verdict import ALLOWED, BUDGET, KEPT, OTHER, RESET, Evidence, Floor, Verdict, judge, judge_floor

GATE = "agreement gate"
MEDIA_ALLOWED = 2 * ALLOWED  # what an image's numerics move is one draw for all the tokens said about it
FLOOR_PROBES = 2  # without the adapter, at least; one more, and another, where they do not tell
FLOOR_PROBES_AT_MOST = 4

Answers = tuple[Answer, ...]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Asked:
    """What the engine answered to one kind of prompts. probes: what each was (OTHER, KEPT, RESET), and its answers.
    plain: without the adapter, asked while the floor is not known. turn: how many looks were before this one. failed:
    why it could not be asked, else ""."""

    kind: str
    probes: tuple[tuple[str, Answers], ...] = ()
    plain: tuple[Answers, ...] = ()
    turn: int = 0
    failed: str = ""


@dataclass
class Judgement:
    """Of one look. verdicts: by kind of prompts. noisy: what is worth a warning, in words, of floors just measured.
    failed: by kind, why there is no verdict."""

    verdicts: dict[str, Verdict] = field(default_factory=dict)
    noisy: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    finding: Finding | None = None


class Gate:
    """The probes of one trainer and engine. It keeps the floors, and the last scores to tell a stale policy.

    together: whether something is so on all ranks that judge together. All of them ask and score the same number of
    times, so that what is sharded can be gathered.
    """

    def __init__(
        self,
        trainer: TrainerPort,
        adapter: Adapter,
        serving: ServingPort,
        cache_block: int,
        together: Callable[[bool], bool],
    ) -> None:
        self.trainer, self.adapter, self.serving = trainer, adapter, serving
        self.texts, self.together = probe.Texts(trainer, cache_block), together
        self.floors: dict[str, list[Floor]] = {}  # of each kind, one of each engine
        self._turns = 0
        self._before: dict[str, list[tuple[Answers, tuple[float, ...]]]] = {}  # the last first probe and its scores

    def ask(self, rollout: RolloutPort, together: Callable[[bool], bool], ahead: bool = False) -> list[Asked]:
        """Have the engine answer. The first time also without the adapter: it must then be known to hold the trainer's
        base (the audit of the base), or the fault would become the floor. ``ahead``: all that judging may need.

        The random state is left as it was (vLLM's sampler draws from PyTorch's, seed or no seed). What the probe leaves
        in the caches stays until it is judged, unless that comes later (``ahead``).

        Args:
            together: as the gate's own, of the ranks that ask. Where one of them fails, the others say so, too.
        """
        found = []
        with probe.same_random_state(self.trainer.device):
            media = together(rollout.has_media)
            try:
                kinds = _attempt(partial(probe.kinds, self.trainer, media), together)
            except _ProbeError as error:
                found, kinds = [Asked(probe.SHORT, failed=str(error))], []
            for kind in kinds:
                try:
                    found.append(_attempt(partial(self._ask_kind, rollout, kind, ahead), together))
                except _ProbeError as error:
                    found.append(Asked(kind, failed=str(error)))
        self._turns += 1
        return found

    def judge(self, asked: Sequence[Asked], rollout: RolloutPort | None = None) -> Judgement:
        """Score what was asked. With a ``rollout`` more is asked where that can decide it. All ranks come here
        together and stay together: what fails on one of them has failed on all."""
        found = Judgement()
        try:
            with probe.same_random_state(self.trainer.device):
                for one in asked:
                    if one.failed:
                        found.failed[one.kind] = one.failed
                        continue
                    try:
                        self._judge(one, rollout, found)
                    except _ProbeError as error:
                        found.failed[one.kind] = str(error)
        finally:
            if rollout is not None:
                self._forget_answers(found.failed)  # a run with the gate is the run without
        return found

    # ---- asking ------------------------------------------------------------------------------------------------------

    def _ask_kind(self, rollout: RolloutPort, kind: str, ahead: bool) -> Asked:
        try:
            asked = self._ask_what(rollout, kind, ahead)
        except Exception as error:
            if ahead:
                self._forget_answers({kind: f"{type(error).__name__}: {error}"})
            raise
        if ahead:
            self._forget_answers({})
        return asked

    def _ask_what(self, rollout: RolloutPort, kind: str, ahead: bool) -> Asked:
        plain: tuple[Answers, ...] = ()
        if kind not in self.floors:
            plain = tuple(self._ask_plain(rollout, kind, variant) for variant in range(FLOOR_PROBES))
        probes = [(OTHER, self._ask(rollout, kind, 0))]
        if ahead:
            probes += [(OTHER, self._ask(rollout, kind, _variant(self._turns, 1))), (KEPT, self._ask(rollout, kind, 0))]
            if self.serving.reset_caches is not None:
                self.serving.reset_caches()
                probes.append((RESET, self._ask(rollout, kind, 0)))
        return Asked(kind, tuple(probes), plain, self._turns)

    def _ask(self, rollout: RolloutPort, kind: str, variant: int) -> Answers:
        texts = self.texts.prompts(variant, kind)
        try:
            return tuple(rollout.ask(texts * self.serving.copies, probe.NEW_TOKENS, with_media=kind == probe.MEDIA))
        except Exception:
            if self.serving.abort_unfinished is not None:
                with contextlib.suppress(Exception):  # of a dead engine: the next rollout says so
                    self.serving.abort_unfinished()
            raise

    def _ask_plain(self, rollout: RolloutPort, kind: str, variant: int) -> Answers:
        with self.serving.engine_without_adapter():
            return self._ask(rollout, kind, variant)

    def _forget_answers(self, failed: Mapping[str, str]) -> None:
        """failed: why, by kind. Where an engine that failed in a question kept its requests this fails, too: then both
        are said."""
        if self.serving.reset_caches is None:
            return
        try:
            self.serving.reset_caches()
        except CacheResetError as error:
            before = "; ".join(f"the probe with {kind} prompts failed: {why}" for kind, why in failed.items())
            raise CacheResetError(f"{error.args[0]} Before that, {before}." if before else error.args[0]) from error

    # ---- judging -----------------------------------------------------------------------------------------------------

    def _judge(self, asked: Asked, rollout: RolloutPort | None, found: Judgement) -> None:
        kind = asked.kind
        if kind not in self.floors and not self._measure_floor(asked, rollout, found):
            return
        supply, floors = _Supply(self, asked, rollout), self.floors[kind]
        allowed = MEDIA_ALLOWED if kind == probe.MEDIA else ALLOWED
        evidence: list[list[Evidence]] = [[] for _ in floors]
        verdicts: list[Verdict] = []
        what = OTHER
        while what:
            answers = _attempt(partial(supply.next, what), self.together)
            if not self.together(answers is not None):
                break
            assert answers is not None
            scored = _attempt(partial(self._evidence, kind, what, answers, first=not verdicts), self.together)
            for so_far, one in zip(evidence, scored):
                so_far.append(one)
            verdicts = [judge(so_far, floor, allowed) for so_far, floor in zip(evidence, floors)]
            what = self._next(verdicts)
        worst = max(range(len(verdicts)), key=lambda at: (*_badness(verdicts[at]), at))
        verdict = found.verdicts[kind] = verdicts[worst]
        if verdict.disagrees and found.finding is None:
            cause = verdict.cause
            if cause == "unknown" and judge(evidence[worst][:1], floors[worst], allowed).cause == "stale":
                cause = "stale"  # the policy before is known of the first probe alone; the others repeat that it is off
            of = "" if kind == probe.SHORT else f" ({kind} prompts)"
            found.finding = Finding(cause, f"{GATE}{of}", str(verdict))

    def _next(self, verdicts: Sequence[Verdict]) -> str:
        """What all ranks ask next: what one of them needs."""
        wanted = {verdict.ask for verdict in verdicts if verdict.is_unsure}
        return next((what for what in (OTHER, KEPT, RESET) if not self.together(what not in wanted)), "")

    def _measure_floor(self, asked: Asked, rollout: RolloutPort | None, found: Judgement) -> bool:
        """Whether the plain base is served. Measured with more prompts where the first do not tell."""
        plain = list(asked.plain)
        while True:
            floors = _attempt(partial(self._floors_of, plain), self.together)
            judged = [judge_floor(floor) for floor in floors]
            more = rollout is not None and len(plain) < FLOOR_PROBES_AT_MOST
            if self.together(not more or all(outcome != "unsure" for outcome, _ in judged)):
                break
            assert rollout is not None
            plain.append(_attempt(partial(self._ask_plain, rollout, asked.kind, len(plain)), self.together))
        wrong = [ratio for outcome, ratio in judged if outcome == "disagrees"]
        if not self.together(not wrong):
            evidence = "on another rank"
            if wrong:
                times = f"{wrong[0]:.3g} times as far apart as the trainer's own numerics explain"
                evidence = f"without the adapter engine and trainer are {times} ({asked.kind} prompts)"
            found.finding = found.finding or Finding("base-not-served", GATE, evidence)
            return False
        self.floors[asked.kind] = floors
        found.noisy += [f"{asked.kind} prompts: {ratio:.3g} times" for outcome, ratio in judged if outcome == "noisy"]
        return True

    def _floors_of(self, plain: Sequence[Answers]) -> list[Floor]:
        """Of each engine."""
        without, parts = self.serving.trainer_without_adapter, []
        for answers in plain:
            base, again = probe.scores(self.trainer, answers, [without(), self._shaken(without())])
            parts.append([(answers[part], base[part], again[part]) for part in self._of_each_engine(answers)])
        floors = []
        for mine in zip(*parts):
            answers = tuple(answer for part, _, _ in mine for answer in part)
            base, again = ([row for part in mine for row in part[column]] for column in (1, 2))
            floors.append(Floor(_said(answers), _flat(base), _flat(again), _lengths(answers)))
        return floors

    def _evidence(self, kind: str, what: str, answers: Answers, first: bool) -> list[Evidence]:
        """Of each engine."""
        serving, plain = self.serving, contextlib.nullcontext
        as_served = serving.trainer_as_rounded if serving.rounds else plain
        hows = [as_served(), self._shaken(as_served())]
        hows += [serving.trainer_without_adapter(), adapters.scaled(self.adapter, 2.0)]
        hows += [plain()] if serving.rounds else []
        policy, again, base, double, *unrounded = probe.scores(self.trainer, answers, hows)
        exact = unrounded[0] if unrounded else None
        known, kept, made = self._before.get(kind, []), [], []
        for number, part in enumerate(self._of_each_engine(answers)):
            mine, own, previous = answers[part], _flat(policy[part]), None
            if first:
                kept.append((mine, own))
                # of another image the same tokens would say nothing
                is_known = kind != probe.MEDIA and number < len(known)
                if is_known and [a.tokens for a in known[number][0]] == [a.tokens for a in mine]:
                    previous = known[number][1]
            made.append(
                Evidence(
                    _said(mine),
                    own,
                    _flat(base[part]),
                    _flat(double[part]),
                    _flat(again[part]),
                    previous,
                    None if exact is None else _flat(exact[part]),
                    _lengths(mine),
                    what,
                )
            )
        if first:
            self._before[kind] = kept
        return made

    def _of_each_engine(self, answers: Answers) -> list[slice]:
        """An engine's answers lie one after the other."""
        size = len(answers) // self.serving.copies
        return [slice(start, start + size) for start in range(0, len(answers), size)]

    @contextlib.contextmanager
    def _shaken(self, how: contextlib.AbstractContextManager[None]) -> Iterator[None]:
        with shaken(self.trainer.model, self.serving.stand_ins, self.serving.dtype), how:
            yield


class _Supply:
    """Answers to judge by: what was asked ahead, then what can still be asked."""

    def __init__(self, gate: Gate, asked: Asked, rollout: RolloutPort | None) -> None:
        self.gate, self.asked, self.rollout = gate, asked, rollout
        self.left = list(asked.probes)
        self.others = 0

    def next(self, what: str) -> Answers | None:
        variant = _variant(self.asked.turn, self.others) if what == OTHER else 0
        self.others += what == OTHER
        for number, (kind, answers) in enumerate(self.left):
            if kind == what:
                del self.left[number]
                return answers
        reset = self.gate.serving.reset_caches
        if self.rollout is None or (what == RESET and reset is None):
            return None
        if what == RESET:
            assert reset is not None
            reset()
        return self.gate._ask(self.rollout, self.asked.kind, variant)


def _variant(turn: int, number: int) -> int:
    """Of the prompts of a look's probe of this number. The first are the same at every look, so that stale caches show;
    the others are new ones, of which no cache knows."""
    return turn * BUDGET + number if number else 0


class _ProbeError(Exception):
    """A probe could not be asked or scored, on this rank or another: in its words."""


def _attempt(work: Callable[[], Result], together: Callable[[bool], bool]) -> Result:
    """Its result; or _ProbeError on all ranks where it fails on one, so that no rank waits for another."""
    problem: Exception | None = None
    try:
        result = work()
    except Exception as error:
        problem = error
    if together(problem is None):
        return result
    if isinstance(problem, SwiftLoraFixError):
        raise problem
    raise _ProbeError(f"{type(problem).__name__}: {problem}" if problem else "on another rank") from problem


def _badness(verdict: Verdict) -> tuple[bool, bool, float]:
    return verdict.disagrees, not verdict.agrees, 0.0 if math.isnan(verdict.ratio) else verdict.ratio


def _said(answers: Sequence[Answer]) -> tuple[float, ...]:
    return _flat([answer.logprobs for answer in answers])


def _flat(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(value for row in rows for value in row)


def _lengths(answers: Sequence[Answer]) -> tuple[int, ...]:
    return tuple(len(answer.tokens) for answer in answers)
