"""Before the first byte is written: is every value of the adapter finite, also as the engine will hold it?"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...errors import NonFiniteAdapterError
from ...policy import adapter as adapters
from ...policy.adapter import Adapter
from .kernels.replay import Replayed


class FiniteCheck:
    """One fused check that every value is finite, also once it is scaled and cast to the LoRA dtype."""

    def __init__(
        self, adapter: Adapter, dtype: torch.dtype, device: torch.device, all_ranks: Callable[[bool], bool]
    ) -> None:
        self.adapter, self.dtype, self.all_ranks = adapter, dtype, all_ranks
        self.scales = torch.tensor([entry.scale for entry in adapter.entries])
        self.replayed = Replayed(self._check, device)
        self._begun: tuple[torch.Tensor, torch.Tensor] | None = None

    def _check(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For each entry whether it is fine, false for NaN and for infinity; and whether all are. On the device."""
        peaks = torch.stack(torch._foreach_norm(adapters.local_parts(self.adapter), float("inf"))).float()
        good = peaks * self.scales <= torch.finfo(self.dtype).max
        return good, good.all()

    @torch.no_grad()
    def begin(self, pointers: list[int]) -> None:
        """Have the device look at the values as they are now, without waiting for it.

        pointers: of the parameters; what is not sharded is checked in place while they stay the same.
        """
        self.scales = self.scales.to(adapters.local_part(self.adapter.parameters[0]).device)
        self._begun = self.replayed.run(pointers) if self.adapter.sharding == "none" else self._check()

    def finish(self) -> None:
        """Raise NonFiniteAdapterError naming the tensors. Sharded: each rank checks its own part, all raise or none."""
        assert self._begun is not None, "begin() comes first"
        (good, all_good), self._begun = self._begun, None
        if not self.all_ranks(bool(all_good)):
            bad = [entry.key for entry, fine in zip(self.adapter.entries, good.tolist()) if not fine]
            raise NonFiniteAdapterError(
                f"The trainer's adapter has values that are not finite in {self.dtype}: "
                f"{', '.join(bad[:4]) or 'on another rank'}{' ...' if len(bad) > 4 else ''} ({len(bad)} tensors). "
                "Nothing was written: the engine keeps the previous policy. Lower the learning rate, or resume from a "
                "checkpoint before the divergence."
            )
