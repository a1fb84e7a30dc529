"""Before the first byte is written: are all values of the adapter finite, also in the engine's dtype?"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...errors import NonFiniteAdapterError
from ...policy import adapter as adapters
from ...policy.adapter import Adapter
from .kernels.replay import Replayed


class FiniteCheck:
    """Checks in one fused pass that every value is finite, also after scaling and the cast to the LoRA dtype."""

    def __init__(
        self, adapter: Adapter, dtype: torch.dtype, device: torch.device, all_ranks: Callable[[bool], bool]
    ) -> None:
        self.adapter, self.dtype, self.all_ranks = adapter, dtype, all_ranks
        self.scales = torch.tensor([entry.scale for entry in adapter.entries])
        self.replayed = Replayed(self._check, device)
        self._begun: tuple[torch.Tensor, torch.Tensor] | None = None

    def _check(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether each entry is finite (false for NaN and infinity), and whether all are. Both on the device."""
        peaks = torch.stack(torch._foreach_norm(adapters.local_parts(self.adapter), float("inf"))).float()
        good = peaks * self.scales <= torch.finfo(self.dtype).max
        return good, good.all()

    @torch.no_grad()
    def begin(self, pointers: list[int]) -> None:
        """Start checking the current values on the device, without waiting for the result.

        pointers: of the parameters. While they stay the same, an unsharded adapter is checked in place.
        """
        self.scales = self.scales.to(adapters.local_part(self.adapter.parameters[0]).device)
        self._begun = self.replayed.run(pointers) if self.adapter.sharding == "none" else self._check()

    def finish(self) -> None:
        """Raise NonFiniteAdapterError naming the tensors. Each rank checks its own shard; all ranks raise, or none."""
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
