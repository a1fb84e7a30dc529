"""Which merged weights the kernel is trusted with; the kernel itself, by Triton's interpreter."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch

from swift_lora_fix.engine.vllm.slots.plan import Region
from swift_lora_fix.engine.vllm.weights import folding
from swift_lora_fix.policy import merging
from swift_lora_fix.policy.rounding import rounded

both = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


def factors(rows: int = 70, columns: int = 50, rank: int = 12, dtype: torch.dtype = torch.float16) -> merging.Factors:
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(rows, columns, generator=generator).to(dtype)
    return merging.Factors(w, torch.randn(rows, rank, generator=generator), torch.randn(rank, columns), 0.5, 77)


def merged(made: merging.Factors, dtype: torch.dtype) -> torch.Tensor:
    value = made.w.float() + made.scale * (made.b.float() @ made.a.float())
    return rounded(value, made.w, dtype, made.seed, made.row, made.column)


def by_torch(out: torch.Tensor, made: merging.Factors) -> None:
    out.copy_(merged(made, out.dtype))


def region_of(made: merging.Factors, destination: torch.Tensor, row: int = 0, column: int = 0) -> Region:
    columns = made.w.shape[1]
    region = Region(destination, row * columns + column, (columns, 1))
    destination.copy_(region.region(made.w))
    return region


@both
def test_a_region_is_folded_from_its_own_rows_and_columns(dtype: torch.dtype) -> None:
    """As a tensor-parallel rank has it: columns of one packed weight, rows of another."""
    made, engine = factors(dtype=dtype), torch.zeros(60, 40, dtype=dtype)
    region, folds = region_of(made, engine[5:25, :30], row=50, column=20), folding.Folding(by_torch)
    assert folds.accepts(made, region)
    assert torch.equal(region.destination, made.w[50:70, 20:50]), "the proof leaves W there"
    folds.write(made, region, region.destination)
    assert torch.equal(engine[5:25, :30], merged(made, dtype)[50:70, 20:50]), "rounded as in the whole weight"
    assert not engine[:5].any() and not engine[25:].any() and not engine[:, 30:].any()


def wrong_in_one_place(out: torch.Tensor, made: merging.Factors) -> None:
    by_torch(out, made)
    out[-1, -1] += 0.25


def lacks_a_rank(out: torch.Tensor, made: merging.Factors) -> None:
    by_torch(out, dataclasses.replace(made, b=made.b[:, :-1], a=made.a[:-1]))


def one_step_up(out: torch.Tensor, made: merging.Factors) -> None:
    """In one place, the other of the two neighbours that stochastic rounding has to choose between."""
    by_torch(out, made)
    out.view(torch.int16)[3, 3] += 1


def has_another_seed(out: torch.Tensor, made: merging.Factors) -> None:
    by_torch(out, dataclasses.replace(made, seed=made.seed + 1))


def fails(*_: Any) -> None:
    raise RuntimeError("out of shared memory")


def writes_nan(out: torch.Tensor, *_: Any) -> None:
    out.fill_(float("nan"))


WRONG = {
    "one place": wrong_in_one_place,
    "a rank": lacks_a_rank,
    "a step": one_step_up,
    "an error": fails,
    "nan": writes_nan,
}


@both
@pytest.mark.parametrize("fold", [*WRONG.values(), has_another_seed], ids=[*WRONG, "a seed"])
def test_a_kernel_that_is_wrong_is_not_trusted(fold: Any, dtype: Any, caplog: pytest.LogCaptureFixture) -> None:
    if fold is has_another_seed and dtype == torch.float16:
        pytest.skip("only bfloat16 is rounded by chance")
    made = factors(dtype=dtype)
    folds, region = folding.Folding(fold), region_of(made, torch.zeros(70, 50, dtype=dtype))
    assert not folds.accepts(made, region) and not folds.accepts(made, region)
    assert torch.equal(region.destination, made.w)
    said = [record.message for record in caplog.records if "the kernel gets wrong" in record.message]
    assert len(said) == 1


def test_each_kind_of_tensor_is_proved() -> None:
    seen = []

    def noting(out: torch.Tensor, made: merging.Factors) -> None:
        seen.append((out.dtype, tuple(out.shape)))
        by_torch(out, made)

    folds = folding.Folding(noting)
    for rows, dtype in ((70, torch.float16), (70, torch.float16), (30, torch.float16), (30, torch.bfloat16)):
        made = factors(rows, dtype=dtype)
        assert folds.accepts(made, region_of(made, torch.zeros(rows, 50, dtype=dtype)))
    assert seen == [(torch.float16, (70, 50)), (torch.float16, (30, 50)), (torch.bfloat16, (30, 50))]


def test_what_is_no_block_or_not_rounded_is_left_to_pytorch() -> None:
    made, folds = factors(), folding.Folding(by_torch)
    whole = torch.zeros(70, 50, dtype=torch.float16)
    assert not folding.Folding(None).accepts(made, region_of(made, whole))
    assert not folds.accepts(made, Region(whole.t(), 0, (1, 50))), "transposed"
    assert not folds.accepts(made, Region(whole.view(-1), 0, (1,)))
    assert not folds.accepts(made, Region(whole[:2, :30], 40, (50, 1))), "runs over the end of a row"
    assert not folds.accepts(made, region_of(made, torch.zeros(70, 50))), "float32 is held as it is"
    assert folding.of(torch.device("cpu")).accepts(made, region_of(made, whole)) is False


@pytest.mark.parametrize("rows, columns, rank", [(70, 50, 12), (64, 128, 64), (130, 300, 100), (1, 17, 1)])
@both
def test_the_kernel_in_tritons_interpreter(
    dtype: torch.dtype, rows: int, columns: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles, edges, strides, ranks beyond one block. The interpreter multiplies no bfloat16: one part, float32."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from swift_lora_fix.engine.vllm.kernels import fold_kernel

    kernel = importlib.reload(fold_kernel)
    made = factors(rows, columns + 7, rank, torch.float32)
    made.w.copy_(made.w.to(dtype))
    out = torch.zeros(rows + 3, columns + 5, dtype=dtype)
    part = dataclasses.replace(made, w=made.w[:, 7:], a=made.a[:, 7:], column=7)
    kernel.fold(out[2 : rows + 2, 3 : columns + 3], part, split=False)
    least, _, most = folding.between(part, slice(None), dtype)
    held = out[2 : rows + 2, 3 : columns + 3]
    assert bool(((least <= held) & (held <= most)).all())
    assert float((held != merged(part, dtype)).float().mean()) < 0.01, "as PyTorch does, but for the last bit of sums"
    out[2 : rows + 2, 3 : columns + 3] = 0
    assert not out.any(), "nothing beside it"
