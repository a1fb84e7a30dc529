"""The kernel and the operator of dense LoRA layers on a GPU, against float64 and PyTorch; a few seconds."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SLICES = {
    "qkv": [3584, 512, 512],
    "gate and up": [18944, 18944],
    "odd": [100, 33],
    "four": [64, 64, 128, 7],
    "one": [3584],
}


@pytest.mark.parametrize("rank", [1, 16, 100, 256])
@pytest.mark.parametrize("slices", SLICES.values(), ids=SLICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_agrees_with_pytorch_bit_for_bit_but_for_the_order_of_sums(rank, slices, dtype) -> None:
    from swift_lora_fix.engine.vllm.dense import op
    from swift_lora_fix.engine.vllm.kernels import combine_kernel

    outputs, generator = sum(slices), torch.Generator("cuda").manual_seed(0)

    def random(*shape: int):
        return torch.randn(shape, device="cuda", generator=generator)

    b = (random(outputs, rank) / rank**0.5).to(dtype)
    for tokens in (1, 16, 17, 64, 200, 1031):
        both = random(tokens, outputs + len(slices) * rank).to(dtype)
        base, shrunk = both[:, :outputs], both[:, outputs:]
        indices = torch.randint(-1, 1, (tokens,), device="cuda", generator=generator)
        by_torch, out, again = (torch.empty(tokens, outputs, device="cuda", dtype=dtype) for _ in range(3))
        op.combine(by_torch, base, shrunk, b, indices, slices)
        combine_kernel.combine(out, base, shrunk, b, indices, slices)
        combine_kernel.combine(again, base, shrunk, b, indices, slices)
        assert torch.equal(out, again), "the same input gives the same bits"
        without = indices != 0
        assert torch.equal(out[without], base[without]), "a token without adapter keeps the base layer's output"
        spacing = torch.finfo(dtype).eps * by_torch.float().abs().clamp(min=1.0)
        assert bool(((out.float() - by_torch.float()).abs() <= spacing).all())
        in_place = base.clone()
        combine_kernel.combine(in_place, in_place, shrunk, b, indices, slices)
        assert torch.equal(in_place, out), "written over the base layer's output"


def test_a_token_without_adapter_is_untouched_by_nan_in_the_slots() -> None:
    from swift_lora_fix.engine.vllm.kernels import combine_kernel

    base, shrunk = torch.randn(40, 128, device="cuda").half(), torch.randn(40, 16, device="cuda").half()
    b = torch.full((128, 16), float("nan"), device="cuda").half()
    indices = torch.full((40,), -1, device="cuda")
    indices[3] = 0
    out = torch.empty_like(base)
    combine_kernel.combine(out, base, shrunk, b, indices, [128])
    assert torch.equal(out.isnan().any(dim=1), indices == 0)


def test_it_repeats_itself_in_a_cuda_graph() -> None:
    """With the overlap of kernels (programmatic dependent launch) captured: 200 replays give the same bits."""
    from swift_lora_fix.engine.vllm.dense import op

    rows = torch.randn(3584 + 64, 3584, device="cuda").bfloat16() * 0.02
    b, x = torch.randn(3584, 64, device="cuda").bfloat16(), torch.randn(8, 3584, device="cuda").bfloat16()
    indices = torch.zeros(8, dtype=torch.int64, device="cuda")
    expected = x
    for _ in range(4):
        expected = op.dense_linear(expected, rows, None, b, indices, [3584]).tanh()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = x
        for _ in range(4):
            out = op.dense_linear(out, rows, None, b, indices, [3584]).tanh()
    for _ in range(200):
        graph.replay()
        assert torch.equal(out, expected)
