"""What one rank of several checks of an adapter that is sharded over them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from swift_lora_fix.policy import adapter


@pytest.mark.parametrize("rank, held", [(0, 3), (1, 2), (2, 0)])
def test_the_padding_of_a_zero3_partition_is_not_looked_at(
    rank: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = object()
    monkeypatch.setattr(torch.distributed, "get_rank", lambda asked: rank if asked is group else None)
    partition = torch.full((3,), float("nan"))
    partition[:held] = 1.0
    parameter = SimpleNamespace(ds_id=0, ds_numel=5, ds_tensor=partition, ds_process_group=group)
    (part,) = adapter.local_parts(SimpleNamespace(sharding="zero3", parameters=(parameter,)))  # type: ignore[arg-type]
    assert part.isfinite().all() and part.numel() == max(held, 1)
    if held:
        part.zero_()
        assert not partition[:held].any(), "it is the partition itself"
