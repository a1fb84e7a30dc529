"""In the worker: the engine that is built, what it serves, and what is checked before."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swift_lora_fix import errors
from swift_lora_fix.server import wire as protocol
from swift_lora_fix.server.rollout import checks, installing, worker
from swift_lora_fix.server.wire import EXTENSION, METHOD, Layout
from tests.support.rollout_routes import MODULE, SWIFTS, FakeAsyncLLM, Server, adapter, policy


async def _turns(infer_requests: list[Any]) -> list[Any]:
    return [SimpleNamespace(rollout_infos={"num_turns": 2}) for _ in infer_requests]


async def _answers(infer_requests: list[Any]) -> list[Any]:
    return [SimpleNamespace(rollout_infos={}) for _ in infer_requests]


def test_an_asynchronous_engine_and_its_scheduler(server: Server) -> None:
    import asyncio

    engine = SimpleNamespace(engine=FakeAsyncLLM(server.args.model_dir), enable_lora=True)
    engine.async_infer = _answers
    worker.build_engine(lambda arguments: engine, SimpleNamespace(vllm_use_async_engine=True))
    scheduler = SimpleNamespace(infer_engine=engine, async_infer=_turns)
    worker.tag_scheduler(scheduler)
    sent, command = adapter(4.0), getattr(engine, METHOD)
    rpcs: list[dict[str, Any]] = [
        {"command": "prepare", "layout": sent.layout.as_dict()},
        {"command": "receive", "digest": sent.digest, "memory": sent.memory.address.as_dict()},
        {"command": "serve", "digest": sent.digest},
    ]
    serves = {"boot": "b00", "epoch": 3, "plain": False, "policy": policy(1, sent).as_dict()}
    sample, probe = SimpleNamespace(uuid="f00"), {"uuid": f"{protocol.PROBE}0"}
    nobody = SimpleNamespace(uuid=None, messages=[{"role": "user", "content": "<placeholder>"}])

    async def everything() -> list[Any]:
        with pytest.raises(errors.EngineStateError):
            await scheduler.async_infer([sample])
        for rpc in rpcs:
            answer = await command(serves=serves, ours=True, switches=rpc["command"] == "serve", rpc=rpc)
            assert "error" not in answer, answer
        return [output for asked in (sample, probe, nobody) for output in await scheduler.async_infer([asked])]

    output, answer, none = asyncio.run(everything())
    assert answer.rollout_infos == none.rollout_infos == {}, "the gate asks the engine, not the scheduler"
    assert engine.engine.loads == [4.0]
    by = {"server_boot": "b00", "server_epoch": 3}
    named = {f"policy_{k}": v for k, v in policy(1, sent).as_dict().items()}
    assert output.rollout_infos == {"num_turns": 2, **named, **by}


@pytest.mark.parametrize(
    "kwargs, load_format, inner",
    [
        ({"load_format": "dummy", "engine_kwargs": {"a": 1}}, "auto", {"a": 1}),
        ({"engine_kwargs": {"load_format": "dummy"}}, "auto", {}),  # 3.10
        ({"load_format": "safetensors"}, "safetensors", {}),
        ({"engine_kwargs": {"worker_extension_cls": SWIFTS}}, "auto", {"worker_extension_cls": EXTENSION}),
        ({"engine_kwargs": {"worker_extension_cls": "a.B"}}, "auto", {"worker_extension_cls": "a.B"}),
        ({}, "auto", {}),
    ],
)
def test_the_base_comes_from_the_files(kwargs: dict[str, Any], load_format: str, inner: dict[str, Any]) -> None:
    assert worker.engine_arguments(kwargs) is kwargs, "only where a server is built"
    token = worker._building.set(True)
    try:
        assert worker.engine_arguments(kwargs) == {"load_format": load_format, "engine_kwargs": inner}
    finally:
        worker._building.reset(token)


def test_modules_of_smaller_rank() -> None:
    """The scaling is in B, so nothing depends on a module's rank."""
    lora = SimpleNamespace(max_lora_rank=4, lora_dtype=torch.bfloat16)
    shapes = {
        ("a.q_proj", "A"): (4, 8),
        ("a.q_proj", "B"): (6, 4),
        ("a.k_proj", "A"): (2, 8),
        ("a.k_proj", "B"): (6, 2),
    }
    entries = tuple((f"base_model.model.{m}.lora_{side}.weight", shape) for (m, side), shape in shapes.items())
    config = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    checks.check(Layout(dtype="bfloat16", entries=entries, config=config), lora, {})
    for changes in ({"lora_alpha": 8}, {"use_rslora": True}, {"rank_pattern": {"k_proj": 2}}, {"r": None}):
        with pytest.raises(errors.ProtocolError, match="the scaling is in B"):
            checks.check(Layout(dtype="bfloat16", entries=entries, config={**config, **changes}), lora, {})
    with pytest.raises(errors.StagingError, match="has rank 4, the config says 2"):
        checks.check(Layout(dtype="bfloat16", entries=entries, config={**config, "r": 2, "lora_alpha": 2}), lora, {})


def test_modules_that_the_files_do_not_name_are_left_to_vllm() -> None:
    base = {"model.layers.0.self_attn.q_proj.weight": _header(6, 8)}
    pair = {"A": (2, 8), "B": (6, 2)}
    checks._check_fits({"language_model.layers.0.self_attn.q_proj": pair}, base)  # named otherwise altogether
    checks._check_fits({MODULE: pair, "model.layers.0.mlp.experts.base_layer": pair}, base)
    for unknown in ("model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.nope"):
        with pytest.raises(errors.StagingError, match=f"no module '{unknown}'"):
            checks._check_fits({MODULE: pair, unknown: pair}, base)


def _header(*shape: int) -> Any:
    from swift_lora_fix.policy.files import TensorHeader

    return TensorHeader(shape, "BF16")


def listening() -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as asyncio and uvicorn do
    made.bind(("127.0.0.1", 0))
    made.listen()
    return made


def test_a_server_that_restarts_keeps_its_port(caplog: pytest.LogCaptureFixture) -> None:
    """A connection of the server before lingers: ms-swift then takes the next port, uvicorn would not have to."""
    with listening() as before:
        port = before.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), before.accept()[0]:
            pass  # the side that closes first waits a minute (TIME_WAIT)
        args = SimpleNamespace(host="127.0.0.1", port=port + 1)
        installing._keep_port(args, ["rollout.py", "--port", str(port)])
        assert args.port == port + 1 and f"port {port} is taken" in caplog.text, "somebody listens"
    installing._keep_port(args, ["rollout.py", "--port", str(port)])
    assert args.port == port
    for command in (["--port", "0"], [], ["--host", "8000"], ["--port=8001"]):
        args.port = 8001
        installing._keep_port(args, ["rollout.py", *command])
        assert args.port == 8001, command
    installing._keep_port(args, ["rollout.py", f"--port={port}"])
    assert args.port == port
