"""Rollouts that ms-swift has scored, read for the comparison of the engine's logprobs with the trainer's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...proof.probe import evaluating, same_random_state
from ...trainer import Scored


class SwiftBatch:
    """The result of ``_prepare_batch_inputs`` of ms-swift's GRPO trainer for ``samples``. It has then scored each of
    ``batches`` (``old_per_token_logps``), in the model's current mode and at the temperature of the rollouts."""

    def __init__(self, trainer: Any, samples: Sequence[Any], *, batches: Sequence[Any]) -> None:
        self.trainer, self._samples, self._batches = trainer, samples, batches

    @property
    def why_not(self) -> str:
        trainer, config = self.trainer, vars(self.trainer.request_config)
        if not config["logprobs"]:
            return "this release of ms-swift does not ask vLLM for them"
        if trainer.template.sequence_parallel_size > 1:
            return "with sequence parallelism each rank scores the rollouts of others"
        if not trainer.temperature > 0:
            return "they were sampled at temperature 0"
        if not trainer.vllm_version_ge_0_10_2:  # its logprobs are from before temperature, top_k and the like
            return "" if trainer.temperature == 1 else "this vLLM's do not know the temperature"
        altering = [f"{name} {config[name]}" for name, plain in _PLAIN.items() if config.get(name) not in plain]
        return f"sampling altered them ({', '.join(altering)})" if altering else ""

    @property
    def temperature(self) -> float:
        return float(self.trainer.temperature)

    def scored(self, anew: bool) -> list[Scored]:
        parts, start = [], 0
        for batch in self._batches:
            # from 4.4.0 on, a batch keeps the loss's inputs apart from the model's
            values = vars(batch["grpo_batch"]) if "grpo_batch" in batch else batch
            mask = values["completion_mask"]
            samples = self._samples[start : start + len(mask)]
            start += len(mask)
            held = self._score(batch) if anew else values["old_per_token_logps"]
            served: Any = values["rollout_per_token_logps"]
            if served is None:  # up to 4.3.2, ms-swift only fills it in for an importance correction
                early = () if "grpo_batch" in batch else samples
                served = [_flat(sample["rollout_logprobs"]) for sample in early if "rollout_logprobs" in sample]
            parts.append(Scored(served, held, mask))
        return parts

    def _score(self, batch: Any) -> torch.Tensor:
        """Score again without dropout; the random state is restored."""
        trainer, apart = self.trainer, "grpo_batch" in batch
        inputs = (dict(batch["model_inputs"]), batch["grpo_batch"]) if apart else (dict(batch),)
        more = {"origin_data": batch["_origin_data"]} if apart and "_origin_data" in batch else {}
        model, device = trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator.device
        with torch.no_grad(), evaluating(model), same_random_state(device):
            logps: torch.Tensor = trainer._get_per_token_logps_and_entropies(trainer.model, *inputs, **more)[0]
        return logps


# Request settings with which vLLM samples from the model's own distribution at the temperature.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "top_k": (-1, 0),
    "top_p": (1.0,),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
    "presence_penalty": (None, 0.0),
    "frequency_penalty": (None, 0.0),
    "structured_outputs_regex": (None, ""),
}


def _flat(turns: Sequence[Sequence[float]]) -> list[float]:
    return [logprob for turn in turns for logprob in turn]
