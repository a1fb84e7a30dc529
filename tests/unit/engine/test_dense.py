"""The sums of dense LoRA layers: with PyTorch against float64, and the kernels by Triton's interpreter."""

from __future__ import annotations

import importlib
import logging
from types import ModuleType, SimpleNamespace

import pytest
import torch

from swift_lora_fix.engine.vllm.dense import asked, hooks, layers, op, proving
from swift_lora_fix.engine.vllm.dense.instrumentor import DenseLayers
from swift_lora_fix.errors import ContractError
from swift_lora_fix.install.instrumentor import Arming

SLICES = {"one": [130], "two": [40, 40], "qkv": [100, 33, 33], "four": [64, 64, 32, 7]}


def made(tokens: int, slices: list[int], rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A product of W·x and A·x as one tensor, B, and tokens of which some have the adapter."""
    generator = torch.Generator().manual_seed(tokens + rank)
    outputs = sum(slices)
    both = torch.randn(tokens, outputs + len(slices) * rank, generator=generator).to(dtype)
    return {
        "base": both[:, :outputs],
        "shrunk": both[:, outputs:],
        "b": (torch.randn(outputs, rank, generator=generator) / rank**0.5).to(dtype),
        "indices": torch.randint(-1, 1, (tokens,), generator=generator),
    }


def exact(values: dict[str, torch.Tensor], slices: list[int]) -> torch.Tensor:
    """In float64, one output at a time: a token without adapter keeps the base."""
    out, rank = values["base"].double().clone(), values["b"].shape[1]
    place = 0
    for number, outputs in enumerate(slices):
        for column in range(place, place + outputs):
            factor = values["shrunk"][:, number * rank : (number + 1) * rank].double()
            out[:, column] += (values["indices"] == 0) * (factor @ values["b"][column].double())
        place += outputs
    return out


@pytest.mark.parametrize("slices", SLICES.values(), ids=SLICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_sum_is_rounded_once(slices: list[int], dtype: torch.dtype) -> None:
    values = made(9, slices, 8, dtype)
    out = torch.empty(values["base"].shape, dtype=dtype)
    op.combine(out, **values, slices=slices)
    expected = exact(values, slices)
    assert bool(((out.double() - expected).abs() <= torch.finfo(dtype).eps / 2 * expected.abs() + 1e-5).all())
    without = values["indices"] != 0
    assert torch.equal(out[without], values["base"][without]) and without.any() and not without.all()


def test_written_over_the_base_it_is_the_same() -> None:
    values = made(9, [40, 40], 8, torch.bfloat16)
    out = torch.empty(9, 80, dtype=torch.bfloat16)
    op.combine(out, **values, slices=[40, 40])
    in_place = values["base"].clone()
    op.combine(in_place, **{**values, "base": in_place}, slices=[40, 40])
    assert torch.equal(out, in_place)


def layer(slices: list[int], rank: int = 4, inputs: int = 24) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    outputs, added = sum(slices), len(slices) * rank
    bias = torch.randn(outputs + added, generator=generator)
    bias[outputs:] = 0
    return {
        "rows": torch.randn(outputs + added, inputs, generator=generator),
        "bias": bias,
        "b": torch.randn(outputs, rank, generator=generator),
        "indices": torch.randint(-1, 1, (2000,), generator=generator),
    }


@pytest.mark.parametrize("tokens", [1, 7, op.TOGETHER, op.TOGETHER + 1])
@pytest.mark.parametrize("slices", [[40], [16, 8, 8]])
def test_the_operator_is_w_x_plus_b_a_x(tokens: int, slices: list[int]) -> None:
    """In float32, where the way of many tokens and that of few must both be exact."""
    parts, x = layer(slices), torch.randn(tokens, 24)
    out = torch.ops.swift_lora_fix.dense_linear(x, *parts.values(), slices)
    outputs, rank = parts["b"].shape
    w, a = parts["rows"][:outputs], parts["rows"][outputs:].split(rank)
    expected = x @ w.T + parts["bias"][:outputs]
    added = torch.cat([x @ a_i.T @ b_i.T for a_i, b_i in zip(a, parts["b"].split(slices))], dim=1)
    expected += added * (parts["indices"][:tokens, None] == 0)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert out.is_contiguous()


@pytest.mark.parametrize("tokens", [5, op.TOGETHER + 1])
def test_the_gated_operator_is_the_activation_of_the_other(tokens: int) -> None:
    parts, x = layer([16, 16]), torch.randn(1, tokens, 24)
    both = torch.ops.swift_lora_fix.dense_linear(x, *parts.values(), [16, 16])
    out = torch.ops.swift_lora_fix.dense_gated(x, *parts.values(), [16, 16])
    torch.testing.assert_close(out, torch.nn.functional.silu(both[..., :16]) * both[..., 16:])
    assert out.shape == (1, tokens, 16)


def test_both_operators_tell_the_compiler_what_they_return() -> None:
    for name in ("dense_linear", "dense_gated"):
        operator = getattr(torch.ops.swift_lora_fix, name)
        torch.library.opcheck(operator, (torch.randn(3, 24), *layer([16, 16]).values(), [16, 16]))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from swift_lora_fix.engine.vllm.kernels import combine_kernel

    return importlib.reload(combine_kernel)


@pytest.mark.parametrize("slices", SLICES.values(), ids=SLICES)
@pytest.mark.parametrize("rank", [1, 16, 100, 256])
def test_the_kernel_in_tritons_interpreter(kernels: ModuleType, slices: list[int], rank: int) -> None:
    """Tiles, slices, edges, ranks beyond one block. The interpreter has no bfloat16."""
    for tokens in (1, 40):
        values = made(tokens, slices, rank, torch.float16)
        out, by_torch = torch.empty(values["base"].shape).half(), torch.empty(values["base"].shape).half()
        kernels.combine(out, **values, slices=slices)
        op.combine(by_torch, **values, slices=slices)
        torch.testing.assert_close(out, by_torch, rtol=2.0**-10, atol=2.0**-10)


@pytest.mark.parametrize("rank", [1, 100, 256])
def test_the_gated_kernel_in_tritons_interpreter(kernels: ModuleType, rank: int) -> None:
    for tokens in (1, 40):
        values = made(tokens, [130, 130], rank, torch.float16)
        out, by_torch = torch.empty(tokens, 130).half(), torch.empty(tokens, 130).half()
        kernels.combine_gated(out, **values)
        op.combine_gated(by_torch, **values)
        torch.testing.assert_close(out, by_torch, rtol=2.0**-7, atol=2.0**-8)


def test_nan_in_the_slots_stays_with_the_tokens_that_have_the_adapter(kernels: ModuleType) -> None:
    values = made(40, [64], 8, torch.float16)
    values["b"].fill_(float("nan"))
    for combine in (kernels.combine, op.combine):
        out = torch.empty(40, 64).half()
        combine(out, **values, slices=[64])
        assert torch.equal(out.isnan().any(dim=1), values["indices"] == 0)


@pytest.fixture
def asks_for_dense(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setenv("SWIFT_LORA_FIX_KERNELS", "dense")
    monkeypatch.setattr(logging.getLogger("swift"), "propagate", True)
    caplog.set_level(logging.INFO, logger="swift.lora_fix")
    return caplog


def test_an_engine_without_the_layers_that_were_asked_for_is_an_error(
    asks_for_dense: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    engine = SimpleNamespace(is_shared=False, model=model)
    with pytest.raises(ContractError, match="no LoRA layer of this engine is dense"):
        asked.check("adapter", engine)
    model[0].dense_rows = torch.zeros(1)
    asked.check("adapter", engine)
    monkeypatch.setenv("SWIFT_LORA_FIX_KERNELS", "vllm")
    del model[0].dense_rows
    asked.check("adapter", engine)
    assert not asks_for_dense.messages


@pytest.mark.parametrize(("mode", "word"), [("fused", "is for adapter mode"), ("adapter", "is for the servers")])
def test_where_it_has_no_effect_one_line_says_so(
    asks_for_dense: pytest.LogCaptureFixture, mode: str, word: str
) -> None:
    asked.check(mode, SimpleNamespace(is_shared=True))
    assert len(asks_for_dense.messages) == 1 and word in asks_for_dense.messages[0]


@pytest.mark.parametrize(("kernels", "watches"), [("", True), ("auto", True), ("vllm", False), ("dense", True)])
def test_who_asks_for_vllms_kernels_is_not_patched(
    monkeypatch: pytest.MonkeyPatch, kernels: str, watches: bool
) -> None:
    monkeypatch.setenv("SWIFT_LORA_FIX_KERNELS", kernels)
    dense = DenseLayers(Arming("SLF_TEST_ARMED"), lambda: True)
    dense.watch()
    assert dense._watching is watches and dense.is_asked_for_by_name is (kernels == "dense")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("trains", [True, False])
def test_layers_that_nobody_asked_for_are_dense_on_a_gpu_that_makes_a_trainers_rollouts(
    monkeypatch: pytest.MonkeyPatch, asks_for_dense: pytest.LogCaptureFixture, device: str, trains: bool
) -> None:
    """An engine with room for two adapters: it cannot be dense, which is an error only for who asked for it."""
    monkeypatch.setattr(hooks, "is_for_a_trainer", lambda: trains)
    config = SimpleNamespace(max_loras=2)
    manager = SimpleNamespace(device=torch.device(device), lora_config=config, model=torch.nn.Module())
    with pytest.raises(ContractError, match=r"room for 2 adapters at a time \(max_loras\)"):
        hooks.make_dense(lambda: None, manager, (), {})
    monkeypatch.delenv("SWIFT_LORA_FIX_KERNELS")
    hooks.make_dense(lambda: None, manager, (), {})
    said = [line for line in asks_for_dense.messages if "room for 2 adapters" in line]
    assert len(said) == (trains and device == "cuda"), asks_for_dense.messages


class Block(torch.nn.Module):
    """Two LoRA layers: one whose weight an attention layer keeps a view of, one that two layers are around."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.viewed, self.twice, self.again = (torch.nn.Module() for _ in range(4))
        self.free.base_layer, self.viewed.base_layer = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.twice.base_layer = self.again.base_layer = torch.nn.Linear(3, 3)
        self.view = self.viewed.base_layer.weight.detach()[:2]


def test_weights_that_somebody_else_holds_are_left_where_they_are() -> None:
    block = Block()
    shared = layers._shared_storages(block)

    def place(module: torch.nn.Module) -> int:
        return module.base_layer.weight.untyped_storage().data_ptr()

    assert place(block.viewed) in shared and place(block.twice) in shared and place(block.free) not in shared


def test_a_kernel_of_vllms_that_gives_nan_is_no_measure() -> None:
    """vLLM 48590: there the dense layer is right, and must not be refused for it."""
    rows, b = torch.randn(12, 8), torch.randn(8, 4)
    layer = SimpleNamespace(
        base_layer=SimpleNamespace(weight=rows[:8]), dense_b=b, dense_slices=[8], lora_a_stacked=(rows[None, None, 8:],)
    )
    x = torch.randn(5, 8)
    ours = x @ rows[:8].T + (x @ rows[8:].T) @ b.T
    broken = ours.clone()
    broken[0, 0] = float("nan")
    assert proving._compare(layer, x, None, ours, broken) is None
    assert "error is" in str(proving._compare(layer, x, None, 1.01 * ours, broken))
    assert "error is" in str(proving._compare(layer, x, None, broken, ours))
