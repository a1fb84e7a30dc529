"""The kernel of fused mode on a GPU, against float64 and float32; a few seconds."""

from __future__ import annotations

import pytest

from swift_lora_fix.engine.vllm.slots.plan import Region
from swift_lora_fix.engine.vllm.weights import folding
from swift_lora_fix.policy.merging import Factors

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("rank", [1, 16, 64, 100, 256])
@pytest.mark.parametrize("shape", [(512, 3584), (100, 260), (1, 33)])
@pytest.mark.parametrize("dtypes", ["bfloat16 float32", "float16 float32", "bfloat16 bfloat16", "float32 float32"])
def test_the_kernel_is_proved_and_repeats_itself(rank: int, shape: tuple[int, int], dtypes: str) -> None:
    base, lora = (getattr(torch, name) for name in dtypes.split())
    engine = torch.float16 if base == torch.float16 else torch.bfloat16
    w = torch.randn(shape, device="cuda").to(base) * 0.05
    b, a = (torch.randn(s, device="cuda").to(lora) * 0.02 for s in ((shape[0], rank), (rank, shape[1])))
    made = Factors(w, b, a, 1.7)
    held = torch.zeros(shape[0] + 5, shape[1] + 8, device="cuda", dtype=engine)
    region = Region(held[3 : 3 + shape[0], 2 : 2 + shape[1]], 0, (shape[1], 1))
    region.destination.copy_(w)
    folds = folding.of(w.device)
    assert folds.accepts(made, region), "the proof is against float64"
    folds.write(made, region, region.destination)
    exact = w.double() + 1.7 * (b.double() @ a.double())
    by_torch = (torch.mm(b.float(), a.float()).mul_(1.7).add_(w)).to(engine)
    normal = exact.abs().clamp(min=torch.finfo(engine).smallest_normal)
    bound = folding.ROUNDING[engine] * normal + folding.LEFT_OUT * 1.7 * (b.double().abs() @ a.double().abs())
    assert bool(((region.destination.double() - exact).abs() <= bound).all())
    differing = float((region.destination != by_torch).float().mean())
    share = {torch.bfloat16: 2e-3, torch.float16: 2e-2}[engine]
    assert differing * w.numel() <= share * w.numel() + 1, "rounded the other way, now and then"
    again = torch.empty_like(region.destination)
    folds.write(made, region, again)
    assert torch.equal(again, region.destination), "what the audit computes is what was written"
    region.destination.zero_()
    assert not held.any()
