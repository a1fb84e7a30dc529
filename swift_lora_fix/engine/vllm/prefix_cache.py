"""A reset of vLLM's prefix cache that visits only the blocks which hold something.

vLLM's ``BlockPool.reset_prefix_cache`` forgets its map from hashes to blocks, then visits every block of the pool to
take its hash away (vllm/v1/core/block_pool.py, 0.11 to 0.28). A pool has tens of thousands of blocks, of which one
batch of rollouts fills hundreds. The visit took 1.0 to 1.75 ms of a sync of 2.2 to 2.9 ms (48,227 blocks, H200).

Here vLLM's own function runs, but sees only the blocks that are in the map. That every block with a hash is in the map
is vLLM's invariant. It is checked against the whole pool at the first resets that have something to forget, and at the
first that have nothing: that is how a sync finds the cache after a sleep, which has emptied it.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from ...common.log import info

PROOFS = 3  # so many resets with something to forget, and without, are compared with the whole pool first

# by pool: how many resets were compared, with something to forget (True) and without; None: never again
_proofs: weakref.WeakKeyDictionary[Any, dict[bool, int] | None] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def sparing_reset(llm_engine: Any) -> Iterator[None]:
    """While this lasts, whoever goes through the blocks of this engine's pool meets only those that the cache knows.

    Args:
        llm_engine: a ``vllm.LLMEngine`` whose engine core is in this process.
    """
    with _sparing(_pool_of(llm_engine)):
        yield


def spare_every_reset() -> None:
    """The same for every reset in this process from now on. For the process that vLLM runs its engine core in: whoever
    asks for the reset is in another one."""
    from vllm.v1.core.block_pool import BlockPool

    reset = BlockPool.reset_prefix_cache
    if hasattr(reset, "__wrapped__"):
        return

    @functools.wraps(reset)
    def reset_prefix_cache(pool: Any) -> bool:
        with _sparing(pool):
            return bool(reset(pool))

    BlockPool.reset_prefix_cache = reset_prefix_cache


@contextlib.contextmanager
def _sparing(pool: Any) -> Iterator[None]:
    """If the pool is not as known here, or breaks the invariant, nothing is changed, and one line says so."""
    known = isinstance(getattr(pool, "blocks", None), list)
    proofs = _proofs.setdefault(pool, {True: 0, False: 0}) if known else None
    if proofs is None:
        yield
        return
    blocks, cached = pool.blocks, _cached_blocks(pool)
    if cached is None or not _is_proved(pool, cached, proofs):
        _proofs[pool] = None
        info(
            "vLLM's prefix cache is not kept as this package knows it: each sync visits all blocks of its pool, as "
            "vLLM itself does. Right all the same, and a millisecond slower."
        )
        yield
        return
    pool.blocks = _Visited(blocks, cached)
    try:
        yield
    finally:
        pool.blocks = blocks


class _Visited(Sequence[Any]):
    """The pool's blocks by number, and the cached ones by iteration."""

    def __init__(self, blocks: Sequence[Any], cached: Sequence[Any]) -> None:
        self._blocks, self._cached = blocks, cached

    def __iter__(self) -> Iterator[Any]:
        return iter(self._cached)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, number: Any) -> Any:
        return self._blocks[number]


def _pool_of(llm_engine: Any) -> Any | None:
    try:
        return llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    except AttributeError:  # the engine core is in another process, or vLLM has other names
        return None


def _cached_blocks(pool: Any) -> list[Any] | None:
    """The blocks in the pool's map, whose values are a block, or a dict of blocks by number."""
    try:
        values = pool.cached_block_hash_to_block._cache.values()
    except AttributeError:
        return None
    found: list[Any] = []
    for value in values:
        if isinstance(value, dict):
            found.extend(value.values())
        else:
            found.append(value)
    return found


def _is_proved(pool: Any, cached: Sequence[Any], proofs: dict[bool, int]) -> bool:
    """Whether exactly the blocks in the map have a hash; looked at until it was so PROOFS times, counted in proofs."""
    if proofs[bool(cached)] < PROOFS:
        if {id(block) for block in pool.blocks if block.block_hash is not None} != {id(block) for block in cached}:
            return False
        proofs[bool(cached)] += 1
    return True
