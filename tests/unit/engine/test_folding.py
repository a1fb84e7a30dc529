"""Which merged weights the kernel is trusted with; the kernel itself, by Triton's interpreter."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from swift_lora_fix.engine.vllm.slots.plan import Region
from swift_lora_fix.engine.vllm.weights import folding
from swift_lora_fix.policy import merging


def factors(rows: int = 70, columns: int = 50, rank: int = 12, dtype: torch.dtype = torch.float16) -> merging.Factors:
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(rows, columns, generator=generator).to(dtype)
    return merging.Factors(w, torch.randn(rows, rank, generator=generator), torch.randn(rank, columns), 0.5)


def by_torch(
    out: torch.Tensor, w: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float, off: float = 0.0
) -> None:
    out.copy_(w.float() + scale * (b.float() @ a.float()) + off)


def region_of(made: merging.Factors, destination: torch.Tensor, row: int = 0, column: int = 0) -> Region:
    columns = made.w.shape[1]
    region = Region(destination, row * columns + column, (columns, 1))
    destination.copy_(region.region(made.w))
    return region


def test_a_region_is_folded_from_its_own_rows_and_columns() -> None:
    """As a tensor-parallel rank has it: columns of one packed weight, rows of another."""
    made, engine = factors(), torch.zeros(60, 40, dtype=torch.float16)
    region, folds = region_of(made, engine[5:25, :30], row=50, column=20), folding.Folding(by_torch)
    assert folds.accepts(made, region)
    assert torch.equal(region.destination, made.w[50:70, 20:50]), "the proof leaves W there"
    folds.write(made, region, region.destination)
    expected = (made.w.float() + 0.5 * (made.b @ made.a)).half()
    assert torch.equal(engine[5:25, :30], expected[50:70, 20:50])
    assert not engine[:5].any() and not engine[25:].any() and not engine[:, 30:].any()


def wrong_in_one_place(out: torch.Tensor, *rest: Any) -> None:
    by_torch(out, *rest)
    out[-1, -1] += 0.25


def lacks_a_rank(out: torch.Tensor, w: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float) -> None:
    by_torch(out, w, b[:, :-1], a[:-1], scale)


def fails(*_: Any) -> None:
    raise RuntimeError("out of shared memory")


def writes_nan(out: torch.Tensor, *_: Any) -> None:
    out.fill_(float("nan"))


WRONG = {"one place": wrong_in_one_place, "a rank": lacks_a_rank, "an error": fails, "nan": writes_nan}


@pytest.mark.parametrize("fold", WRONG.values(), ids=WRONG)
def test_a_kernel_that_is_wrong_is_not_trusted(fold: Any, caplog: pytest.LogCaptureFixture) -> None:
    made = factors()
    folds, region = folding.Folding(fold), region_of(made, torch.zeros(70, 50, dtype=torch.float16))
    assert not folds.accepts(made, region) and not folds.accepts(made, region)
    assert torch.equal(region.destination, made.w)
    said = [record.message for record in caplog.records if "the kernel gets wrong" in record.message]
    assert len(said) == 1


def test_each_kind_of_tensor_is_proved() -> None:
    seen = []

    def noting(out: torch.Tensor, *rest: Any) -> None:
        seen.append((out.dtype, tuple(out.shape)))
        by_torch(out, *rest)

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
def test_the_kernel_in_tritons_interpreter(rows: int, columns: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, edges, strides, ranks beyond one block. The interpreter has no bfloat16: one part, float32."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from swift_lora_fix.engine.vllm.kernels import fold_kernel

    kernel = importlib.reload(fold_kernel)
    made = factors(rows, columns + 7, rank)
    out = torch.zeros(rows + 3, columns + 5, dtype=torch.float16)
    kernel.fold(out[2 : rows + 2, 3 : columns + 3], made.w[:, 7:], made.b, made.a[:, 7:], 0.5, split=False)
    expected = made.w[:, 7:].double() + 0.5 * (made.b.double() @ made.a[:, 7:].double())
    torch.testing.assert_close(out[2 : rows + 2, 3 : columns + 3].double(), expected, rtol=2.0**-10, atol=1e-5)
    out[2 : rows + 2, 3 : columns + 3] = 0
    assert not out.any(), "nothing beside it"
