"""vLLM's own block pool, filled as vLLM fills it, and reset."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from swift_lora_fix.engine.vllm import prefix_cache
from swift_lora_fix.engine.vllm.prefix_cache import PROOFS, sparing_reset

block_pool = pytest.importorskip("vllm.v1.core.block_pool")
utils = pytest.importorskip("vllm.v1.core.kv_cache_utils")
BLOCKS, CACHED = 500, 7


@pytest.fixture
def pool() -> Any:
    given = {"num_gpu_blocks": BLOCKS, "enable_caching": True, "hash_block_size": 16}
    known = inspect.signature(block_pool.BlockPool).parameters
    return block_pool.BlockPool(**{name: value for name, value in given.items() if name in known})


def engine_of(pool: Any) -> Any:
    manager = SimpleNamespace(block_pool=pool)
    core = SimpleNamespace(scheduler=SimpleNamespace(kv_cache_manager=manager))
    return SimpleNamespace(engine_core=SimpleNamespace(engine_core=core))


def fill(pool: Any, seed: int) -> list[Any]:
    """Cache some blocks, two of them under one hash; they are free again, as after a request."""
    blocks = pool.blocks[10 : 10 + CACHED]
    for number, block in enumerate(blocks):
        key = utils.make_block_hash_with_group_id(b"%d %d" % (seed, max(1, number)), 0)
        if hasattr(block, "set_block_hash"):
            block.set_block_hash(key, 16)
        else:
            block.block_hash = key
        pool.cached_block_hash_to_block.insert(key, block)
    return blocks


class Counting(list[Any]):
    """Counts the blocks that are visited one after the other."""

    visited = 0

    def __iter__(self) -> Iterator[Any]:
        for block in super().__iter__():
            self.visited += 1
            yield block


def reset(pool: Any, llm_engine: Any = "its own") -> int:
    """How many blocks were visited by a reset; the pool is left with nothing cached."""
    blocks = pool.blocks = Counting(pool.blocks)
    with sparing_reset(engine_of(pool) if llm_engine == "its own" else llm_engine):
        assert pool.reset_prefix_cache() is True
    assert pool.blocks is blocks and len(pool.cached_block_hash_to_block) == 0
    visited = blocks.visited
    assert all(block.block_hash is None for block in pool.blocks)
    return visited


@pytest.mark.parametrize("asked_here", [False, True])
def test_in_the_process_of_a_rollout_server_every_reset_is_spared(
    pool: Any, monkeypatch: pytest.MonkeyPatch, asked_here: bool
) -> None:
    """Whoever asks for it is in another process; and where it is not, nothing is spared twice."""
    monkeypatch.setattr(block_pool.BlockPool, "reset_prefix_cache", block_pool.BlockPool.reset_prefix_cache)
    prefix_cache.spare_every_reset()
    installed = block_pool.BlockPool.reset_prefix_cache
    prefix_cache.spare_every_reset()
    assert block_pool.BlockPool.reset_prefix_cache is installed, "once"
    asks = engine_of(pool) if asked_here else None
    for number in range(PROOFS):
        fill(pool, number)
        assert reset(pool, asks) == BLOCKS
    fill(pool, PROOFS)
    assert reset(pool, asks) == 0


def test_only_cached_blocks_are_visited_once_that_is_proved(pool: Any) -> None:
    for number in range(PROOFS):
        fill(pool, number)
        assert reset(pool) == BLOCKS, "looked at by us, and no more by vLLM"
    fill(pool, PROOFS)
    assert reset(pool) == 0, "none of the pool's list; those in the map are reached by it"


def test_an_empty_cache_is_not_visited_once_that_is_proved(pool: Any) -> None:
    """As a sync finds it after a sleep. Proofs of the one case say nothing of the other."""
    for _ in range(PROOFS):
        assert reset(pool) == BLOCKS, "looked at by us, and no more by vLLM"
    assert reset(pool) == 0
    fill(pool, 0)
    assert reset(pool) == BLOCKS


def test_a_hash_that_the_map_does_not_know_ends_it(pool: Any, caplog: pytest.LogCaptureFixture) -> None:
    for block in fill(pool, 0)[:1]:
        pool.cached_block_hash_to_block.pop(block.block_hash, block.block_id)
    with caplog.at_level("INFO"):
        assert reset(pool) == 2 * BLOCKS, "looked at by us, then by vLLM"
        fill(pool, 1)
        assert reset(pool) == BLOCKS, "by vLLM alone from then on"
    assert len([r for r in caplog.records if "visits all blocks" in r.getMessage()]) == 1


def test_a_pool_under_other_names_is_left_to_vllm(pool: Any) -> None:
    for engine in (SimpleNamespace(), engine_of(SimpleNamespace())):
        with sparing_reset(engine):
            pass
    pool.cached_block_hash_to_block = SimpleNamespace()
    with sparing_reset(engine_of(pool)):
        assert isinstance(pool.blocks, list)
    assert prefix_cache._proofs[pool] is None


def test_blocks_in_use_are_still_refused(pool: Any) -> None:
    pool.get_new_blocks(3)
    with sparing_reset(engine_of(pool)):
        assert pool.reset_prefix_cache() is False
    assert isinstance(pool.blocks, list)
