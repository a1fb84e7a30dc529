"""Adapters from memory in real vLLM engines on the CPU, one process an engine (tests/support/memory.py)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import forks, hangs
from tests.support.driver import REPOSITORY

pytestmark = pytest.mark.e2e

UPDATES = 500
# The engines of one process, one after the other; the last one is killed. Tensor parallel takes over a minute on two
# cores, so it runs when asked for.
PROCESSES = ["in-process", "async,processes"]
if os.environ.get("SLF_TWO_WORKERS"):
    PROCESSES += ["two-workers", "async-two-workers"]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What was seen on each engine."""
    model = forks.tiny_model(tmp_path_factory.mktemp("memory") / "qwen2")
    return {record["kind"]: record for kinds in PROCESSES for record in observe(kinds, model)}


@pytest.fixture(params=",".join(PROCESSES).split(","))
def found(request: pytest.FixtureRequest, everything: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return everything[request.param]


def observe(kinds: str, model: Path) -> list[dict[str, Any]]:
    module, arguments = "tests.support.memory", [kinds, str(model), str(UPDATES)]
    if kinds == "in-process":  # vLLM is there before this package; in the other processes after it
        done = forks.run(module=module, arguments=arguments)
    else:
        command = [sys.executable, "-m", module, *arguments]
        done = hangs.run(command, cwd=REPOSITORY)
    lines = [line.split("MEMORY ", 1)[1] for line in done.stdout.splitlines() if line.startswith("MEMORY ")]
    assert len(lines) == len(kinds.split(",")), done.stdout[-1500:] + done.stderr[-3000:]
    return [json.loads(line) for line in lines]


def test_tensors_equal_the_folder(found: dict[str, Any]) -> None:
    assert found["differ"], "two adapters and the base must differ, or equality says nothing"
    assert found["equal"] and found["again"] and found["peft"]
    assert found["untouched"], "the caller's tensors were written to"
    assert found["swift"] == [], "ms-swift was imported"


def test_the_same_id_is_replaced_only_when_asked(found: dict[str, Any]) -> None:
    kind, text = found["conflict"]
    assert kind == "AdapterConflictError" and "id 20" in text and "load_inplace=True" in text
    assert found["replaced"], "the new adapter's answers are not its own: slots or cached KV blocks of the old one"


def test_an_adapter_that_was_evicted_comes_back(found: dict[str, Any]) -> None:
    assert found["evicted"] == [True] * 6
    assert found["open"] == 0, "shared memory was not given back after the last request"


@pytest.mark.parametrize("call", ["add", "generate"])
def test_what_vllm_does_not_serve_is_refused(found: dict[str, Any], call: str) -> None:
    for name, error, phrase in (
        ("rank", "UnsupportedAdapterError", "LoRA rank 32 is greater than max_lora_rank 16"),
        ("module", "UnsupportedAdapterError", "model.layers.0.self_attn.nope"),
        ("dora", "UnsupportedAdapterError", "DoRA"),
        ("nan", "NonFiniteAdapterError", "NaN"),
    ):
        kind, text = found[f"{name}-{call}"]
        assert kind == error and phrase in text and "[swift_lora_fix" not in text, (name, kind, text)
    assert found["after"], "a refused adapter changed what the engine serves"
    assert found["open_after"] == 0


def test_many_updates(found: dict[str, Any]) -> None:
    assert found["updated"], "the last update is not what is served"
    assert found["path"] == (["DirectWriter"] if found["kind"] == "in-process" else [])
    assert found["growth_mib"] < 16 and found["new_in_shm"] == [] and found["open_last"] == 0


def test_an_engine_that_dies(found: dict[str, Any]) -> None:
    if found["kind"] == "processes":
        assert found["open_between"] == 1, "the engine was to be killed between write and load"
        assert found["dead"][0] == "EngineDeadError"
        assert found["open_dead"] <= 1 and found["new_in_shm_dead"] == []
    elif found["kind"] == "async":
        assert found["cancelled"] and found["open_cancelled"] == 0
    else:
        pytest.skip("the engine is this process, or covered by another kind")
