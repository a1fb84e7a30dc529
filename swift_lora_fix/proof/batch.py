"""The real batch: the rollouts' own logprobs against the trainer's of the same tokens. Tensors in, numbers out.

The trainer scores its rollouts anyway, so this costs a few small kernels and one copy to the host. Unlike a probe it
sees the run's real prompts: their images, tools and lengths. It decides nothing, because it has no floor and no
hypotheses of its own: it is a number to watch, and evidence beside a verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..common.ranks import gathered
from ..trainer import Scored
from .verdict import LARGEST_GAP, Distance


@dataclass(frozen=True)
class Batch:
    """The rollouts of one call, on all ranks together. distance: engine against trainer, NaN if any logprob is not
    finite. tokens: how many were compared."""

    distance: Distance
    tokens: int

    def __str__(self) -> str:
        found = self.distance
        return (
            f"mean |logprob difference| {found.mean:.3g} (max {found.max:.3g}, KL {found.kl:.3g}) over the "
            f"{self.tokens} tokens of the last rollouts"
        )


def compare(parts: Sequence[Scored], ranks: int, device: torch.device) -> tuple[Batch | None, str]:
    """The distance over all ``parts`` of all ranks, and why a part of this rank is not in it ("" if all are).

    A collective with more than one rank; a rank may come with no parts. One copy to the host. None: no rank has a
    token.
    """
    sums, wrong = torch.zeros(5, device=device), ""
    for part in parts:
        gaps = gaps_of(part)
        if isinstance(gaps, str):
            wrong = gaps
        elif gaps.numel():
            sums = _together(torch.stack([sums, _sums_of(gaps)]))
    if ranks > 1:
        sums = _together(gathered(sums, ranks))
    tokens, size, highest, kl, broken = sums.tolist()
    if not tokens:
        return None, wrong
    if broken:
        return Batch(Distance(float("nan"), float("nan"), float("nan")), int(tokens)), wrong
    return Batch(Distance(size / tokens, highest, kl / tokens), int(tokens)), wrong


def gaps_of(part: Scored) -> torch.Tensor | str:
    """logprob trainer - engine of each rollout token, [tokens] in float32 nats, row by row; or why they do not match.

    If the engine's come as lists, a row may have one token more than the trainer's: the one that ended the answer,
    which ms-swift does not train on.
    """
    mask = part.mask.bool()
    if part.trainer.shape != mask.shape:
        return f"the trainer's logprobs have the shape {tuple(part.trainer.shape)}, their mask {tuple(mask.shape)}"
    held = part.trainer.detach()[mask].float()
    if isinstance(part.engine, torch.Tensor):
        if part.engine.shape != mask.shape:
            return f"the engine's logprobs have the shape {tuple(part.engine.shape)}, their mask {tuple(mask.shape)}"
        return held - part.engine.detach()[mask].to(held)
    if len(part.engine) != mask.shape[0]:
        return f"those of only {len(part.engine)} of {mask.shape[0]} rollouts are known and fit their tokens"
    served: list[float] = []
    for row, count in zip(part.engine, mask.sum(1).tolist()):
        if len(row) not in (count, count + 1):
            return f"a rollout has {len(row)} logprobs for {count} tokens"
        served += row[:count]
    return held - torch.tensor(served, dtype=torch.float32).to(held.device)


def drops_out(model: torch.nn.Module) -> bool:
    """Whether a forward of ``model`` in its current mode is random: by dropout, or noise on the embeddings."""
    return any(module.training and (_rate(module) > 0 or _is_noisy(module)) for module in model.modules())


def _is_noisy(module: torch.nn.Module) -> bool:
    """Whether transformers' NEFTune adds noise to what this embedding gives in training
    (``transformers.integrations.neftune``)."""
    return bool(vars(module).get("neftune_noise_alpha"))


def _rate(module: torch.nn.Module) -> float:
    """The rate of a dropout layer, or of an attention layer that passes it to a function of PyTorch's."""
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return float(module.p)
    rate = vars(module).get("attention_dropout")
    return float(rate) if isinstance(rate, (int, float)) else 0.0


def _sums_of(gaps: torch.Tensor) -> torch.Tensor:
    """[tokens, sum of |gap|, largest |gap|, sum of k3, tokens that are not finite]"""
    fine = gaps.isfinite()
    clean = gaps.where(fine, torch.zeros_like(gaps))
    sizes = clean.abs()
    kl = clean.clamp(max=LARGEST_GAP).expm1() - clean
    tokens, broken = torch.full_like(sizes[0], gaps.numel()), (~fine).sum().to(sizes)
    return torch.stack([tokens, sizes.sum(), sizes.max(), kl.sum(), broken])


def _together(rows: torch.Tensor) -> torch.Tensor:
    """[n, 5] to [5]: the third is a maximum, the others are sums."""
    sums = rows.sum(0)
    sums[2] = rows[:, 2].max()
    return sums
