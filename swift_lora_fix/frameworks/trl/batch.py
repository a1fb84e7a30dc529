"""Rollouts that TRL has scored, read for the comparison of the engine's logprobs with the trainer's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ...proof.probe import evaluating, same_random_state
from ...trainer import Scored


class TrlBatch:
    """Rollouts that ``trainer`` has scored: what ``_generate_and_score_completions`` of its GRPO returns."""

    def __init__(self, trainer: Any, batch: Mapping[str, Any]) -> None:
        self.trainer, self._batch = trainer, batch

    @property
    def why_not(self) -> str:
        trainer, generation = self.trainer, self.trainer.vllm_generation
        if trainer.rollout_func is not None:
            return "a rollout_func of the user's made them"
        if "sampling_per_token_logps" not in self._batch:
            return "TRL did not get them from vLLM"
        if "old_per_token_logps" not in self._batch:
            return "TRL does not score its rollouts here (vllm_importance_sampling_correction is off)"
        if not generation.temperature > 0:
            return "they were sampled at temperature 0"
        asked = {name: getattr(generation, name, plain[0]) for name, plain in _PLAIN.items()}
        asked |= generation.generation_kwargs
        altering = [f"{name} {asked[name]}" for name, plain in _PLAIN.items() if asked[name] not in plain]
        if asked.get("temperature", generation.temperature) != generation.temperature:
            altering.append(f"temperature {asked['temperature']}")
        return f"sampling altered them ({', '.join(altering)})" if altering else ""

    @property
    def temperature(self) -> float:
        return float(self.trainer.vllm_generation.temperature)

    def scored(self, anew: bool) -> list[Scored]:
        batch = self._batch
        mask = batch["completion_mask"] * batch["tool_mask"] if "tool_mask" in batch else batch["completion_mask"]
        held = self._score() if anew else batch["old_per_token_logps"]
        return [Scored(batch["sampling_per_token_logps"], held, mask)]

    def _score(self) -> torch.Tensor:
        """Score again without dropout; the random state is restored. What the model gets beside the ids (images) is in
        the batch under the names that TRL's own scoring takes."""
        trainer, batch = self.trainer, self._batch
        score = trainer._get_per_token_logps_and_entropies
        ids, mask = (torch.cat([batch[f"prompt_{what}"], batch[f"completion_{what}"]], 1) for what in ("ids", "mask"))
        parameters, args = inspect.signature(score).parameters, trainer.args
        more = {name: batch[name] for name in parameters if name in batch}
        if "batch_size" in parameters:  # as TRL's own: the whole batch at a time may be more than the memory holds
            of_training, of_evaluation = args.per_device_train_batch_size, args.per_device_eval_batch_size
            more["batch_size"] = of_training if trainer.model.training else of_evaluation
        model, device = trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator.device
        with torch.no_grad(), evaluating(model), same_random_state(device):
            logps: torch.Tensor = score(trainer.model, ids, mask, batch["completion_ids"].size(1), **more)[0]
        return logps


# Sampling settings with which vLLM samples from the model's own distribution at the temperature.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "top_k": (-1, 0, None),
    "top_p": (1.0,),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
    "structured_outputs_regex": (None, ""),
    # of generation_kwargs alone
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None, []),
    "bad_words": (None, []),
    "min_tokens": (0, None),
    "structured_outputs": (None,),
}
