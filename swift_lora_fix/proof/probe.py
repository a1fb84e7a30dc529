"""The probe: fixed prompts that the engine answers and the trainer scores."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..trainer import Answer, TrainerPort

NEW_TOKENS = 16
SHORT, LONG, MEDIA = "short", "long", "media"  # kinds of prompts
# beyond 512 tokens and several KV blocks: kernels have gone wrong from 128 tokens (vLLM 48590) and 400 (52568) on
LONG_TOKENS = 560
FEW = 2  # prompts, of the kinds that cost more
OPENINGS = ("Consider the following list.", "Read these words.", "Here is a short text.", "Look at this once more.")
WORDS = "one red apple two green pears three blue plums four old trees five new roads six grey birds seven long days"
AROUND = 2 * NEW_TOKENS  # at least so much room is kept for what is around a prompt's body
IGNORED = -100  # among labels: none of an answer's tokens

Scores = list[list[float]]  # by answer, by token: the trainer's logprobs in nats


def kinds(trainer: TrainerPort, has_media: bool) -> list[str]:
    """The kinds of prompts that this run's lengths have room for; ``MEDIA`` where its rollouts have images."""
    return [SHORT, *[LONG] * (_room(trainer) >= LONG_TOKENS), *[MEDIA] * has_media]


class Texts:
    """The texts of one trainer's prompts. What they have in common is made once for each kind and length."""

    def __init__(self, trainer: TrainerPort, cache_block: int) -> None:
        self.trainer, self.cache_block = trainer, cache_block
        self._bodies: dict[tuple[str, int], str] = {}

    def prompts(self, variant: int = 0, kind: str = SHORT) -> list[str]:
        """Fixed texts longer than one block of the prefix cache (``cache_block`` tokens) as far as the lengths allow;
        ``LONG`` ones of ``LONG_TOKENS`` tokens. Those of another variant differ from the first word on."""
        length = LONG_TOKENS if kind == LONG else max(8, min(self.cache_block + 8, _room(self.trainer)))
        if (kind, length) not in self._bodies:
            self._bodies[kind, length] = self._body(kind, length)
        body, start = self._bodies[kind, length], variant * 7
        openings = OPENINGS[: None if kind == SHORT else FEW]
        return [f"{number + start} {opening} {body}" for number, opening in enumerate(openings)]

    def _body(self, kind: str, length: int) -> str:
        words, body = WORDS.split(), ""
        while len(self.trainer.tokenizer.encode(body, add_special_tokens=False)) < length:
            if body.count(" ") > 4 * length + len(words):  # an alphabet of its own: digits, amino acids, moves
                raise ValueError(f"the tokenizer makes no {length} tokens of {body.count(' ')} English words")
            body = f"{body} {' '.join(words)}" if kind == LONG else f"{body} {words[body.count(' ') % len(words)]}"
        return body


def _room(trainer: TrainerPort) -> int:
    """Tokens that are left for a prompt's body, beside its opening, what the template writes, and the answer. A longer
    prompt would be cut or refused (--truncation_strategy delete), as the run's own are."""
    openings = (trainer.tokenizer.encode(f"0 {opening} ", add_special_tokens=False) for opening in OPENINGS)
    around = max(AROUND, trainer.template_tokens + max(map(len, openings)))
    return (trainer.longest_prompt or 1024) - NEW_TOKENS - around


def score(
    trainer: TrainerPort, answers: Sequence[Answer], how: contextlib.AbstractContextManager[None] | None = None
) -> Scores:
    """The trainer's logprobs of the answers' tokens, with its model as ``how`` makes it."""
    return scores(trainer, answers, [how or contextlib.nullcontext()])[0]


def scores(
    trainer: TrainerPort, answers: Sequence[Answer], hows: Sequence[contextlib.AbstractContextManager[None]]
) -> list[Scores]:
    """The same with its model in each of these ways, one after the other. The answers are encoded once, and each
    forward gets tensors of its own, whatever a forward hook of the framework does with them."""
    found = []
    with torch.no_grad(), evaluating(trainer.model), trainer.scoring():
        inputs = dict(trainer.encoded(answers))
        labels = inputs.pop("labels")
        for how in hows:
            with how:
                found.append(logprobs_of(trainer.model, copy.deepcopy(inputs), labels))
    return found


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


def same_random_state(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """PyTorch's random state is afterwards as it was, on the CPU and on ``device``."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode; each module is afterwards in the mode it was in.

    Packed layers (GPTQ, AWQ) stay in theirs. They compute the same in both, and gptqmodel chooses its kernel by it: on
    a CPU once and for all, so that a layer which was evaluated first would pass no gradient on when it is trained.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, training in modes:
        module.training = training and "qweight" in module._buffers
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
