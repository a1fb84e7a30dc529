"""The rollouts' own logprobs beside the trainer's: what is compared, what is not, and what comes out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from swift_lora_fix.proof import batch, probe
from swift_lora_fix.trainer import Scored

CPU = torch.device("cpu")
MASK = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
# at masked places stands what must not count
TRAINER = torch.tensor([[9.0, -1.0, -2.0, -1e10], [-3.0, -4.0, -5.0, -6.0], [math.nan, -1e10, math.inf, 0.0]])
ENGINE = [[-1.5, -2.0], [-3.0, -4.25, -5.0, -5.0], []]
GAPS = [0.5, 0.0, 0.0, 0.25, 0.0, -1.0]


def as_tensor(rows: list[list[float]]) -> torch.Tensor:
    """Like ms-swift: each at its place in the mask, zero elsewhere."""
    laid = torch.zeros(MASK.shape)
    laid[MASK.bool()] = torch.tensor([value for row in rows for value in row])
    return laid


def part(engine: Any = None, trainer: torch.Tensor = TRAINER, mask: torch.Tensor = MASK) -> Scored:
    return Scored(ENGINE if engine is None else engine, trainer, mask)


@pytest.mark.parametrize("engine", [ENGINE, as_tensor(ENGINE)], ids=["lists", "a tensor"])
@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.float()], ids=["int", "bool", "float"])
def test_each_token_beside_its_own(engine: Any, mask: torch.Tensor) -> None:
    found = batch.gaps_of(part(engine, mask=mask))
    assert isinstance(found, torch.Tensor) and found.tolist() == GAPS


def test_what_it_makes_of_them() -> None:
    found, wrong = batch.compare([part(), part(as_tensor(ENGINE))], 1, CPU)
    assert found is not None and not wrong and found.tokens == 12
    assert (found.distance.mean, found.distance.max) == (pytest.approx(1.75 / 6), 1.0)
    k3 = [math.exp(gap) - 1 - gap for gap in GAPS]
    assert found.distance.kl == pytest.approx(sum(k3) / 6)
    assert "over the 12 tokens" in str(found) and "0.292" in str(found)


def test_the_trainer_may_compute_in_half_precision_and_with_a_graph() -> None:
    trainer = TRAINER.bfloat16().requires_grad_()
    found = batch.gaps_of(part(as_tensor([ENGINE[0], [-3.0, -4.26, -5.0, -5.0], []]), trainer))
    assert isinstance(found, torch.Tensor) and found[3] == pytest.approx(0.26), "the engine's is not rounded"
    assert found.dtype is torch.float32 and not found.requires_grad


def test_the_token_that_ended_the_answer_may_be_the_engines_alone() -> None:
    found = batch.gaps_of(part([ENGINE[0] + [-7.0], *ENGINE[1:]]))
    assert isinstance(found, torch.Tensor) and found.tolist() == GAPS


@pytest.mark.parametrize(
    "engine, said",
    [
        ([ENGINE[0], ENGINE[1][:-1], []], "a rollout has 3 logprobs for 4 tokens"),
        ([ENGINE[0] + [0.0, 0.0], *ENGINE[1:]], "a rollout has 4 logprobs for 2 tokens"),
        (ENGINE[:2], "those of only 2 of 3 rollouts are known and fit their tokens"),
        ([], "only 0 of 3 rollouts"),
        (as_tensor(ENGINE)[:, 1:], r"the engine's logprobs have the shape \(3, 3\), their mask \(3, 4\)"),
    ],
)
def test_what_does_not_fit_is_said_and_the_rest_is_compared(engine: Any, said: str) -> None:
    assert batch.compare([part(engine)], 1, CPU)[0] is None
    found, wrong = batch.compare([part(), part(engine)], 1, CPU)
    assert found is not None and found.tokens == 6
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(wrong)


def test_the_trainers_own_shape() -> None:
    assert "the trainer's logprobs have the shape (1, 12)" in str(batch.gaps_of(part(trainer=TRAINER.view(1, 12))))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["engine", "trainer"])
def test_what_is_not_finite_is_no_number(side: str, value: float) -> None:
    rows, trainer = [list(row) for row in ENGINE], TRAINER.clone()
    if side == "engine":
        rows[1][2] = value
    else:
        trainer[1, 2] = value
    found, _ = batch.compare([part(rows, trainer)], 1, CPU)
    assert found is not None and found.tokens == 6
    assert all(math.isnan(number) for number in (found.distance.mean, found.distance.max, found.distance.kl))


def test_a_gap_beyond_all_numbers_stays_one() -> None:
    found, _ = batch.compare([part([[value * 1000 for value in row] for row in ENGINE])], 1, CPU)
    assert found is not None and found.distance.max > 1000 and math.isfinite(found.distance.kl)


def test_no_token_is_no_batch() -> None:
    assert batch.compare([], 1, CPU) == (None, "")
    empty = part([[], [], []], mask=torch.zeros_like(MASK))
    assert batch.compare([empty], 1, CPU) == (None, "")


def test_all_ranks_count_also_where_this_one_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    other = torch.tensor([6.0, 3.0, 2.5, 0.5, 0.0])
    monkeypatch.setattr(batch, "gathered", lambda row, ranks: torch.stack([row, other]))
    found, wrong = batch.compare([part()], 2, CPU)
    assert found is not None and (found.tokens, found.distance.max) == (12, 2.5)
    assert found.distance.mean == pytest.approx(4.75 / 12)
    found, wrong = batch.compare([part([])], 2, CPU)
    assert found is not None and found.distance.mean == 0.5 and "only 0 of 3" in wrong


def test_packed_layers_stay_as_they_train_while_the_model_is_evaluated() -> None:
    """gptqmodel's for a CPU, first run in evaluation, passes no gradient on for ever after."""

    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.zeros(1))

        def train(self, mode: bool = True) -> Any:
            raise AssertionError("it would be packed anew, and not be put back")

    packed, model = Packed(), torch.nn.Sequential(torch.nn.Dropout())
    model.append(packed)
    with probe.evaluating(model):
        assert packed.training and not model.training and not model[0].training
    assert model.training and model[0].training
    packed.training = False
    with probe.evaluating(model):
        assert not packed.training


def test_dropout_is_seen_and_switched_off() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5), torch.nn.Dropout(0.0).eval())
    assert batch.drops_out(model) and not batch.drops_out(torch.nn.Dropout(0.0))
    with pytest.raises(RuntimeError), probe.evaluating(model):
        assert not batch.drops_out(model)
        raise RuntimeError
    assert [module.training for module in model.modules()] == [True, True, True, False]
    attention = torch.nn.Module()
    attention.attention_dropout = 0.1  # type: ignore[assignment]  # as transformers' attention layers have it
    assert batch.drops_out(attention) and not batch.drops_out(attention.eval())


def test_noise_on_the_embeddings_is_at_random_too() -> None:
    try:
        from transformers.integrations.neftune import neftune_post_forward_hook
    except ImportError:  # transformers 4
        from transformers.trainer_utils import neftune_post_forward_hook

    embedding, tokens = torch.nn.Embedding(4, 4), torch.tensor([[1, 2]])
    assert not batch.drops_out(embedding)
    embedding.neftune_noise_alpha = 5.0  # type: ignore[assignment]  # as transformers' trainer activates it
    embedding.register_forward_hook(neftune_post_forward_hook)
    assert not torch.equal(embedding(tokens), embedding(tokens)) and batch.drops_out(embedding)
    embedding.eval()
    assert torch.equal(embedding(tokens), embedding(tokens)) and not batch.drops_out(embedding)
