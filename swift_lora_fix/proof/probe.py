"""The probe: fixed prompts that the engine answers and the trainer scores."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..trainer import Answer, TrainerPort
from .verdict import Distance, distance_between

NEW_TOKENS = 16
OPENINGS = ("Consider the following list.", "Read these words.", "Here is a short text.", "Look at this once more.")
WORDS = "one red apple two green pears three blue plums four old trees five new roads six grey birds seven long days"
TEMPLATE_TOKENS = 2 * NEW_TOKENS  # room for what a chat template adds
IGNORED = -100  # among labels: none of an answer's tokens

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
        inputs = dict(trainer.encoded(answers))
        labels = inputs.pop("labels")
        if how is not None:
            stack.enter_context(how)
        return logprobs_of(trainer.model, inputs, labels)


def logprobs_of(model: torch.nn.Module, inputs: Mapping[str, Any], labels: torch.Tensor) -> Scores:
    """``model``'s logprobs (nats, float32) of the labels that are not -100, by row.

    The logits at one place are about the label at the next. Logits that are fewer than the labels (``logits_to_keep``)
    are the last ones. Raises ValueError where some of the labels have none.
    """
    logits = model(**inputs).logits
    width = logits.shape[1]
    if bool((labels[:, : labels.shape[1] - width + 1] != IGNORED).any()):
        raise ValueError(f"the model's {width} logits a row do not reach back to the first of {labels.shape[1]} labels")
    found = []
    for row, chosen in zip(logits[:, :-1], labels[:, labels.shape[1] - width + 1 :].to(logits.device)):
        wanted = chosen != IGNORED
        part = row[wanted].float().log_softmax(-1)
        found.append(part.gather(1, chosen[wanted, None])[:, 0].tolist())
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
