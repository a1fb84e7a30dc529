"""One call with which ms-swift has its engine generate, and our own probes on the path that it takes."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...server.wire import PROBE
from ...trainer import Answer
from .encoding import MEDIA, fields_of, media_of
from .port import SwiftTrainer, rollout_module


class SwiftRollout:
    """One call of ms-swift's ``_engine_infer``. infer: the call itself, ``infer(requests, config)``."""

    def __init__(
        self,
        trainer: SwiftTrainer,
        infer: Callable[[Sequence[Any], Any], Sequence[Any]],
        infer_requests: Sequence[Any],
        request_config: Any = None,
        **kwargs: Any,
    ) -> None:
        self._trainer, self._infer, self._requests, self._config = trainer, infer, infer_requests, request_config

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    @property
    def most_tokens(self) -> int:
        answers = len(self._requests) * int(self._config.n or 1)
        return answers * int(self._config.max_tokens or 0)

    @property
    def has_media(self) -> bool:
        return self._trainer.sees_media and any(media_of(request) for request in self._requests)

    def ask(self, prompts: Sequence[str], new_tokens: int, with_media: bool = False) -> list[Answer]:
        assert self.has_media or not with_media, "whoever asks with media has looked whether there are any"
        like = max(self._requests, key=lambda request: len(media_of(request))) if with_media else self._requests[0]
        media = media_of(like) if with_media else {}
        requests = [_request(like, index, text, media) for index, text in enumerate(prompts)]
        asked = copy.deepcopy(requests)  # ms-swift stores loaded media in the request that it encodes
        answers = []
        with self._trainer.undisturbed():
            outputs = self._infer(asked, _probe_config(self._config, new_tokens))
        for output, request in zip(outputs, requests):
            choice = output.response.choices[0]
            logprobs = tuple(_number(item["logprob"]) for item in choice.logprobs["content"])
            prompt = tuple(output.response.prompt_token_ids)
            answers.append(Answer(prompt, tuple(choice.token_ids), logprobs, request))
        return answers

    def tokens_per_second(self, most_tokens: int) -> float:
        limit = min(most_tokens, int(self._config.max_tokens or most_tokens))
        config = altered(self._config, max_tokens=limit, return_details=True)
        requests = copy.deepcopy(self._requests)
        with self._trainer.undisturbed():
            started = time.perf_counter()
            outputs = self._infer(requests, config)
            seconds = time.perf_counter() - started
        tokens = sum(len(choice.token_ids or ()) for output in outputs for choice in output.response.choices)
        return max(1, tokens) / seconds


def probe_rollout(trainer: Any, infer: Callable[[Sequence[Any], Any], Sequence[Any]]) -> SwiftRollout:
    """A rollout call of our own, to ask the engine a probe when no rollout is being made. infer: ms-swift's own
    ``_engine_infer`` of this trainer."""
    like: dict[str, Any] = {"messages": []}
    request = rollout_module(type(trainer)).RolloutInferRequest(**like)
    return SwiftRollout(SwiftTrainer(trainer), infer, [request], trainer.request_config)


def tag(outputs: Any, step: int | None, digest: str) -> Any:
    """Write the policy that made the rollouts into ``rollout_infos`` of ms-swift's ``RolloutOutput``."""
    for output in outputs if isinstance(outputs, list) else ():
        if isinstance(output.rollout_infos, dict):
            output.rollout_infos.update(policy_step=step, policy_digest=digest)
    return outputs


def altered(config: Any, **values: Any) -> Any:
    """A copy of a request config with these values; those that this release of ms-swift lacks are skipped."""
    changed = copy.copy(config)
    known = inspect.signature(type(config)).parameters
    for name, value in values.items():
        if name in known:
            setattr(changed, name, value)
    return changed


def _request(like: Any, index: int, text: str, media: Mapping[str, Any]) -> Any:
    """A request like the run's own, but with only ``text`` and ``media``: no tools, no data of a scheduler."""
    request = copy.copy(like)
    fields = fields_of(request)
    fields["messages"] = [{"role": "user", "content": text}]
    for name in (*MEDIA, "videos"):
        if fields.get(name):
            fields[name] = list(media.get(name, ()))
    if fields.get("objects"):  # boxes in images
        fields["objects"] = {}
    if fields.get("tools"):
        fields["tools"] = None
    for name in ("uuid", "request_id"):
        if name in fields:
            fields[name] = f"{PROBE}{index}"
    return copy.deepcopy(request)


def _probe_config(like: Any, new_tokens: int) -> Any:
    sampling = dict(temperature=1.0, top_k=-1, top_p=1.0, min_p=0.0, repetition_penalty=1.0, n=1, seed=0, stop=[])
    answer = dict(max_tokens=new_tokens, logprobs=True, top_logprobs=None, return_details=True, stream=False)
    return altered(like, structured_outputs_regex=None, **sampling, **answer)


def _number(logprob: float | None) -> float:
    """A rollout server's JSON has null where a number is not finite."""
    return float("nan") if logprob is None else float(logprob)
