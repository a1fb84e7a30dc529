"""Rollout servers to be killed: this package's whole server side in its own processes, without vLLM under it.

    python -m tests.support.light_server MODEL PORT WORKERS

For each line on its input the process forks a web server in a session of its own, with its workers, and prints its id.
A worker's engine is a `Receiver` whose LoRA slots are a copy of what was received; a rollout's tokens are the digest of
those slots, computed anew.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from swift_lora_fix.engine.port import WriteReport
from swift_lora_fix.engine.vllm.slots.staging import host_digest
from swift_lora_fix.server.rollout import installing, receiver, worker
from tests.support.kills import say
from tests.support.reload_client import KEY


class Slots:
    """In place of ``AdapterWriter``."""

    plan = None

    def __init__(self, engine: Any, adapter: Any, *_: Any) -> None:
        self.adapter = adapter
        self.held: dict[str, torch.Tensor] = {}

    def is_current(self) -> bool:
        return True

    def digest(self) -> str:
        return host_digest(self.adapter, self.held, torch.bfloat16, fold=False)

    def write(self) -> WriteReport:
        self.held = {entry.key: entry.parameter.clone() for entry in self.adapter.entries}
        return WriteReport("light", digest=self.digest())

    write_by_reference = write

    def finish(self) -> None:
        pass

    accept = forget = finish


class Engine:
    """In place of vLLM's, in a worker."""

    def __init__(self, model: str) -> None:
        lora = SimpleNamespace(max_lora_rank=16, lora_dtype=torch.bfloat16)
        self.vllm_config = SimpleNamespace(lora_config=lora, model_config=SimpleNamespace(model=model))
        self.output_processor = SimpleNamespace(has_unfinished_requests=lambda: False)
        manager = SimpleNamespace(_load_adapter=lambda request: request)
        runner = SimpleNamespace(device=torch.device("cpu"), lora_manager=manager)
        self.receiver = receiver.Receiver(
            SimpleNamespace(model_runner=runner, vllm_config=self.vllm_config, communicator=None)
        )

    def collective_rpc(self, method: str, args: Any = (), kwargs: Any = None) -> list[None]:
        try:
            arguments = dict(kwargs)
            getattr(self.receiver, arguments.pop("command"))(**arguments)
        except Exception as error:
            raise RuntimeError(receiver._tell(error)) from error
        return [None]

    def reset_prefix_cache(self) -> bool:
        return True


@dataclass
class Output:
    response: dict[str, Any]
    rollout_infos: dict[str, Any] = field(default_factory=dict)


def work(model: str, pipe: Connection) -> None:
    """What ms-swift's ``llm_worker`` does."""
    engine = SimpleNamespace(engine=Engine(model), enable_lora=True)
    worker.build_engine(lambda arguments: engine, SimpleNamespace(vllm_use_async_engine=False))

    def infer(infer_requests: list[Any]) -> Any:
        switch = worker.switch_of(engine)
        assert switch is not None
        served = switch.served()
        tokens = "plain" if served.plain else engine.engine.receiver.writer.digest()
        choice = {"token_ids": [tokens], "logprobs": {"content": []}}
        return worker.tag(switch, served, [Output({"choices": [choice]}) for _ in infer_requests])

    engine.infer = infer
    while True:
        order = pipe.recv()
        try:
            result = getattr(engine, order["method"])(*order["args"], **order["kwargs"])
        except Exception as error:
            print(f"worker: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            result = None
        pipe.send(result)


class Server:
    """What ms-swift's ``SwiftRolloutDeploy`` is for the package."""

    def __init__(self, model: str, port: int, workers: int) -> None:
        self.args = SimpleNamespace(
            api_key=KEY,
            vllm_enable_lora=True,
            vllm_max_lora_rank=16,
            model=model,
            model_dir=model,
            torch_dtype=torch.bfloat16,
            host="127.0.0.1",
            port=port,
        )
        self.num_connections, self.connections = workers, []
        self.app = FastAPI()
        self.app.post("/infer/", response_model=None)(self.infer)
        for _ in range(workers):
            ours, theirs = Pipe()
            if not os.fork():
                ours.close()
                for other in self.connections:
                    other.close()
                try:
                    work(model, theirs)
                finally:
                    os._exit(1)
            theirs.close()
            self.connections.append(ours)

    async def infer(self, body: dict[str, Any]) -> list[Any]:
        """As ms-swift does: in the event loop, through the workers' pipes."""
        for connection, request in zip(self.connections, body["infer_requests"]):
            order = {"type": "call", "method": "infer", "args": (), "kwargs": {"infer_requests": [request]}}
            connection.send(order)
        return [vars(output) for connection in self.connections for output in connection.recv()]


def main() -> None:
    model, port, workers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    receiver.AdapterWriter = Slots  # type: ignore[assignment, misc]
    receiver._request_class = lambda worker: None
    torch.set_num_threads(1)
    os.environ.update(SWIFT_LORA_FIX_TRANSPORT="reload")
    say("ready")
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            server = Server(model, port, workers)
            installing.install(server)
            uvicorn.run(server.app, host="127.0.0.1", port=port, log_level="warning")
            os._exit(0)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        say(f"server {child}")


if __name__ == "__main__":
    main()
