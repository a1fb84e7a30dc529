"""One call with which TRL has the engine generate, and our own probes on the path that it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...common.log import warning
from ...trainer import Answer
from .port import TrlTrainer


class TrlRollout:
    """One call of ``LLM.generate`` for a trainer. infer: the call itself; the rest are its arguments."""

    def __init__(
        self,
        trainer: TrlTrainer,
        infer: Callable[..., Any],
        prompts: Any,
        sampling_params: Any = None,
        **kwargs: Any,
    ) -> None:
        self._trainer, self._infer, self._again = trainer, infer, infer
        self._prompts = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
        self._sampling = sampling_params

    @property
    def has_requests(self) -> bool:
        return bool(self._prompts)

    @property
    def most_tokens(self) -> int:
        return len(self._prompts) * int(self._sampling.n or 1) * int(self._sampling.max_tokens or 0)

    @property
    def has_media(self) -> bool:
        return any(map(images_of, self._prompts))

    def ask(self, prompts: Sequence[str], new_tokens: int, with_media: bool = False) -> list[Answer]:
        from vllm import SamplingParams

        how = SamplingParams(temperature=1.0, max_tokens=new_tokens, logprobs=0, seed=0)
        requests = [self._about_image(text) if with_media else None for text in prompts]
        asked = [self._asked(text, request) for text, request in zip(prompts, requests)]
        answers = []
        for output, request in zip(self._infer(asked, how, use_tqdm=False), requests):
            answer = output.outputs[0]
            logprobs = tuple(float(at[token].logprob) for at, token in zip(answer.logprobs, answer.token_ids))
            answers.append(Answer(tuple(output.prompt_token_ids), tuple(answer.token_ids), logprobs, request))
        return answers

    def _about_image(self, text: str) -> tuple[str, Any]:
        """A prompt of ``text`` about the first image of this call, and that image."""
        image = next(image for prompt in self._prompts for image in images_of(prompt))
        return self._trainer.image_prompt(text), image

    def _asked(self, text: str, request: tuple[str, Any] | None) -> dict[str, Any]:
        """For vLLM, which expands an image's one placeholder itself."""
        if request is None:
            return {"prompt_token_ids": self._trainer.prompt_ids(text)}
        ids = self._trainer.tokenizer(request[0])["input_ids"]
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": request[1]}}

    def check_prompts(self, outputs: Sequence[Any]) -> None:
        """Warn once where TRL gave vLLM an image's placeholder expanded already, and vLLM expanded it once more."""
        placeholder = getattr(self._trainer.generation.processing_class, "image_token_id", None)
        for prompt, output in zip(self._prompts, outputs):
            images = images_of(prompt)
            if self._trainer.told_of_prompts or not images or "prompt_token_ids" not in prompt:
                continue
            ids = prompt["prompt_token_ids"]
            if ids.count(placeholder) > len(images) and len(output.prompt_token_ids) > len(ids):
                self._trainer.told_of_prompts = True
                warning(
                    f"TRL gave vLLM a prompt about an image in {len(ids)} tokens, and vLLM answers one of "
                    f"{len(output.prompt_token_ids)}: the image's placeholder was expanded already, and vLLM expanded "
                    "it once more (https://github.com/huggingface/trl/issues/6294). So TRL's rollouts about images "
                    "answer other prompts than those it trains on, whatever weights the engine holds. The gate's "
                    "questions about an image are not affected. It takes a TRL that mends this issue."
                )

    def tokens_per_second(self, most_tokens: int) -> float:
        how = self._sampling.clone()
        how.max_tokens = min(most_tokens, int(how.max_tokens or most_tokens))
        started = time.perf_counter()
        outputs = self._again(self._prompts, how, use_tqdm=False)
        seconds = time.perf_counter() - started
        return max(1, sum(len(answer.token_ids) for output in outputs for answer in output.outputs)) / seconds


class TrlChat(TrlRollout):
    """One call of ``LLM.chat``, which a ``rollout_func`` may make. chat: the call itself; infer: ``LLM.generate``, for
    our probes; the rest are the call's arguments."""

    def __init__(
        self, trainer: TrlTrainer, infer: Callable[..., Any], chat: Callable[..., Any], *args: Any, **kwargs: Any
    ):
        super().__init__(trainer, infer, *args, **kwargs)
        self._again = chat


def images_of(prompt: Any) -> list[Any]:
    """The images of one prompt for vLLM: TRL gives it a list of them, or one alone."""
    images = (prompt.get("multi_modal_data") or {}).get("image") if isinstance(prompt, Mapping) else None
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


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
    def has_media(self) -> bool:
        return False  # images of a batch are not probed with there

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
