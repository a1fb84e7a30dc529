"""The agreement gate: a fixed probe, answered by the engine over the path of the rollouts and scored by the trainer.

The engine continues fixed prompts with a fixed seed and reports the logprob of each token it chose; the trainer scores
the same tokens with its adapter, and, as negative controls, without it and with twice the adapter: what the mismatch
would be if the engine served those. What a match may cost is measured, too: the same probe on the plain base, engine
and trainer both without the adapter, is the noise floor of these kernels in this process.

The prompts are longer than a block of vLLM's prefix cache, so that a cache that was not reset shows. (With
``prompt_logprobs`` it would not: vLLM then skips the cache.)
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..policy import adapter as adapters
from ..policy.adapter import Adapter
from ..server.wire import PROBE
from .findings import Finding
from .serving import Apart, Fused
from .verdict import FLOOR_CEILING, Distance, distance_between
from .verdict import FloorRule as Verdict

GATE = "agreement gate"
NEW_TOKENS = 16
OPENINGS = ("Consider the following list.", "Read these words.", "Here is a short text.", "Look at this once more.")
WORDS = "one red apple two green pears three blue plums four old trees five new roads six grey birds seven long days"

Infer = Callable[[Sequence[Any], Any], Sequence[Any]]


@dataclass(frozen=True)
class Answer:
    """One prompt's token ids, what the engine went on with, and the engine's logprob of each of those, in nats."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


class Gate:
    """The probe of one trainer and engine. It keeps the noise floor, and the last answers to tell a stale policy."""

    def __init__(
        self, trainer: Any, adapter: Adapter, everywhere: Callable[[bool], bool], serving: Apart | Fused
    ) -> None:
        self.trainer, self.adapter, self.everywhere, self.serving = trainer, adapter, everywhere, serving
        self.floor: Distance | None = None
        self._previous: list[Answer] | None = None

    def check(self, infer: Infer, requests: Sequence[Any], config: Any) -> tuple[Verdict, Finding | None]:
        """Probe; what disagrees is probed again with other prompts, which tells a stale cache from a wrong policy.

        The first check measures the noise floor, for good: it must only be asked while the engine is known to hold the
        trainer's base (the audit of the base), or the fault would become the floor.

        Args:
            infer: ms-swift's own ``_engine_infer``, ``infer(requests, config)``.
            requests, config: those of the rollout that is about to be made, to take their kind from.

        All ranks come here together and stay together: what one of them has to confirm, all do. The random state is
        left as it was (vLLM's sampler draws from PyTorch's, seed or no seed): a run with the gate is the run without.
        """
        with same_random_state(self.trainer.accelerator.device):
            return self._check(infer, requests, config)

    def _check(self, infer: Infer, requests: Sequence[Any], config: Any) -> tuple[Verdict, Finding | None]:
        if self.floor is None:
            self.floor = self._measure_floor(infer, requests, config)
        verdict, answers = self._probe(infer, requests, config, prompts(self.trainer))
        if not self.everywhere(self.floor.mean <= FLOOR_CEILING):
            floor, self.floor = self.floor, None
            evidence = f"without the adapter, engine and trainer are {floor.mean:.3g} nats a token apart on average"
            if floor.mean <= FLOOR_CEILING:
                evidence = f"on another rank; here {evidence}"
            return verdict, Finding("base-not-served", GATE, evidence)
        previous, self._previous = self._previous, answers
        if self.everywhere(verdict.agrees):
            return verdict, None
        other, _ = self._probe(infer, requests, config, prompts(self.trainer, variant=1))
        if verdict.agrees:
            return verdict, None
        return verdict, Finding(self._cause(verdict, other, answers, previous), GATE, str(verdict))

    def _cause(self, verdict: Verdict, other: Verdict, answers: list[Answer], previous: list[Answer] | None) -> str:
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

    def _probe(
        self, infer: Infer, requests: Sequence[Any], config: Any, texts: Sequence[str]
    ) -> tuple[Verdict, list[Answer]]:
        assert self.floor is not None
        answers = ask(infer, requests[0], config, [*texts] * self.serving.copies)
        answers, held = self._worst(answers, self._score(answers, contextlib.nullcontext()))
        base = self._score(answers, self.serving.trainer_without_adapter())
        double = self._score(answers, adapters.scaled(self.adapter, 2.0))
        rounding = 0.0
        if self.serving.rounds:
            rounding = _mean_difference(held, self._score(answers, self.serving.trainer_as_rounded()))
        controls = [gap_of(answers, scores).mean for scores in (base, double)]
        return Verdict(gap_of(answers, held), self.floor, controls[0], controls[1], rounding), answers

    def _measure_floor(self, infer: Infer, requests: Sequence[Any], config: Any) -> Distance:
        with self.serving.engine_without_adapter():
            answers = ask(infer, requests[0], config, prompts(self.trainer) * self.serving.copies)
        return gap_of(*self._worst(answers, self._score(answers, self.serving.trainer_without_adapter())))

    def _worst(
        self, answers: Sequence[Answer], scores: Sequence[list[float]]
    ) -> tuple[list[Answer], list[list[float]]]:
        """Of several engines' answers to the same prompts, one engine's after the other's, those furthest off."""
        size = len(answers) // self.serving.copies
        parts = [slice(start, start + size) for start in range(0, len(answers), size)]
        gaps = [gap_of(answers[part], scores[part]).mean for part in parts]
        worst = parts[max(range(len(parts)), key=lambda index: math.inf if math.isnan(gaps[index]) else gaps[index])]
        return list(answers[worst]), list(scores[worst])

    def _score(self, answers: Sequence[Answer], how: contextlib.AbstractContextManager[None]) -> list[list[float]]:
        """The trainer's logprobs of the answers' tokens, with its model as ``how`` makes it."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(_evaluating(model))
            stack.enter_context(how)
            if hasattr(self.trainer, "_disable_sp_context"):
                stack.enter_context(self.trainer._disable_sp_context())
            return score(model, answers, self.trainer.accelerator.device)


def prompts(trainer: Any, variant: int = 0) -> list[str]:
    """Fixed texts of more than one prefix-cache block, as far as the engine's and the template's lengths allow."""
    block, limit = _lengths(trainer)
    limits = [limit, getattr(trainer.template, "max_length", None)]
    room = min((int(limit) for limit in limits if limit), default=1024) - 3 * NEW_TOKENS  # the chat template takes some
    tokenizer = trainer.template.tokenizer
    words = tokenizer.encode(f"{WORDS} ", add_special_tokens=False)
    length = max(8, min(block + 8, room))
    body = tokenizer.decode((words * (1 + length // len(words)))[:length])
    start = variant * 7
    return [f"{number + start} {opening} {body}" for number, opening in enumerate(OPENINGS)]


def _lengths(trainer: Any) -> tuple[int, int | None]:
    """Tokens of a prefix-cache block, and of the longest sequence that the engine takes."""
    engine = getattr(trainer, "engine", None)
    if engine is None:  # rollout servers; 128 is vLLM's largest default, of its CPU backend
        return 128, getattr(trainer.args, "vllm_max_model_len", None)
    return getattr(engine.engine.vllm_config.cache_config, "block_size", None) or 16, engine.max_model_len


def ask(infer: Infer, like: Any, config: Any, texts: Sequence[str]) -> list[Answer]:
    """Have the engine go on with ``texts``, as user messages of requests ``like`` this one, with a fixed seed."""
    requests = [_request(like, index, text) for index, text in enumerate(texts)]
    outputs = infer(requests, _config(config))
    answers = []
    for output in outputs:
        choice = output.response.choices[0]
        logprobs = tuple(float(item["logprob"]) for item in choice.logprobs["content"])
        answers.append(Answer(tuple(output.response.prompt_token_ids), tuple(choice.token_ids), logprobs))
    return answers


def score(model: torch.nn.Module, answers: Sequence[Answer], device: torch.device) -> list[list[float]]:
    """``model``'s logprobs (nats, float32) of the answers' tokens after their prompts. Padded on the right, which a
    causal model never looks at."""
    rows = [[*answer.prompt, *answer.tokens] for answer in answers]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64, device=device)
    for row, tokens in zip(ids, rows):
        row[: len(tokens)] = torch.tensor(tokens)
    logits = model(input_ids=ids, use_cache=False).logits
    found = []
    for row, answer in zip(logits, answers):
        start = len(answer.prompt) - 1
        chosen = torch.tensor(answer.tokens, device=device)[:, None]
        part = row[start : start + len(answer.tokens)].float().log_softmax(-1)
        found.append(part.gather(1, chosen)[:, 0].tolist())
    return found


def gap_of(answers: Sequence[Answer], scores: Sequence[Sequence[float]]) -> Distance:
    """Between the engine's logprobs and the trainer's ``scores`` of the same tokens."""
    return distance_between(
        [held - served for answer, row in zip(answers, scores) for served, held in zip(answer.logprobs, row)]
    )


def _mean_difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    gaps = [abs(a - b) for one, other in zip(first, second) for a, b in zip(one, other)]
    return sum(gaps) / len(gaps) if gaps else 0.0


def _request(like: Any, index: int, text: str) -> Any:
    request = copy.deepcopy(like)
    fields = request if isinstance(request, dict) else vars(request)
    fields["messages"] = [{"role": "user", "content": text}]
    for name in ("images", "audios", "videos"):
        if fields.get(name):
            fields[name] = []
    for name in ("uuid", "request_id"):
        if name in fields:
            fields[name] = f"{PROBE}{index}"
    return request


def _config(like: Any) -> Any:
    sampling = dict(temperature=1.0, top_k=-1, top_p=1.0, min_p=0.0, repetition_penalty=1.0, n=1, seed=0, stop=[])
    sampling["structured_outputs_regex"] = None
    answer = dict(max_tokens=NEW_TOKENS, logprobs=True, top_logprobs=None, return_details=True, stream=False)
    return altered(like, **sampling, **answer)


def altered(config: Any, **values: Any) -> Any:
    """A copy of a request config with these values, as far as its release of ms-swift knows them."""
    changed = copy.copy(config)
    known = inspect.signature(type(config)).parameters
    for name, value in values.items():
        if name in known:
            setattr(changed, name, value)
    return changed


def same_random_state(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """PyTorch's random state is afterwards as it was, on the CPU and on ``device``."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _repeats(answers: Sequence[Answer], previous: Sequence[Answer], bound: float) -> bool:
    """Whether the engine said the same as at the gate before: the same tokens, as likely as then."""
    return all(a.tokens == b.tokens for a, b in zip(answers, previous)) and all(
        abs(x - y) <= bound for a, b in zip(answers, previous) for x, y in zip(a.logprobs, b.logprobs)
    )


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
