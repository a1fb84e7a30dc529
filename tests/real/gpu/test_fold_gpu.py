"""The kernel of fused mode on a GPU, against float64 and float32; a few seconds."""

from __future__ import annotations

import pytest

from swift_lora_fix.engine.vllm.slots.plan import Region
from swift_lora_fix.engine.vllm.weights import folding
from swift_lora_fix.policy.merging import Factors
from swift_lora_fix.policy.rounding import rounded

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
    made = Factors(w, b, a, 1.7, 12345, 40, 7)
    held = torch.zeros(shape[0] + 5, shape[1] + 8, device="cuda", dtype=engine)
    region = Region(held[3 : 3 + shape[0], 2 : 2 + shape[1]], 0, (shape[1], 1))
    region.destination.copy_(w)
    folds = folding.of(w.device)
    assert folds.accepts(made, region), "the proof is against float64"
    folds.write(made, region, region.destination)
    by_torch = rounded(torch.mm(b.float(), a.float()).mul_(1.7).add_(w), w, engine, 12345, 40, 7)
    least, _, most = folding.between(made, slice(None), engine)
    assert bool(((least <= region.destination) & (region.destination <= most)).all())
    differing = float((region.destination != by_torch).float().mean())
    share = {torch.bfloat16: 2e-3, torch.float16: 2e-2}[engine]
    assert differing * w.numel() <= share * w.numel() + 1, "rounded the other way, now and then"
    again = torch.empty_like(region.destination)
    folds.write(made, region, again)
    assert torch.equal(again, region.destination), "what the audit computes is what was written"
    region.destination.zero_()
    assert not held.any()


def test_a_small_update_arrives() -> None:
    """Its size is a tenth of the distance of two bfloat16 numbers near W."""
    w = torch.full((1024, 1024), 1.0, device="cuda").bfloat16()
    b, a = torch.randn(1024, 16, device="cuda"), torch.randn(16, 1024, device="cuda")
    made = Factors(w, b, a, 0.1 * 2.0**-7 / 4, 9)
    held = torch.empty_like(w)
    region = Region(held, 0, (1024, 1))
    held.copy_(w)
    folds = folding.of(w.device)
    assert folds.accepts(made, region)
    folds.write(made, region, held)
    update = made.scale * (b @ a)
    arrived = float(((held.float() - 1) * update).sum() / update.square().sum())
    nearest = float((((1 + update).bfloat16().float() - 1) * update).sum() / update.square().sum())
    print(f"arrived {arrived:.4f}, to the nearest {nearest:.4f}")
    assert abs(arrived - 1) < 0.02 and nearest < 0.2
