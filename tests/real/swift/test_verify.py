"""``swift-lora-fix verify`` on a real checkpoint: two real runs, and mistakes that cost none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swift_lora_fix.install import releases
from tests.support.driver import Verification

from .conftest import FAMILY, Runs

pytestmark = pytest.mark.e2e


@pytest.mark.needs("verify")
def test_a_checkpoint_is_proved(runs: Runs) -> None:
    done = runs.get("verify").done
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(done.stdout)
    ours, stock = result["ours"]["syncs"], result["stock"]["syncs"]
    assert result["proved"] and len(ours) == len(stock) == 3
    assert all(sync["agrees"] and sync["is_distinguishable"] and not sync["base_changed"] for sync in ours)
    assert not any(sync["lora_changed"] for sync in ours)
    assert stock[-1]["base_changed"] > 0 and result["stock"]["floors"] == result["ours"]["floors"] != {}
    assert FAMILY is not None
    causes = [sync["cause"] for sync in stock]
    if FAMILY.has(releases.LORA_DOWNCAST):
        # and on a CPU vLLM scales in place what it was given: the trainer's own LoRA, doubled at each sync
        assert [sync["lora_changed"] for sync in stock] == [28, 14, 14] and not any(sync["agrees"] for sync in stock)
    elif FAMILY.has(releases.DOUBLE_COUNT):
        assert causes == [None, "double-count", "double-count"] and "the LoRA is counted twice" in result["verdict"]


@pytest.mark.parametrize(
    "adapter, arguments, words",
    [
        ("/nowhere/adapter", (), "no local folder"),
        (".", (), "adapter_config.json is no PEFT LoRA configuration"),
        (".", ("--syncs", "1"), "--syncs 1: at least 2"),
    ],
)
def test_mistakes_are_named(adapter: str, arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = Verification(Path("some/model"), Path(adapter), tmp_path, arguments).start().done
    assert done is not None and done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
