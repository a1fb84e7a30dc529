"""The probe: fixed prompts that the engine answers and the trainer scores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from ..trainer import Answer, TrainerPort

NEW_TOKENS = 16
SHORT, LONG = "short", "long"  # kinds of prompts
# beyond 512 tokens and several KV blocks: kernels have gone wrong from 128 tokens (vLLM 48590) and 400 (52568) on
LONG_TOKENS, LONG_PROMPTS = 560, 2
OPENINGS = ("Consider the following list.", "Read these words.", "Here is a short text.", "Look at this once more.")
WORDS = "one red apple two green pears three blue plums four old trees five new roads six grey birds seven long days"
TEMPLATE_TOKENS = 2 * NEW_TOKENS  # room for what a chat template adds

Scores = list[list[float]]  # by answer, by token: the trainer's logprobs in nats


def kinds(trainer: TrainerPort) -> list[str]:
    """The kinds of prompts that this run's lengths have room for."""
    return [SHORT, LONG] if _room(trainer) >= LONG_TOKENS else [SHORT]


def prompts(trainer: TrainerPort, cache_block: int, variant: int = 0, kind: str = SHORT) -> list[str]:
    """Fixed texts: ``SHORT`` ones longer than one block of the prefix cache (``cache_block`` tokens) as far as the
    lengths allow, ``LONG`` ones of ``LONG_TOKENS`` tokens. Those of another variant differ from the first word on."""
    words = trainer.tokenizer.encode(f"{WORDS} ", add_special_tokens=False)
    length = LONG_TOKENS if kind == LONG else max(8, min(cache_block + 8, _room(trainer)))
    body = trainer.tokenizer.decode((words * (1 + length // len(words)))[:length])
    openings, start = OPENINGS[: LONG_PROMPTS if kind == LONG else None], variant * 7
    return [f"{number + start} {opening} {body}" for number, opening in enumerate(openings)]


def _room(trainer: TrainerPort) -> int:
    """Tokens that are left for a prompt's own text."""
    return (trainer.longest_prompt or 1024) - NEW_TOKENS - TEMPLATE_TOKENS


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
