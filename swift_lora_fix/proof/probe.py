"""The probe: fixed prompts that the engine answers and the trainer scores."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch

from ..trainer import Answer, TrainerPort
from .verdict import Distance, distance_between

NEW_TOKENS = 16
OPENINGS = ("Consider the following list.", "Read these words.", "Here is a short text.", "Look at this once more.")
WORDS = "one red apple two green pears three blue plums four old trees five new roads six grey birds seven long days"
TEMPLATE_TOKENS = 2 * NEW_TOKENS  # room for what a chat template adds

Scores = list[list[float]]  # by answer, by token: the trainer's logprobs in nats


def prompts(trainer: TrainerPort, cache_block: int, variant: int = 0) -> list[str]:
    """Fixed texts, longer than one block of the prefix cache (``cache_block`` tokens) as far as the lengths allow."""
    room = (trainer.longest_prompt or 1024) - NEW_TOKENS - TEMPLATE_TOKENS
    words = trainer.tokenizer.encode(f"{WORDS} ", add_special_tokens=False)
    length = max(8, min(cache_block + 8, room))
    body = trainer.tokenizer.decode((words * (1 + length // len(words)))[:length])
    start = variant * 7
    return [f"{number + start} {opening} {body}" for number, opening in enumerate(OPENINGS)]


def score(
    trainer: TrainerPort, answers: Sequence[Answer], how: contextlib.AbstractContextManager[None] | None = None
) -> Scores:
    """The trainer's logprobs of the answers' tokens, with its model as ``how`` makes it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_evaluating(trainer.model))
        stack.enter_context(trainer.scoring())
        if how is not None:
            stack.enter_context(how)
        return logprobs_of(trainer.model, answers, trainer.device)


def logprobs_of(model: torch.nn.Module, answers: Sequence[Answer], device: torch.device) -> Scores:
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
    pairs = zip(answers, scores)
    return distance_between([held - served for answer, row in pairs for served, held in zip(answer.logprobs, row)])


def mean_difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """Mean |difference| of two scorings of the same tokens, in nats."""
    gaps = [abs(a - b) for one, other in zip(first, second) for a, b in zip(one, other)]
    return sum(gaps) / len(gaps) if gaps else 0.0


def worst(answers: Sequence[Answer], scores: Sequence[list[float]], copies: int) -> tuple[list[Answer], Scores]:
    """Of ``copies`` engines' answers to the same prompts, one engine's after the other's, those furthest off."""
    size = len(answers) // copies
    parts = [slice(start, start + size) for start in range(0, len(answers), size)]
    gaps = [gap_of(answers[part], scores[part]).mean for part in parts]
    most = parts[max(range(len(parts)), key=lambda index: math.inf if math.isnan(gaps[index]) else gaps[index])]
    return list(answers[most]), list(scores[most])


def same_random_state(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """PyTorch's random state is afterwards as it was, on the CPU and on ``device``."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
