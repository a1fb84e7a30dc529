"""The agreement gate: a fixed probe, answered by the engine over the path of the rollouts and scored by the trainer.

The engine continues fixed prompts with a fixed seed and reports the logprob of each token it chose; the trainer scores
the same tokens with its adapter, and, as negative controls, without it and with twice the adapter: what the mismatch
would be if the engine served those. What a match may cost is measured, too: the same probe on the plain base, engine
and trainer both without the adapter, is the noise floor of these kernels in this process.

The prompts are longer than a block of vLLM's prefix cache, so that a cache that was not reset shows. (With
``prompt_logprobs`` it would not: vLLM then skips the cache.)

Asking and judging are apart: the engine is asked when it makes rollouts, the trainer scores when its model is where it
computes, which may be later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..engine.port import ServingPort
from ..policy import adapter as adapters
from ..policy.adapter import Adapter
from ..trainer import Answer, RolloutPort, TrainerPort
from . import probe
from .causes import Finding
from .verdict import FLOOR_CEILING, Distance, FloorRule

GATE = "agreement gate"


@dataclass(frozen=True)
class Asked:
    """What the engine answered. plain: without the adapter, asked while the noise floor is not known."""

    answers: tuple[Answer, ...]
    plain: tuple[Answer, ...] | None = None


class Gate:
    """The probe of one trainer and engine. It keeps the noise floor, and the last answers to tell a stale policy.

    together: whether something is so on all ranks that judge together.
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
        self.cache_block, self.together = cache_block, together
        self.floor: Distance | None = None
        self._previous: Sequence[Answer] | None = None

    def ask(self, rollout: RolloutPort) -> Asked:
        """Have the engine answer. The first time also without the adapter: it must then be known to hold the trainer's
        base (the audit of the base), or the fault would become the floor.

        The random state is left as it was (vLLM's sampler draws from PyTorch's, seed or no seed), and the caches empty:
        a run with the gate is the run without.
        """
        with probe.same_random_state(self.trainer.device):
            plain = None
            if self.floor is None:
                with self.serving.engine_without_adapter():
                    plain = tuple(self._ask(rollout, 0))
            asked = Asked(tuple(self._ask(rollout, 0)), plain)
        self._forget_answers()
        return asked

    def judge(self, asked: Asked, rollout: RolloutPort | None = None) -> tuple[FloorRule, Finding | None]:
        """Score what was asked. With a ``rollout`` whatever disagrees is asked again with other prompts, which tells a
        stale cache from a wrong policy. All ranks come here together and stay together: what one of them has to
        confirm, all do."""
        with probe.same_random_state(self.trainer.device):
            return self._judge(asked, rollout)

    def _judge(self, asked: Asked, rollout: RolloutPort | None) -> tuple[FloorRule, Finding | None]:
        if self.floor is None and asked.plain is not None:
            scores = probe.score(self.trainer, asked.plain, self.serving.trainer_without_adapter())
            self.floor = probe.gap_of(*probe.worst(asked.plain, scores, self.serving.copies))
        verdict, answers = self._compare(asked.answers)
        assert self.floor is not None
        if not self.together(self.floor.mean <= FLOOR_CEILING):
            floor, self.floor = self.floor, None
            evidence = f"without the adapter, engine and trainer are {floor.mean:.3g} nats a token apart on average"
            if floor.mean <= FLOOR_CEILING:
                evidence = f"on another rank; here {evidence}"
            return verdict, Finding("base-not-served", GATE, evidence)
        previous, self._previous = self._previous, answers
        if self.together(verdict.agrees):
            return verdict, None
        other = self._compare(self._ask(rollout, 1))[0] if rollout is not None else verdict
        if verdict.agrees:
            return verdict, None
        return verdict, Finding(self._cause(verdict, other, answers, previous), GATE, str(verdict))

    def _cause(
        self, verdict: FloorRule, other: FloorRule, answers: Sequence[Answer], previous: Sequence[Answer] | None
    ) -> str:
        if other.agrees:
            return "stale-cache"
        # closer to a control than half of what it is off by: that is what the engine serves
        half = 0.5 * verdict.distance.mean
        if verdict.control_base < min(half, verdict.control_double):
            return "not-applied"
        if verdict.control_double < half:
            return "double-count"
        if previous is not None and _repeats(answers, previous, verdict.bound):
            return "stale"
        return "unknown"

    def _ask(self, rollout: RolloutPort, variant: int) -> list[Answer]:
        texts = probe.prompts(self.trainer, self.cache_block, variant)
        return rollout.ask(texts * self.serving.copies, probe.NEW_TOKENS)

    def _forget_answers(self) -> None:
        reset = self.serving.reset_caches
        if reset is not None:
            reset()

    def _compare(self, answers: Sequence[Answer]) -> tuple[FloorRule, list[Answer]]:
        assert self.floor is not None
        found, held = probe.worst(answers, probe.score(self.trainer, answers), self.serving.copies)
        base = probe.score(self.trainer, found, self.serving.trainer_without_adapter())
        double = probe.score(self.trainer, found, adapters.scaled(self.adapter, 2.0))
        rounding = 0.0
        if self.serving.rounds:
            rounding = probe.mean_difference(held, probe.score(self.trainer, found, self.serving.trainer_as_rounded()))
        controls = [probe.gap_of(found, scores).mean for scores in (base, double)]
        return FloorRule(probe.gap_of(found, held), self.floor, controls[0], controls[1], rounding), found


def _repeats(answers: Sequence[Answer], previous: Sequence[Answer], bound: float) -> bool:
    """Whether the engine said the same as at the gate before: the same tokens, as likely as then."""
    return all(a.tokens == b.tokens for a, b in zip(answers, previous)) and all(
        abs(x - y) <= bound for a, b in zip(answers, previous) for x, y in zip(a.logprobs, b.logprobs)
    )
