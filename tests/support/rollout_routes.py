"""A rollout server's routes without vLLM: stand-ins for its workers and engine, and what a trainer asks of it.

The memory, the receiver and the stager are real. No process is started.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient

from swift_lora_fix.engine.port import WriteReport
from swift_lora_fix.server import hosts
from swift_lora_fix.server.rollout import receiver, routes, worker
from swift_lora_fix.server.wire import BYTES, POLICY_HEADER, PREFIX, RPC, Policy
from tests.support import light_server
from tests.support.parcels import Sent, staged, write

MODULE = "model.layers.0.self_attn.q_proj"
CONFIGURATION = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "peft_type": "LORA", "bias": "none"}
A, B = (f"base_model.model.{MODULE}.lora_{side}.weight" for side in "AB")
KEY = {"Authorization": "Bearer sesame"}
SWIFTS = "swift.pipelines.infer.rollout.WeightSyncWorkerExtension"
RUN = "ab"


class Slots(light_server.Slots):
    """``loads`` of its worker: the adapters that it served, by what their A begins with."""

    def __init__(self, engine: Any, adapter: Any, *_: Any) -> None:
        super().__init__(engine, adapter)
        self.engine = engine

    def write(self) -> WriteReport:
        report = super().write()
        self.engine.worker.loads.append(self.held[A][0, 0].item())
        return report

    write_by_reference = write


class FakeLLM:
    """What a switch asks of vLLM, with a real `Receiver` in its worker. ``rpcs``: what that was asked; ``fail`` is
    raised by the next ones."""

    def __init__(self, model: Path) -> None:
        self.vllm_config = SimpleNamespace(
            lora_config=SimpleNamespace(max_lora_rank=4, lora_dtype=torch.bfloat16),
            model_config=SimpleNamespace(model=str(model)),
        )
        self.loads: list[float] = []
        manager = SimpleNamespace(_load_adapter=lambda request: request)
        runner = SimpleNamespace(device=torch.device("cpu"), lora_manager=manager)
        self.worker = SimpleNamespace(
            model_runner=runner, vllm_config=self.vllm_config, communicator=None, client_rank=1, loads=self.loads
        )
        self.receiver = receiver.Receiver(self.worker)
        self.rpcs: list[tuple[str, dict[str, Any]]] = []
        self.unfinished = False
        self.output_processor = SimpleNamespace(has_unfinished_requests=lambda: self.unfinished)
        self.fail: list[Exception] = []
        self.resets = True

    def reset_prefix_cache(self) -> bool:
        return self.resets

    def collective_rpc(self, method: str, args: Any = (), kwargs: Any = None) -> list[None]:
        assert method == RPC
        arguments = dict(kwargs)
        command = arguments.pop("command")
        self.rpcs.append((command, arguments))
        if self.fail:
            raise self.fail.pop(0)
        try:
            getattr(self.receiver, command)(**arguments)
        except Exception as error:
            raise broken(error) from error
        return [None]


class FakeAsyncLLM(FakeLLM):
    async def reset_prefix_cache(self) -> bool:  # type: ignore[override]
        return super().reset_prefix_cache()

    async def collective_rpc(self, method: str, args: Any = (), kwargs: Any = None) -> list[None]:  # type: ignore[override]
        return super().collective_rpc(method, args, kwargs)


class FakeConnection:
    """A worker in this process: what ``llm_worker`` does with an order. ``sending``, ``answering``: set while it takes
    orders, and while it answers them."""

    def __init__(self, model: Path) -> None:
        self.engine = SimpleNamespace(engine=FakeLLM(model), enable_lora=True)
        build = SimpleNamespace(vllm_use_async_engine=False)
        worker.build_engine(lambda arguments: self.engine, build)
        self.answers: list[Any] = []
        self.orders: list[str] = []
        self.is_gone = self.is_mute = False
        self.sending, self.answering = threading.Event(), threading.Event()
        self.sending.set()
        self.answering.set()

    @property
    def llm(self) -> FakeLLM:
        return self.engine.engine  # type: ignore[no-any-return]

    @property
    def switch(self) -> worker.Switch:
        found: worker.Switch = vars(self.engine)[worker._SWITCH]
        return found

    def send(self, order: dict[str, Any]) -> None:
        if self.is_gone:
            raise BrokenPipeError
        self.sending.wait()
        assert order["type"] == "call" and not self.answers
        self.orders.append((order["kwargs"].get("rpc") or {}).get("command", ""))
        method = getattr(self.engine, order["method"])
        self.answers.append(None if self.is_mute else method(*order["args"], **order["kwargs"]))

    def recv(self) -> Any:
        self.answering.wait()
        return self.answers.pop()


class Server:
    """What the routes see of ms-swift's ``SwiftRolloutDeploy``; ``folder`` has a model of one layer."""

    def __init__(self, folder: Path, workers: int = 2, **arguments: Any) -> None:
        safetensors.torch.save_file({f"{MODULE}.weight": torch.zeros(6, 8)}, str(folder / "model.safetensors"))
        defaults = dict(
            api_key="sesame",
            vllm_enable_lora=True,
            vllm_max_lora_rank=4,
            model="a-model",
            model_dir=str(folder),
            torch_dtype=torch.bfloat16,
            host="127.0.0.1",
            port=8000,
        )
        self.args = SimpleNamespace(**{**defaults, **arguments})
        self.num_connections = workers
        self.connections = [FakeConnection(folder) for _ in range(workers)]
        self.app = FastAPI()
        for path in ("infer", "update_named_param", "update_adapter_param", "init_communicator", "health"):
            self.app.post(f"/{path}/")(self.infer)

    async def infer(self) -> str:
        return "rollouts"


def leased(app: FastAPI) -> Iterator[TestClient]:
    """For the run ``RUN`` of this process."""
    with TestClient(app, headers=KEY) as made:
        assert lease(made).status_code == 200
        yield made


def adapter(value: float, digest: str | None = None, config: Any = None, **tensors: Any) -> Sent:
    """Its A begins with ``value``."""
    content = {A: torch.full((2, 8), value), B: torch.ones(6, 2), **tensors}
    return staged({n: t.bfloat16() for n, t in content.items() if t is not None}, config or CONFIGURATION, digest)


def policy(version: int, sent: Sent | None = None) -> Policy:
    return Policy(version=version, step=10 * version, digest=sent.digest if sent else f"digest-{version}", run=RUN)


def to(client: TestClient, **changes: Any) -> dict[str, Any]:
    told = status(client)
    return {"boot": told["boot"], "epoch": told["epoch"], "run": RUN, **changes}


def order(client: TestClient, route: str, content: dict[str, Any], **changes: Any) -> Any:
    return client.post(f"{PREFIX}/{route}/", json={"to": to(client, **changes), **content})


def lease(client: TestClient, run: str = RUN, **changes: Any) -> Any:
    holder = hosts.this_process(run).model_copy(update=changes)
    return client.post(f"{PREFIX}/lease/", json={"holder": holder.as_dict()})


def prepare(client: TestClient, sent: Sent) -> Any:
    return order(client, "prepare", {"layout": sent.layout.as_dict()})


def announce(client: TestClient, version: int, sent: Sent, nccl: bool = False) -> Any:
    """After the server has made room for it; and written into its memory."""
    answer = prepare(client, sent)
    if answer.status_code == 200:
        answer = order(client, "stage", {"policy": policy(version, sent).as_dict(), "nccl": nccl})
        if answer.status_code == 200 and not nccl:
            write(answer.json()["memory"], sent)
    return answer


def receive(client: TestClient, version: int, sent: Sent, written: bool = True) -> Any:
    return order(client, "receive", {"policy": policy(version, sent).as_dict(), "written": written})


def send_body(client: TestClient, version: int, sent: Sent, content: Any = None) -> Any:
    about = {"to": to(client), "policy": policy(version, sent).as_dict()}
    headers = {"Content-Type": BYTES, POLICY_HEADER: json.dumps(about)}
    return client.post(f"{PREFIX}/receive/", content=sent.body if content is None else content, headers=headers)


def stage(client: TestClient, version: int, sent: Sent) -> Any:
    """Announced, and received from the server's memory."""
    answer = announce(client, version, sent)
    return receive(client, version, sent) if answer.status_code == 200 else answer


def commit(client: TestClient, version: int, sent: Sent, **more: Any) -> Any:
    return order(client, "commit", {"policy": policy(version, sent).as_dict(), **more})


def status(client: TestClient) -> dict[str, Any]:
    return dict(client.get(f"{PREFIX}/status/", headers=KEY).json())


def served_by(client: TestClient) -> Any:
    return status(client)["policy"]


def refused(response: Any, code: int, kind: str, *phrases: str) -> None:
    assert (response.status_code, response.json()["error"]) == (code, kind), response.text
    assert all(phrase in response.json()["message"] for phrase in phrases), response.text


def rpcs(server: Server) -> list[list[str]]:
    """What vLLM's workers were asked, but for room: that they make once for a layout."""
    return [[name for name, _ in connection.llm.rpcs if name != "prepare"] for connection in server.connections]


def broken(error: Exception) -> RuntimeError:
    """As vLLM passes on what a worker raised."""
    return RuntimeError(f"Call to collective_rpc method failed: {receiver._tell(error)}")


def policies_of(server: Server) -> routes.Policies:
    found: routes.Policies = server.app.user_middleware[0].kwargs["policies"]
    return found


def wired(server: Server, sent: Sent) -> None:
    """NCCL is open to both workers, and brings this adapter."""
    for connection in server.connections:
        connection.llm.worker.communicator = SimpleNamespace(
            device="cpu", broadcast=lambda content, src, stream: content.copy_(sent.memory.tensor)
        )
