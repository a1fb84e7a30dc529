"""What this package needs from a framework's trainer. A new framework implements these ports in its own folder.

No other code reads a trainer: when a framework renames something, only its port changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .common.words import Words

Weights = Mapping[str, torch.Tensor]
Load = Callable[[Any], Any]  # loads weights into vLLM: a mapping of names to tensors, or what has its ``items()``


@dataclass(frozen=True)
class Answer:
    """One answer of the engine, as token ids.

    prompt, tokens: ids of the prompt and of the answer. logprobs: the engine's logprob of each answer token, in nats.
    request: the request in the framework's own form, read only by its port; None when the engine was asked with ids.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    request: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Scored:
    """Rollouts as engine and trainer score them: logprobs in nats, at the sampling temperature.

    engine: the engine's logprobs: for each row those of its tokens, in order, or a tensor like ``trainer``.
    trainer: [rows, tokens], the trainer's logprobs. mask: [rows, tokens], true at tokens that the engine chose.
    """

    engine: Sequence[Sequence[float]] | torch.Tensor
    trainer: torch.Tensor
    mask: torch.Tensor


class BatchPort(Protocol):
    """The rollouts of one call, after the trainer has scored them and before it learns from them."""

    @property
    def why_not(self) -> str:
        """Why the engine's and the trainer's logprobs of the same tokens cannot be compared in this run; empty if they
        can. The same on all ranks."""

    @property
    def temperature(self) -> float:
        """At which both took the logprobs. Below 1 it magnifies how far apart they are."""

    def scored(self, anew: bool) -> Sequence[Scored]:
        """The rollouts in the parts that were scored together, where the engine's logprobs are known. anew: score them
        again without dropout, a collective when parameters are sharded."""


class RolloutPort(Protocol):
    """One rollout call that the framework is about to make."""

    @property
    def has_requests(self) -> bool:
        """Whether the call has any requests. (The last call of a multi-turn loop may have none.)"""

    @property
    def most_tokens(self) -> int:
        """Upper bound on the output tokens of the whole call."""

    @property
    def has_media(self) -> bool:
        """Whether a request of this call, on this rank, has an image or a sound that the model takes."""

    def ask(self, prompts: Sequence[str], new_tokens: int, with_media: bool = False) -> list[Answer]:
        """Generate answers to ``prompts`` as user messages, on the path that rollouts take: temperature 1, fixed seed,
        at most ``new_tokens`` each. Lengths, settings and requests of the run's own rollout are kept, also on errors.

        with_media: attach to each the first image and the first sound of one request (needs ``has_media``).
        """

    def tokens_per_second(self, most_tokens: int) -> float:
        """Generate this rollout with at most ``most_tokens`` tokens an answer, discard it, and return its output tokens
        per second. Like ``ask`` it leaves the run's state unchanged."""


class TrainerPort(Protocol):
    """One trainer, as this package sees it. It must not keep the trainer alive."""

    @property
    def words(self) -> Words: ...

    # ---- who it is ---------------------------------------------------------------------------------------------------

    @property
    def model(self) -> torch.nn.Module:
        """The unwrapped ``peft.PeftModel`` that is trained."""

    @property
    def device(self) -> torch.device:
        """The device that it computes on."""

    @property
    def step(self) -> int:
        """Optimizer steps so far (transformers' ``global_step``)."""

    @property
    def ranks(self) -> int:
        """Number of processes in this run."""

    @property
    def is_main_rank(self) -> bool: ...

    # ---- what its user asked for -------------------------------------------------------------------------------------

    @property
    def uses_vllm(self) -> bool: ...

    @property
    def tuner(self) -> str:
        """``lora`` when a LoRA is trained."""

    @property
    def engine_place(self) -> str:
        """Where vLLM runs. ``colocate``: in this process; ``server``: in rollout servers with this package;
        ``folders``: in a plain ``vllm serve``, which loads adapters from folders."""

    @property
    def engine_has_lora(self) -> bool:
        """Whether vLLM has LoRA layers."""

    @property
    def sleep_level(self) -> int:
        """vLLM's sleep level between rollouts. 0: no sleep; 1: weights move to the host; 2: weights are discarded."""

    @property
    def offloads_model(self) -> bool:
        """Whether the model is offloaded to the host during rollouts, and back on its device when the call returns."""

    @property
    def is_asynchronous(self) -> bool:
        """Whether another thread generates rollouts while the next step is trained."""

    @property
    def output_folder(self) -> str:
        """Where the run writes."""

    @property
    def resume_from(self) -> str | None:
        """The checkpoint that the run says it resumes from."""

    # ---- its engine --------------------------------------------------------------------------------------------------

    @property
    def vllm_engine(self) -> Any:
        """This process's current ``vllm.LLMEngine``."""

    @property
    def server_client(self) -> Any:
        """The current client of the rollout servers; None without servers, and on all ranks but the main one. For
        ``folders`` it has ``base_url``, and ``model``, the name that its requests ask for."""

    @property
    def adapter_request_class(self) -> Any:
        """The ``LoRARequest`` subclass that takes tensors: fields ``lora_name``, ``lora_int_id``, ``lora_path``,
        ``peft_config``, ``lora_tensors``."""

    @property
    def attaches_adapter(self) -> bool:
        """Whether rollout requests name the adapter, so that vLLM's LoRA layers apply it."""

    def attach_adapter(self, wanted: bool) -> None:
        """Make later rollout requests name the adapter, or not."""

    # ---- what a probe must know --------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any: ...

    @property
    def longest_prompt(self) -> int | None:
        """Limit on the tokens of prompt and answer together; None without a limit."""

    @property
    def template_tokens(self) -> int:
        """How many tokens its rollouts have around a prompt's own text: roles, a system prompt, a thinking prefix."""

    def scoring(self) -> AbstractContextManager[None]:
        """Context for a forward of ``model`` that does not belong to training."""

    def encoded(self, answers: Sequence[Answer]) -> Mapping[str, Any]:
        """What the framework would feed its model for these prompts and answers, media included: the model's keyword
        arguments, on ``device``, and ``labels`` (rows, width), int64: token ids at the answers' tokens, -100 elsewhere.
        One row an answer, padded left or right."""

    # ---- what it is told to do ---------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Called after its engine was made, before training begins."""

    def send_base(self, load: Callable[[Load, Weights], Any], note: Callable[[Weights], None]) -> None:
        """Send the model without its adapter to the engine: the framework's own way, under the engine's names.

        Args:
            load: replaces each of the framework's load calls; gets that call and the weights it would have loaded.
            note: gets the trainer's own names of tensors, just before the framework renames them.

        The trainer is only read: nothing is merged.
        """

    def sync_again(self) -> None:
        """Make the next rollout call begin with a sync, even if the step is the same."""

    def wait_for_rollouts(self) -> None:
        """Wait until no asynchronous rollout is running. A collective."""

    def metrics(self) -> MutableMapping[str, list[float]] | None:
        """The metrics of this logging interval by name, to append to; None when the trainer keeps none."""
