"""All that this package asks of a framework's trainer. A new framework implements these two, in a folder of its own.

Nothing else of a trainer is read or called anywhere: a name that a framework changes is changed in its port alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Weights = Mapping[str, torch.Tensor]
Load = Callable[[Any], Any]  # has vLLM load weights: a mapping of names to tensors, or what has its ``items()``


@dataclass(frozen=True)
class Answer:
    """One prompt's token ids, what the engine went on with, and the engine's logprob of each of those, in nats.

    request: what was asked, in the framework's own form, which its port alone looks into; None where that was ids.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    request: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Scored:
    """Some rollouts as both sides see them, logprobs in nats at the temperature that they were sampled at.

    engine: the engine's own; of each row those of its tokens, in order, or a tensor like ``trainer``.
    trainer: [rows, tokens], the trainer's. mask: [rows, tokens], true at tokens that the engine chose.
    """

    engine: Sequence[Sequence[float]] | torch.Tensor
    trainer: torch.Tensor
    mask: torch.Tensor


class BatchPort(Protocol):
    """The rollouts of one call, once the trainer has scored them and before it learns from them."""

    @property
    def why_not(self) -> str:
        """Why the engine's logprobs are not what the trainer computes of the same tokens, in words; empty where they
        are. The same on all ranks."""

    def scored(self, anew: bool) -> Sequence[Scored]:
        """Parts in which they were scored, as far as the engine's logprobs of them are known. anew: the trainer scores
        them once more, with nothing dropped out; a collective where its parameters are sharded."""


class RolloutPort(Protocol):
    """One call for rollouts that the framework is about to make."""

    @property
    def has_requests(self) -> bool:
        """Whether anything is asked for. (A multi-turn loop asks once more, for nobody.)"""

    @property
    def most_tokens(self) -> int:
        """Output tokens of the whole call, at most."""

    @property
    def has_media(self) -> bool:
        """Whether a request of this call has an image that the model looks at. (Of this rank's call.)"""

    def ask(self, prompts: Sequence[str], new_tokens: int, with_media: bool = False) -> list[Answer]:
        """Have the engine go on with ``prompts`` as user messages, over the path that rollouts take: sampled at
        temperature 1 with a fixed seed, ``new_tokens`` each at most. Lengths, settings and requests of the run's own
        rollout stay as they are, also where this fails.

        with_media: each with the first image of the first request that has one (where ``has_media``).
        """

    def tokens_per_second(self, most_tokens: int) -> float:
        """Make this rollout with ``most_tokens`` tokens an answer at most, throw it away, and say how fast it was. It
        leaves as little behind as ``ask``."""


class TrainerPort(Protocol):
    """One trainer, seen from this package. It must not keep the trainer alive."""

    # ---- who it is ---------------------------------------------------------------------------------------------------

    @property
    def model(self) -> torch.nn.Module:
        """The unwrapped ``peft.PeftModel`` that is trained."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def step(self) -> int:
        """Optimizer steps so far (transformers' ``global_step``)."""

    @property
    def ranks(self) -> int:
        """Processes of this run."""

    @property
    def is_main_rank(self) -> bool: ...

    # ---- what its user asked for -------------------------------------------------------------------------------------

    @property
    def uses_vllm(self) -> bool: ...

    @property
    def tuner(self) -> str:
        """``lora`` where a LoRA is trained."""

    @property
    def engine_place(self) -> str:
        """``colocate``: vLLM runs in this process; ``server``: in rollout servers."""

    @property
    def engine_has_lora(self) -> bool:
        """Whether vLLM has LoRA layers."""

    @property
    def sleep_level(self) -> int:
        """vLLM's sleep level between rollouts. 0: never; 1: weights go to the host; 2: weights are thrown away."""

    @property
    def offloads_model(self) -> bool:
        """Whether its model is on the host while rollouts are made, and back when the call for rollouts returns."""

    @property
    def is_asynchronous(self) -> bool:
        """Whether rollouts are made in another thread while the next step is trained."""

    @property
    def resume_from(self) -> str | None:
        """The checkpoint that the run claims to go on from."""

    # ---- its engine --------------------------------------------------------------------------------------------------

    @property
    def vllm_engine(self) -> Any:
        """The ``vllm.LLMEngine`` of this process as it is now."""

    @property
    def server_client(self) -> Any:
        """The client of the rollout servers as it is now; None where they are not used, and on other ranks."""

    @property
    def adapter_request_class(self) -> Any:
        """The ``LoRARequest`` that takes tensors: fields ``lora_name``, ``lora_int_id``, ``lora_path``,
        ``peft_config``, ``lora_tensors``."""

    @property
    def attaches_adapter(self) -> bool:
        """Whether rollouts name the adapter, so that vLLM's LoRA layers apply it."""

    def attach_adapter(self, wanted: bool) -> None:
        """From now on rollouts name it, or not."""

    # ---- what a probe must know --------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any: ...

    @property
    def longest_prompt(self) -> int | None:
        """Tokens of the longest prompt and answer together; None where nothing limits them."""

    def scoring(self) -> AbstractContextManager[None]:
        """Around a forward of ``model`` that is none of training's."""

    def encoded(self, answers: Sequence[Answer]) -> Mapping[str, Any]:
        """What the framework gives its model for these prompts and answers, media included: the model's keyword
        arguments, on ``device``, and ``labels`` (rows, width), int64: the answers' tokens, and -100 elsewhere. One row
        an answer, padded on either side."""

    # ---- what it is told to do ---------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Before training begins, and after its engine was made."""

    def send_base(self, load: Callable[[Load, Weights], Any], note: Callable[[Weights], None]) -> None:
        """Send the model to the engine without its adapter, in the framework's own way and under the engine's names.

        Args:
            load: is called in place of each of the framework's loads, with that load and what it was to be given.
            note: is told the trainer's own names of tensors that are about to be renamed.

        The trainer is only read: nothing is merged.
        """

    def sync_again(self) -> None:
        """The next call for rollouts begins with a sync, whatever the step."""

    def wait_for_rollouts(self) -> None:
        """Return when none is made any more. (Asynchronous ones; a collective.)"""

    def metrics(self) -> MutableMapping[str, list[float]] | None:
        """By name the numbers of this logging interval, to add to; None where it keeps none."""
