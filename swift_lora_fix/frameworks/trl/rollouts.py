"""One call with which TRL has the engine generate, and our own probes on the path that it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from ...trainer import Answer
from .port import TrlTrainer


class TrlRollout:
    """One call of ``LLM.generate`` for a trainer. infer: the call itself; the rest are its arguments."""

    has_media = False  # images of a batch are not probed with here

    def __init__(
        self,
        trainer: TrlTrainer,
        infer: Callable[..., Any],
        prompts: Any,
        sampling_params: Any = None,
        **kwargs: Any,
    ) -> None:
        self._trainer, self._infer = trainer, infer
        self._prompts = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
        self._sampling = sampling_params

    @property
    def has_requests(self) -> bool:
        return bool(self._prompts)

    @property
    def most_tokens(self) -> int:
        return len(self._prompts) * int(self._sampling.n or 1) * int(self._sampling.max_tokens or 0)

    def ask(self, prompts: Sequence[str], new_tokens: int, with_media: bool = False) -> list[Answer]:
        from vllm import SamplingParams

        how = SamplingParams(temperature=1.0, max_tokens=new_tokens, logprobs=0, seed=0)
        asked = [{"prompt_token_ids": self._trainer.prompt_ids(text)} for text in prompts]
        answers = []
        for output in self._infer(asked, how, use_tqdm=False):
            answer = output.outputs[0]
            logprobs = tuple(float(at[token].logprob) for at, token in zip(answer.logprobs, answer.token_ids))
            answers.append(Answer(tuple(output.prompt_token_ids), tuple(answer.token_ids), logprobs))
        return answers

    def tokens_per_second(self, most_tokens: int) -> float:
        how = self._sampling.clone()
        how.max_tokens = min(most_tokens, int(how.max_tokens or most_tokens))
        started = time.perf_counter()
        outputs = self._infer(self._prompts, how, use_tqdm=False)
        seconds = time.perf_counter() - started
        return max(1, sum(len(answer.token_ids) for output in outputs for answer in output.outputs)) / seconds


class TrlServerRollout(TrlRollout):
    """One call of ``VLLMClient.generate``. infer: the call itself; the rest are its arguments."""

    def __init__(
        self,
        trainer: TrlTrainer,
        infer: Callable[..., Any],
        prompts: Sequence[Any],
        features: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(trainer, infer, prompts)
        self._arguments = kwargs

    @property
    def most_tokens(self) -> int:
        return len(self._prompts) * int(self._arguments["n"]) * int(self._arguments["max_tokens"])

    def ask(self, prompts: Sequence[str], new_tokens: int, with_media: bool = False) -> list[Answer]:
        how: dict[str, Any] = dict(n=1, temperature=1.0, max_tokens=new_tokens, logprobs=0)
        asked = [self._trainer.prompt_ids(text) for text in prompts]
        said = self._infer(asked, **how, generation_kwargs={"seed": 0})
        parts = zip(said["prompt_ids"], said["completion_ids"], said["logprobs"])
        return [Answer(tuple(ids), tuple(answer), tuple(at[0] for at in logps)) for ids, answer, logps in parts]

    def tokens_per_second(self, most_tokens: int) -> float:
        raise AssertionError("a server has one mode")
