"""The staging buffer: it holds the adapter, chunk by chunk, scaled and cast as the engine will hold it.

The slots are written from it, and later checked against the checksum of what was staged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch

from ....common.digest import checksum, combine
from ....policy.adapter import Adapter, Chunk
from .plan import Copy


class Staging:
    """Holds one chunk at a time, its entries one after the other, in ``dtype`` on ``device``.

    whole: hold all chunks, one after the other. ``buffer`` is then the whole adapter, (elements,).
    """

    def __init__(self, adapter: Adapter, dtype: torch.dtype, device: torch.device, whole: bool = False) -> None:
        self.adapter, self.dtype, self.device = adapter, dtype, device
        sizes = [_padded(chunk) for chunk in adapter.chunks]
        self._starts = dict(zip(map(id, adapter.chunks), accumulate(sizes, initial=0))) if whole else {}
        self.buffer = torch.zeros(sum(sizes) if whole else max(sizes), dtype=dtype, device=device)
        self._host: torch.Tensor | None = None

    def entries(self, chunk: Chunk) -> list[torch.Tensor]:
        """One view for each entry of the chunk, in the entry's whole shape."""
        return _laid_out(self._part(chunk), _shapes(chunk))

    def _part(self, chunk: Chunk, buffer: torch.Tensor | None = None) -> torch.Tensor:
        start = self._starts.get(id(chunk), 0)
        return (self.buffer if buffer is None else buffer)[start : start + _padded(chunk)]

    def fill(self, chunk: Chunk, values: Sequence[torch.Tensor], fold: bool = True) -> list[torch.Tensor]:
        """Stage the chunk's whole ``values`` and return the views that hold them.

        fold: A is cast, B is multiplied by its scale in fp32 and then cast; otherwise both are only cast.
        """
        views = self.entries(chunk)
        plain = [i for i, entry in enumerate(chunk.entries) if not fold or entry.scale == 1.0]
        scaled = [i for i in range(len(views)) if i not in set(plain)]
        if plain:
            torch._foreach_copy_([views[i] for i in plain], [values[i] for i in plain])
        if scaled:
            wide = [values[i] if values[i].dtype == torch.float32 else values[i].float() for i in scaled]
            products = torch._foreach_mul(wide, [chunk.entries[i].scale for i in scaled])
            torch._foreach_copy_([views[i] for i in scaled], products)
        self._part(chunk)[sum(view.numel() for view in views) :] = 0
        return views

    def checksum(self, chunk: Chunk) -> torch.Tensor:
        """Checksum of what the last ``fill`` staged of this chunk."""
        return checksum(self._part(chunk))

    def on_host(self) -> dict[str, torch.Tensor]:
        """The whole adapter by PEFT key, as views of one CPU copy of ``buffer``. The next call overwrites that copy."""
        assert self._starts, "one chunk at a time"
        if self._host is None:
            self._host = torch.empty_like(self.buffer, device="cpu", pin_memory=self.buffer.is_cuda)
        buffer = self._host.copy_(self.buffer)
        return {
            entry.key: view
            for chunk in self.adapter.chunks
            for entry, view in zip(chunk.entries, _laid_out(self._part(chunk, buffer), _shapes(chunk)))
        }

    def digest(self) -> str:
        """The policy digest of all chunks. Only with ``whole``."""
        assert self._starts, "one chunk at a time"
        return combine(torch.stack([self.checksum(chunk) for chunk in self.adapter.chunks]).tolist())


def copy_all(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy with foreach calls. A single strided tensor would slow down a whole call, so strided ones get their own."""
    pairs = list(zip(destinations, sources))
    for dense in (True, False):
        batch = [pair for pair in pairs if (pair[0].is_contiguous() and pair[1].is_contiguous()) == dense]
        if batch:
            torch._foreach_copy_([pair[0] for pair in batch], [pair[1] for pair in batch])


def regions(copies: Sequence[Copy], chunk: Chunk, views: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """For each copy, the region of its entry's view; ``views`` has one view an entry of the chunk."""
    view_of = {id(entry): view for entry, view in zip(chunk.entries, views)}
    return [copy.region(view_of[id(copy.entry)]) for copy in copies]


def covers_entries(copies: Sequence[Copy], chunk: Chunk) -> bool:
    """Whether the copies are exactly the chunk's entries, whole and in order (false under tensor parallelism)."""
    return [copy.entry for copy in copies] == list(chunk.entries) and all(copy.is_whole for copy in copies)


def checksum_of(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The checksum of ``parts`` as they are now, laid out one after the other as ``Staging`` lays out entries."""
    end = sum(part.numel() for part in parts)
    buffer = parts[0].new_empty(_round_up(end))
    buffer[end:] = 0
    copy_all(_laid_out(buffer, [part.shape for part in parts]), parts)
    return checksum(buffer)


def host_digest(adapter: Adapter, values: dict[str, torch.Tensor], dtype: torch.dtype, fold: bool = True) -> str:
    """The policy digest of whole CPU ``values`` by PEFT key. fold: the values are unscaled, so scale B first."""
    staging = Staging(adapter, dtype, torch.device("cpu"))
    checksums = []
    for chunk in adapter.chunks:
        staging.fill(chunk, [values[entry.key] for entry in chunk.entries], fold)
        checksums.append(int(staging.checksum(chunk)))
    return combine(checksums)


def _laid_out(buffer: torch.Tensor, shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
    views, start = [], 0
    for shape in shapes:
        end = start + math.prod(shape)
        views.append(buffer[start:end].view(shape))
        start = end
    return views


def _shapes(chunk: Chunk) -> list[torch.Size]:
    return [entry.shape for entry in chunk.entries]


def _padded(chunk: Chunk) -> int:
    return _round_up(sum(math.prod(entry.shape) for entry in chunk.entries))


def _round_up(elements: int) -> int:
    """Round up to whole 64-bit words, for any dtype."""
    return -(-elements // 8) * 8
