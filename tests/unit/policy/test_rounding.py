"""How merged weights are rounded: what arrives of a small update, and that the same policy has the same bits."""

from __future__ import annotations

import pytest
import torch

from swift_lora_fix.policy import rounding
from swift_lora_fix.policy.rounding import rounded, seed_of

SEED = seed_of("model.layers.0.mlp.up_proj.base_layer.weight")


def weight(rows: int = 1500, columns: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """W in bfloat16, and random numbers of size 1."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(rows, columns, generator=generator).bfloat16()
    return w, torch.randn(rows, columns, generator=generator)


def ulp(w: torch.Tensor) -> torch.Tensor:
    return torch.exp2(w.float().abs().log2().floor()) * 2.0**-7


@pytest.mark.parametrize("size", [0.01, 0.1, 0.3, 1.0])
def test_a_small_update_arrives(size: float) -> None:
    w, direction = weight()
    update = size * ulp(w) * direction
    held = rounded(w.float() + update, w, torch.bfloat16, SEED)

    def arrives(held: torch.Tensor) -> float:
        return float(((held.float() - w.float()) * update).sum() / update.square().sum())

    assert arrives(held) == pytest.approx(1, abs=0.05)
    nearest = arrives((w.float() + update).bfloat16())
    assert nearest < {0.01: 0.05, 0.1: 0.5, 0.3: 0.9, 1.0: 1.05}[size], "which is why"


def test_up_as_often_as_the_mean_wants_it() -> None:
    w = torch.full((400, 500), 1.0).bfloat16()
    for share in (0.03, 0.25, 0.5, 0.9):
        held = rounded(w.float() + share * 2.0**-7, w, torch.bfloat16, SEED)
        assert set(held.unique().tolist()) <= {1.0, 1.0 + 2.0**-7}
        assert float((held > 1).float().mean()) == pytest.approx(share, abs=0.005)


def test_neighbours_are_independent() -> None:
    """Rows, columns and weights do not go the same way together: their noise would not cancel."""
    ones = torch.ones(400, 400).bfloat16()
    up = [(rounded(ones.float() + 2.0**-8, ones, torch.bfloat16, s) > 1).double() - 0.5 for s in (SEED, SEED + 1)]
    for left, right in ((up[0][1:], up[0][:-1]), (up[0][:, 1:], up[0][:, :-1]), (up[0], up[1])):
        assert abs(float((left * right).mean())) < 0.25 * 0.02
    for sums in (up[0].mean(0), up[0].mean(1)):
        assert float(sums.std()) == pytest.approx(0.5 / 20, rel=0.25)


def test_without_an_update_not_a_bit_changes() -> None:
    w, _ = weight()
    assert torch.equal(rounded(w.float(), w, torch.bfloat16, SEED), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [0.01, 0.1, 1.0])
def test_to_a_weight_that_is_no_bfloat16_the_update_is_added_as_vllm_loads_it(size: float, dtype: torch.dtype) -> None:
    _, w = weight()
    w, (_, direction) = w.to(dtype), weight()
    assert torch.equal(rounded(w.float(), w, torch.bfloat16, SEED), w.bfloat16()), "the plain base, without an update"
    loaded = w.bfloat16().float()
    update = size * ulp(w) * direction.roll(1)
    held = rounded(w.float() + update, w, torch.bfloat16, SEED).float() - loaded
    assert float((held * update).sum() / update.square().sum()) == pytest.approx(1, abs=0.05)


def test_what_is_not_a_number_stays_so() -> None:
    """A GPU's NaN has all lower bits set."""
    bits = torch.tensor([[0x7FFFFFFF, 0x7FC00000, 0x7F800000], [-1, -0x400000, -0x800000]], dtype=torch.int32)
    held = rounded(bits.view(torch.float32), torch.zeros(2, 3), torch.bfloat16, SEED)
    assert held[:, :2].isnan().all() and torch.equal(held[:, 2], torch.tensor([torch.inf, -torch.inf]).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_finer_dtypes_are_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    w, direction = weight()
    value = w.float() + 1e-3 * direction
    assert torch.equal(rounded(value, w, dtype, SEED), value.to(dtype))


def test_a_slice_is_rounded_as_in_the_whole_and_so_are_more_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    w, direction = weight()
    monkeypatch.setattr(rounding, "ELEMENTS", 1 << 14)  # in many parts
    value = w.float() + 1e-3 * direction
    held = rounded(value, w, torch.bfloat16, SEED)
    rows, columns = slice(1020, 1100), slice(40, 170)
    part = rounded(value[rows, columns], w[rows, columns], torch.bfloat16, SEED, 1020, 40)
    assert torch.equal(part, held[rows, columns])
    stacked = rounded(value.view(3, 500, 300), w.view(3, 500, 300), torch.bfloat16, SEED)
    assert torch.equal(stacked.view(1500, 300), held)
    assert torch.equal(rounded(value[5], w[5], torch.bfloat16, SEED, 5), held[5]), "a bias has one dimension"


def test_each_sign_and_the_largest_numbers() -> None:
    w, direction = weight()
    held = rounded(-(w.float() + 1e-3 * direction), -w, torch.bfloat16, SEED)
    assert torch.equal(-held, rounded(w.float() + 1e-3 * direction, w, torch.bfloat16, SEED))
    most = torch.full((4, 4), torch.finfo(torch.bfloat16).max)
    assert torch.equal(rounded(most, most, torch.bfloat16, SEED), most.bfloat16())
