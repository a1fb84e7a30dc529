"""The routes of a rollout server, all workers or none: real files and a real stager, no processes, no vLLM engine."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient

from swift_lora_fix import errors
from swift_lora_fix.engine.vllm.handle import ADAPTER_ID
from swift_lora_fix.server import wire as protocol
from swift_lora_fix.server.content import content_digest
from swift_lora_fix.server.rollout import checks, installing, receiver, routes, worker
from swift_lora_fix.server.rollout.files import Source
from swift_lora_fix.server.wire import (
    BYTES,
    CONFIG,
    EXTENSION,
    ORDER,
    POLICY_HEADER,
    PREFIX,
    RPC,
    WEIGHTS,
    Layout,
    Policy,
)

MODULE = "model.layers.0.self_attn.q_proj"
CONFIGURATION = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "peft_type": "LORA", "bias": "none"}
A, B = (f"base_model.model.{MODULE}.lora_{side}.weight" for side in "AB")
KEY = {"Authorization": "Bearer sesame"}
SWIFTS = "swift.pipelines.infer.rollout.WeightSyncWorkerExtension"


class FakeLLM:
    """What a stager asks of vLLM. ``loads`` are the adapters that it served, by what their A begins with, ``loader``
    those of them that its own loader was given; ``fail`` is raised by the next loads."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(
            lora_config=SimpleNamespace(max_lora_rank=4, lora_dtype=torch.bfloat16, max_cpu_loras=1),
            parallel_config=SimpleNamespace(data_parallel_size=1, worker_extension_cls=EXTENSION),
        )
        self.rpcs: list[tuple[str, dict[str, Any]]] = []  # what vLLM's workers were asked
        self.unfinished = False
        self.output_processor = SimpleNamespace(has_unfinished_requests=lambda: self.unfinished)
        self.loads: list[float] = []
        self.loader: list[float] = []
        self._read: dict[str, float] = {}  # by digest
        self.fail: list[Exception] = []
        self.resets = True

    def add_lora(self, request: Any) -> bool:
        assert request.lora_int_id == ADAPTER_ID and request.load_inplace
        if self.fail:
            raise self.fail.pop(0)
        self.loader.append(request.content.tensors[A][0, 0].item())
        self.loads.append(self.loader[-1])
        return True

    def reset_prefix_cache(self) -> bool:
        return self.resets

    def collective_rpc(self, method: str, args: Any = (), kwargs: Any = None) -> list[None]:
        assert method == RPC
        arguments = dict(kwargs)
        self.rpcs.append((arguments.pop("command"), arguments))
        if self.fail:
            raise self.fail.pop(0)
        command, digest = self.rpcs[-1][0], arguments.get("digest", "")
        if command == "read":
            with safetensors.safe_open(arguments["path"], framework="pt") as file:
                self._read[digest] = file.get_tensor(A)[0, 0].item()
        if command == "serve" and digest in self._read:
            self.loads.append(self._read[digest])
        return [None]


class FakeAsyncLLM(FakeLLM):
    async def add_lora(self, request: Any) -> bool:  # type: ignore[override]
        return super().add_lora(request)

    async def reset_prefix_cache(self) -> bool:  # type: ignore[override]
        return super().reset_prefix_cache()


class FakeConnection:
    """A worker in this process: what ``llm_worker`` does with an order."""

    def __init__(self, model: Path) -> None:
        self.engine = SimpleNamespace(engine=FakeLLM(), model_dir=str(model), enable_lora=True)
        build = SimpleNamespace(vllm_use_async_engine=False)
        worker.build_engine(lambda arguments: self.engine, build)
        self.answers: list[Any] = []
        self.orders: list[str] = []
        self.is_gone = self.is_mute = False

    @property
    def llm(self) -> FakeLLM:
        return self.engine.engine  # type: ignore[no-any-return]

    @property
    def stager(self) -> worker.Stager:
        found: worker.Stager = vars(self.engine)[worker._STAGER]
        return found

    def send(self, order: dict[str, Any]) -> None:
        if self.is_gone:
            raise BrokenPipeError
        assert order["type"] == "call" and not self.answers
        self.orders.append(order["args"][0])
        method = getattr(self.engine, order["method"])
        self.answers.append(None if self.is_mute else method(*order["args"], **order["kwargs"]))

    def poll(self, seconds: float) -> bool:
        return bool(self.answers)

    def recv(self) -> Any:
        return self.answers.pop()


class Server:
    """What the routes see of ms-swift's ``SwiftRolloutDeploy``; ``folder`` has a model of one layer."""

    def __init__(self, folder: Path, workers: int = 2, **arguments: Any) -> None:
        self.root = folder / "root"
        self.root.mkdir()
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
        self.app.post("/infer/")(self.infer)
        self.app.post("/update_named_param/")(self.infer)
        self.app.post("/update_adapter_param/")(self.infer)

    async def infer(self) -> str:
        return "rollouts"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("SWIFT_LORA_FIX_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("SWIFT_LORA_FIX_MAX_MIB", "1")
    monkeypatch.setenv("SWIFT_LORA_FIX_TRANSPORT", "reload")
    made = Server(tmp_path)
    installing.install(made)
    return made


@pytest.fixture
def client(server: Server) -> Iterator[TestClient]:
    with TestClient(server.app, headers=KEY) as made:
        yield made


def policy(version: int) -> Policy:
    return Policy(version, 10 * version, f"digest-{version}", "ab")


def adapter(
    server: Server,
    value: float,
    change: Callable[[dict[str, Any]], None] | None = None,
    about: dict[str, str] | None = None,
    **config: Any,
) -> Path:
    """A folder whose A begins with ``value``. about: its safetensors metadata."""
    folder = server.root / f"adapter-{len(list(server.root.iterdir()))}"
    folder.mkdir()
    a = torch.full((2, 8), value)
    tensors = {A: a, B: torch.ones(6, 2)}
    if change is not None:
        change(tensors)
    safetensors.torch.save_file(tensors, str(folder / WEIGHTS), about)
    (folder / CONFIG).write_text(json.dumps({**CONFIGURATION, **config}, sort_keys=True))
    return folder


def digest_of(folder: Path) -> str:
    return content_digest((folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes())


def stage(client: TestClient, version: int, folder: Path) -> Any:
    body = {"policy": policy(version).as_dict(), "digest": digest_of(folder), "folder": str(folder)}
    return client.post(f"{PREFIX}/stage/", json=body)


def commit(client: TestClient, version: int) -> Any:
    return client.post(f"{PREFIX}/commit/", json={"policy": policy(version).as_dict()})


def status(client: TestClient) -> dict[str, Any]:
    return dict(client.get(f"{PREFIX}/status/").json())


def refused(response: Any, code: int, kind: str, *phrases: str) -> None:
    assert (response.status_code, response.json()["error"]) == (code, kind), response.text
    assert all(phrase in response.json()["message"] for phrase in phrases), response.text


@pytest.fixture
def served(server: Server, client: TestClient) -> int:
    """Version 1, whose A begins with 1, is what both workers serve."""
    assert stage(client, 1, adapter(server, 1.0)).status_code == 200
    assert commit(client, 1).status_code == 200
    return 1


# ---- the way it goes -----------------------------------------------------------------------------------------------


def test_all_workers_serve_what_was_staged(server: Server, client: TestClient, served: int) -> None:
    assert [c.llm.loads for c in server.connections] == [[1.0], [1.0]]
    assert status(client)["policy"] == policy(1).as_dict() and status(client)["workers"] == 2
    assert stage(client, 2, adapter(server, 2.0)).status_code == 200
    assert [c.llm.loads for c in server.connections] == [[1.0], [1.0]], "staging touches no engine"
    assert commit(client, 2).status_code == commit(client, 2).status_code == 200
    assert [c.llm.loads for c in server.connections] == [[1.0, 2.0]] * 2, "the second commit loads nothing"
    assert [c.stager.served().infos()["policy_version"] for c in server.connections] == [2, 2]


def test_bytes_in_the_body(server: Server, client: TestClient) -> None:
    folder = adapter(server, 3.0)
    about = {"policy": policy(1).as_dict(), "digest": digest_of(folder), "config": CONFIGURATION}
    headers = {"Content-Type": BYTES, POLICY_HEADER: json.dumps(about)}
    body = (folder / WEIGHTS).read_bytes()
    wrong = {**headers, POLICY_HEADER: json.dumps({**about, "digest": "0" * 64})}
    refused(client.post(f"{PREFIX}/stage/", content=body, headers=wrong), 422, "StagingError", "truncated")
    assert [c.orders for c in server.connections] == [[], []], "another digest is not shown to the workers"
    assert client.post(f"{PREFIX}/stage/", content=body, headers=headers).status_code == 200
    assert commit(client, 1).status_code == 200
    assert [c.llm.loads for c in server.connections] == [[3.0], [3.0]]


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large(client: TestClient, announced: bool) -> None:
    body = b"\0" * ((1 << 20) + 1)
    about = {"policy": policy(1).as_dict(), "digest": "0" * 64, "config": CONFIGURATION}
    headers = {"Content-Type": BYTES, POLICY_HEADER: json.dumps(about)}
    content: Any = body if announced else iter([body[:1000], body[1000:]])
    refused(client.post(f"{PREFIX}/stage/", content=content, headers=headers), 413, "StagingError", "MAX_MIB")


def test_a_folder_outside_the_root(server: Server, client: TestClient, served: int) -> None:
    body = {"policy": policy(2).as_dict(), "digest": "0" * 64, "folder": str(server.root.parent)}
    refused(client.post(f"{PREFIX}/stage/", json=body), 403, "AccessError", "not right below this server's root")
    body["folder"] = str(server.root / "absent")
    refused(client.post(f"{PREFIX}/stage/", json=body), 404, "StagingError", "cannot be opened on the server")


def test_a_file_goes_straight_to_vllms_workers(server: Server, client: TestClient) -> None:
    """Which are told once what it looks like, and how its B is scaled."""
    folders = [adapter(server, value) for value in (1.0, 2.0)]
    for version, folder in enumerate(folders, 1):
        assert stage(client, version, folder).status_code == commit(client, version).status_code == 200
    first, second = (digest_of(folder) for folder in folders)
    calls = ["make_room", f"read {first}", f"serve {first}", f"read {second}", f"serve {second}"]
    assert rpcs(server) == [calls] * 2
    layout = Layout("bfloat16", ((A, (2, 8)), (B, (6, 2))), CONFIGURATION)
    room, read = (arguments for _, arguments in server.connections[0].llm.rpcs[:2])
    assert room == {"layout": layout.as_dict(), "scales": {B: 2.0}}
    assert read["is_proved"] is False, "the policy's digest is of a trainer's order, which this file does not tell"
    assert [c.llm.loader for c in server.connections] == [[], []]


def bfloat16(tensors: dict[str, Any]) -> None:
    tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_a_trainers_file_is_proved_by_the_policys_digest(server: Server, client: TestClient) -> None:
    folder = adapter(server, 1.0, bfloat16, {ORDER: json.dumps([B, A])}, lora_alpha=2)
    assert stage(client, 1, folder).status_code == commit(client, 1).status_code == 200
    (_, room), (_, read), (_, serve) = server.connections[1].llm.rpcs
    assert [key for key, _ in room["layout"]["entries"]] == [B, A] and room["scales"] == {}
    assert read["is_proved"] is True and read["digest"] == serve["digest"] == policy(1).digest


@pytest.mark.parametrize("order", ["", "{}", "[1, 2]", json.dumps([A]), json.dumps([A, B, B])])
def test_an_order_that_is_not_the_files(server: Server, client: TestClient, order: str) -> None:
    refused(stage(client, 1, adapter(server, 1.0, about={ORDER: order})), 422, "StagingError", "list of its 2 tensors")


def short(tensors: dict[str, Any]) -> None:
    tensors.update({A: tensors[A][:1].clone(), B: tensors[B][:, :1].clone()})


def test_what_is_served_is_not_given_up_for_another_layout(server: Server, client: TestClient, served: int) -> None:
    """It goes by vLLM's loader, the next one of its kind straight again."""
    for version in (2, 3):
        folder = adapter(server, float(version), short, r=1, lora_alpha=1)
        assert stage(client, version, folder).status_code == commit(client, version).status_code == 200
    assert [c.llm.loads for c in server.connections] == [[1.0, 2.0, 3.0]] * 2
    assert [c.llm.loader for c in server.connections] == [[2.0]] * 2


def test_where_vllms_workers_cannot_take_it_its_loader_does(
    server: Server, client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("swift").propagate = True
    one, other = (connection.llm for connection in server.connections)
    one.vllm_config.parallel_config.data_parallel_size = 2
    other.fail = [RuntimeError(receiver._tell(torch.OutOfMemoryError("Tried to allocate 20 GiB.")))]
    for version in (1, 2):
        with caplog.at_level(logging.INFO, "swift.lora_fix"):
            assert stage(client, version, adapter(server, float(version))).status_code == 200
        assert commit(client, version).status_code == 200
    assert one.loader == other.loader == [1.0, 2.0]
    assert caplog.text.count("Tried to allocate") == 1
    assert [name for name, _ in other.rpcs] == ["make_room", "check_served", "check_served"]
    bad = adapter(server, float("nan"))
    refused(stage(client, 3, bad), 422, "NonFiniteAdapterError", "1 of the adapter's 2 tensors")


def test_a_worker_that_cannot_read_it_has_vllms_loader_do_so(server: Server, client: TestClient, served: int) -> None:
    llm = server.connections[1].llm
    llm.fail = [RuntimeError(receiver._tell(torch.OutOfMemoryError("Tried to allocate 2 GiB.")))]
    for version in (2, 3):
        assert stage(client, version, adapter(server, float(version))).status_code == 200
        assert commit(client, version).status_code == 200
    assert [c.llm.loader for c in server.connections] == [[], [2.0, 3.0]]
    assert [c.llm.loads for c in server.connections] == [[1.0, 2.0, 3.0]] * 2
    corrupt = errors.StagingError("What was read has digest a, b was announced: send it again.")
    server.connections[0].llm.fail = [RuntimeError(receiver._tell(corrupt))]
    refused(stage(client, 4, adapter(server, 4.0)), 422, "StagingError", "What was read has digest a")


def test_what_could_not_be_switched_to_is_tried_by_vllms_loader(
    server: Server, client: TestClient, served: int
) -> None:
    assert stage(client, 2, adapter(server, 2.0)).status_code == 200
    server.connections[0].llm.fail = [RuntimeError("no memory for the plan")]
    refused(commit(client, 2), 500, "RuntimeError", "no memory", "Every worker serves version 1 ")
    assert stage(client, 3, adapter(server, 3.0)).status_code == commit(client, 3).status_code == 200
    assert [c.llm.loader for c in server.connections] == [[3.0], []]


def test_by_reference(server: Server, client: TestClient) -> None:
    assert stage(client, 1, adapter(server, 1.0)).status_code == 200
    body = {"policy": policy(1).as_dict(), "by_reference": "yes"}
    refused(client.post(f"{PREFIX}/commit/", json=body), 400, "ProtocolError", "by_reference is 'yes'")
    assert client.post(f"{PREFIX}/commit/", json={**body, "by_reference": True}).status_code == 200
    assert server.connections[0].llm.rpcs[-1][1]["by_reference"] is True


# ---- one of the workers fails --------------------------------------------------------------------------------------


def test_one_worker_that_cannot_stage(server: Server, client: TestClient, served: int) -> None:
    server.connections[1].llm.vllm_config.lora_config.max_lora_rank = 1
    refused(stage(client, 2, adapter(server, 2.0)), 422, "StagingError", "has rank 2, this server has room for 1")
    assert [c.stager.pending for c in server.connections] == [None, None]
    refused(commit(client, 2), 409, "StagingError", "nothing is staged")
    assert status(client)["policy"] == policy(1).as_dict()


@pytest.mark.parametrize("failing", [0, 1])
def test_one_worker_that_cannot_commit(server: Server, client: TestClient, served: int, failing: int) -> None:
    assert stage(client, 2, adapter(server, 2.0)).status_code == 200
    server.connections[failing].llm.fail = [errors.UnsupportedAdapterError("vLLM says no.")]
    refused(commit(client, 2), 500, "UnsupportedAdapterError", "vLLM says no.", "Every worker serves version 1 ")
    assert [c.llm.loads[-1] for c in server.connections] == [1.0, 1.0], "each has the previous policy again"
    assert [c.stager.served().infos()["policy_version"] for c in server.connections] == [1, 1]
    assert status(client)["policy"] == policy(1).as_dict()
    assert client.post("/infer/", headers={POLICY_HEADER: json.dumps(policy(1).as_dict())}).status_code == 200
    assert stage(client, 3, adapter(server, 3.0)).status_code == commit(client, 3).status_code == 200


def test_a_cache_that_is_not_reset(server: Server, client: TestClient, served: int) -> None:
    assert stage(client, 2, adapter(server, 2.0)).status_code == 200
    answers = iter([False, True])
    server.connections[1].llm.reset_prefix_cache = lambda: next(answers)  # type: ignore[method-assign]
    refused(commit(client, 2), 500, "CacheResetError", "reset_prefix_cache()", "Every worker serves version 1 ")


def test_requests_that_are_not_finished(server: Server, client: TestClient, served: int) -> None:
    assert stage(client, 2, adapter(server, 2.0)).status_code == 200
    server.connections[0].llm.unfinished = True
    refused(commit(client, 2), 500, "EngineStateError", "unfinished requests", "serves version 1 ")
    refused(client.post(f"{PREFIX}/serve/", json={"plain": True}), 500, "EngineStateError", "unfinished requests")
    assert status(client)["plain"] is False and [c.stager.plain for c in server.connections] == [False, False]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_worker_that_cannot_go_back(server: Server, client: TestClient, served: int, failing: int) -> None:
    assert stage(client, 2, adapter(server, 2.0)).status_code == 200
    server.connections[failing].llm.fail = [ValueError("out of memory"), ValueError("still out of memory")]
    refused(commit(client, 2), 500, "EngineStateError", "out of memory", "still out of memory", "serves nothing")
    assert status(client)["policy"] is None
    refused(client.post("/infer/"), 503, "EngineStateError")
    for connection in server.connections:
        with pytest.raises(errors.EngineStateError, match="No policy was committed"):
            connection.stager.served()
    assert stage(client, 2, adapter(server, 2.0)).status_code == commit(client, 2).status_code == 200


def test_the_first_policy_fails(server: Server, client: TestClient) -> None:
    assert stage(client, 1, adapter(server, 1.0)).status_code == 200
    server.connections[1].llm.fail = [ValueError("no")]
    refused(commit(client, 1), 500, "ValueError", "Every worker serves nothing, as before")
    assert status(client)["policy"] is None
    refused(client.post("/infer/"), 503, "EngineStateError")


def test_workers_that_ended_or_do_not_know_us(server: Server, client: TestClient, served: int) -> None:
    folder = adapter(server, 2.0)
    server.connections[0].is_mute = True
    refused(stage(client, 2, folder), 500, "EngineStateError", "Worker 0", "its log says why")
    server.connections[0].is_mute = False
    assert stage(client, 2, folder).status_code == 200
    server.connections[1].is_gone = True
    refused(commit(client, 2), 500, "EngineStateError", "Worker 1 of this rollout server has ended", "serves nothing")
    assert status(client)["policy"] is None


# ---- who may ask, and for what -------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [{}, {"Authorization": "sesame"}, {"Authorization": "Bearer sesam"}])
def test_the_key(server: Server, header: dict[str, str]) -> None:
    with TestClient(server.app, headers=header) as client:
        for verb in ("stage", "commit", "abort", "serve"):
            refused(client.post(f"{PREFIX}/{verb}/", json={}), 401, "AccessError", "SWIFT_LORA_FIX_API_KEY")
        for verb in ("status", "base"):
            refused(client.get(f"{PREFIX}/{verb}/"), 401, "AccessError", "Bearer")


def test_the_base(server: Server, client: TestClient) -> None:
    first = client.get(f"{PREFIX}/base/").json()
    assert first == {"sums": {f"{MODULE}.weight": ["bfloat16", [6, 8], 0]}}
    Path(server.args.model_dir, "model.safetensors").unlink()
    assert client.get(f"{PREFIX}/base/").json() == first, "computed once"


def test_plain(server: Server, client: TestClient, served: int) -> None:
    expected = {POLICY_HEADER: json.dumps(policy(1).as_dict())}
    assert client.post(f"{PREFIX}/serve/", json={"plain": True}).status_code == 200
    assert [c.engine.enable_lora for c in server.connections] == [False, False]
    assert [c.stager.served().request for c in server.connections] == [None, None]
    assert client.post("/infer/").status_code == 200
    refused(client.post("/infer/", headers=expected), 409, "PolicyMismatchError", "the plain base")
    assert commit(client, 1).status_code == 200, "repeated"
    assert [c.engine.enable_lora for c in server.connections] == [True, True]
    assert client.post("/infer/", headers=expected).status_code == 200


def test_nccl_routes_are_refused(client: TestClient) -> None:
    refused(client.post("/update_named_param/"), 409, "ProtocolError", "SWIFT_LORA_FIX_TRANSPORT=reload")


def test_a_server_without_lora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(tmp_path, vllm_enable_lora=False)
    logging.getLogger("swift").propagate = True
    with caplog.at_level(logging.WARNING, "swift.lora_fix"):
        installing.install(server)
    assert "stepping aside" in caplog.text and "--vllm_enable_lora true" in caplog.text
    assert TestClient(server.app).get(f"{PREFIX}/status/").status_code == 404
    monkeypatch.setenv("SWIFT_LORA_FIX_TRANSPORT", "reload")
    with pytest.raises(errors.SettingsError, match="--vllm_enable_lora true"):
        installing.install(server)


@pytest.mark.parametrize(
    "arguments, phrase",
    [
        ({"host": "0.0.0.0", "api_key": None}, "without --api_key"),
        ({"host": "::", "api_key": None}, "without --api_key"),
        ({"host": "127.0.0.1", "api_key": None}, ""),
        ({"host": "0.0.0.0"}, "ignores it for its own"),
    ],
)
def test_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture, arguments: Any, phrase: str) -> None:
    logging.getLogger("swift").propagate = True
    with caplog.at_level(logging.WARNING, "swift.lora_fix"):
        installing.install(Server(tmp_path, **arguments))
    assert phrase in caplog.text if phrase else not caplog.text


# ---- over NCCL -----------------------------------------------------------------------------------------------------


LAYOUT = Layout(
    "bfloat16",
    ((A, (2, 8)), (B, (6, 2))),
    {**CONFIGURATION, "lora_alpha": 2},
)


@pytest.fixture
def open_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Where no transport is asked for by name."""
    monkeypatch.setenv("SWIFT_LORA_FIX_ROOT", str(tmp_path / "root"))
    made = Server(tmp_path)
    installing.install(made)
    return made


@pytest.fixture
def nccl(open_server: Server) -> Iterator[TestClient]:
    with TestClient(open_server.app, headers=KEY) as made:
        yield made


def announce(client: TestClient, version: int, layout: Layout = LAYOUT) -> Any:
    body = {"policy": policy(version).as_dict(), "layout": layout.as_dict()}
    return client.post(f"{PREFIX}/stage/", json=body)


def ask(client: TestClient, route: str, version: int) -> Any:
    return client.post(f"{PREFIX}/{route}/", json={"policy": policy(version).as_dict()})


def rpcs(server: Server) -> list[list[str]]:
    return [
        [f"{name} {arguments.get('digest', '')}".strip() for name, arguments in c.llm.rpcs] for c in server.connections
    ]


def test_a_layout_that_is_refused_leaves_what_there_is(open_server: Server, nccl: TestClient) -> None:
    """Over NCCL, which may not be open to a server that takes files."""
    assert stage(nccl, 1, adapter(open_server, 1.0)).status_code == commit(nccl, 1).status_code == 200
    closed = errors.StagingError("The server's vLLM workers have no NCCL connection to this trainer.", 501)
    for connection in open_server.connections:
        connection.llm.fail = [RuntimeError(receiver._tell(closed))]
    refused(announce(nccl, 2), 501, "StagingError", "no NCCL connection")
    assert stage(nccl, 2, adapter(open_server, 2.0)).status_code == commit(nccl, 2).status_code == 200
    assert [c.llm.loader for c in open_server.connections] == [[], []], "straight, as before"


def test_an_adapter_comes_over_nccl(open_server: Server, nccl: TestClient) -> None:
    assert announce(nccl, 1).status_code == 200
    refused(commit(nccl, 1), 409, "StagingError", "nothing is staged")
    refused(ask(nccl, "receive", 2), 409, "StagingError", "was not announced")
    assert ask(nccl, "receive", 1).status_code == 200
    assert commit(nccl, 1).status_code == 200
    assert rpcs(open_server) == [["prepare", "receive digest-1", "serve digest-1"]] * 2
    assert open_server.connections[0].llm.rpcs[0][1] == {"layout": LAYOUT.as_dict()}
    assert status(nccl)["policy"] == policy(1).as_dict()
    request = open_server.connections[0].stager.served().request
    assert (request.lora_int_id, request.load_inplace) == (ADAPTER_ID, False)
    assert ask(nccl, "find", 2).status_code == 200, "what was sent before, as another version"
    assert commit(nccl, 2).status_code == 200
    assert rpcs(open_server)[1][3:] == ["find digest-2", "serve digest-2"]


@pytest.mark.parametrize(
    "changes, status_code, phrase",
    [
        ({"entries": (*LAYOUT.entries[:1], (LAYOUT.entries[1][0], (6, 3)))}, 422, "A has rank 2 and B 3"),
        ({"entries": (*LAYOUT.entries[:1], (LAYOUT.entries[1][0], (7, 2)))}, 422, "are for (7, 8)"),
        ({"entries": ()}, 422, "has no tensors"),
        ({"dtype": "int8"}, 400, "dtype is 'int8'"),
        ({"config": {**CONFIGURATION, "r": 1, "lora_alpha": 1}}, 422, "rank 2"),
        ({"config": CONFIGURATION}, 400, "r=2 and lora_alpha=4: over NCCL the scaling is in B"),
    ],
)
def test_what_is_announced_is_checked_before_any_byte(
    open_server: Server, nccl: TestClient, changes: Any, status_code: int, phrase: str
) -> None:
    import dataclasses

    answer = announce(nccl, 1, dataclasses.replace(LAYOUT, **changes))
    assert answer.status_code == status_code and phrase in answer.json()["message"], answer.text
    assert rpcs(open_server) == [[], []]
    assert ask(nccl, "receive", 1).status_code == 409


def test_a_layout_that_is_none(nccl: TestClient) -> None:
    for layout in (None, [], {"dtype": "bfloat16"}, {**LAYOUT.as_dict(), "entries": [["a", [0, 1]]]}):
        body = {"policy": policy(1).as_dict(), "layout": layout}
        refused(nccl.post(f"{PREFIX}/stage/", json=body), 400, "ProtocolError", "layout")


def test_a_worker_that_cannot_receive(open_server: Server, nccl: TestClient) -> None:
    error = errors.StagingError("What arrived over NCCL has digest x.")
    open_server.connections[1].llm.fail = [
        RuntimeError(f"Call to collective_rpc method failed: {receiver._tell(error)}")
    ]
    refused(announce(nccl, 1), 422, "StagingError", "What arrived over NCCL has digest x.")
    assert announce(nccl, 1).status_code == 200
    open_server.connections[0].llm.fail = [RuntimeError("NCCL error: unhandled system error")]
    refused(ask(nccl, "receive", 1), 422, "RuntimeError", "NCCL error")
    refused(commit(nccl, 1), 409, "StagingError", "nothing is staged")


def test_an_engine_that_takes_nothing_over_nccl_says_so(open_server: Server, nccl: TestClient) -> None:
    open_server.connections[1].llm.vllm_config.parallel_config.data_parallel_size = 2
    refused(announce(nccl, 1), 501, "StagingError", "data parallelism")
    open_server.connections[0].llm.vllm_config.parallel_config.worker_extension_cls = SWIFTS
    refused(announce(nccl, 1), 501, "StagingError", "worker_extension_cls")


@pytest.mark.parametrize("failing", [0, 1])
def test_one_worker_that_cannot_serve_takes_the_others_back(
    open_server: Server, nccl: TestClient, failing: int
) -> None:
    for version in (1, 2):
        assert announce(nccl, version).status_code == ask(nccl, "receive", version).status_code == 200
        if version == 1:
            assert commit(nccl, 1).status_code == 200
    open_server.connections[failing].llm.fail = [RuntimeError("no room")]
    refused(commit(nccl, 2), 500, "RuntimeError", "no room", "version 1", "as before")
    assert [calls[-1] for calls in rpcs(open_server)] == ["serve digest-1"] * 2
    assert status(nccl)["policy"] == policy(1).as_dict()


def test_a_trainer_without_us_is_served_as_before(open_server: Server, nccl: TestClient) -> None:
    assert nccl.post("/infer/").status_code == 200, "there may be no policy"
    assert worker.stager_of(open_server.connections[0].engine) is None
    assert announce(nccl, 1).status_code == 200
    refused(nccl.post("/infer/"), 503, "EngineStateError", "No policy was committed")
    assert ask(nccl, "receive", 1).status_code == commit(nccl, 1).status_code == 200
    assert not status(nccl)["base_is_pushed"]
    assert nccl.post("/update_named_param/").status_code == 200
    assert status(nccl)["base_is_pushed"] and status(nccl)["policy"] == policy(1).as_dict()
    assert nccl.post("/update_adapter_param/").status_code == 200, "now another trainer's"
    assert status(nccl)["policy"] is None
    assert nccl.post("/infer/").status_code == 200
    assert worker.stager_of(open_server.connections[0].engine) is None


def test_a_trainer_with_another_key_changes_nothing(open_server: Server, nccl: TestClient) -> None:
    assert announce(nccl, 1).status_code == ask(nccl, "receive", 1).status_code == commit(nccl, 1).status_code == 200
    open_server._require_api_key = None  # type: ignore[attr-defined]  # from 4.6.0 on
    for path in ("/update_adapter_param/", "/update_named_param/"):
        nccl.get(path)
        nccl.post(path, headers={"Authorization": "Bearer other"})
    assert status(nccl)["policy"] == policy(1).as_dict() and not status(nccl)["base_is_pushed"]


def test_a_worker_that_does_not_answer_is_not_asked_again(
    open_server: Server, nccl: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert announce(nccl, 1).status_code == ask(nccl, "receive", 1).status_code == commit(nccl, 1).status_code == 200
    assert announce(nccl, 2).status_code == 200
    waited: list[float] = []
    connection = open_server.connections[0]
    monkeypatch.setattr(connection, "poll", lambda seconds: bool(waited.append(seconds)))
    refused(ask(nccl, "receive", 2), 500, "EngineStateError", "Worker 0", "restart the server")
    assert waited == [300]
    connection.answers.clear()
    refused(announce(nccl, 2), 500, "EngineStateError", "Worker 0")
    assert waited == [300], "its next answer would be to something else"


def test_what_ms_swift_only_logs_is_told(open_server: Server, nccl: TestClient) -> None:
    assert nccl.post(f"{PREFIX}/pushed/", json={}).status_code == 200
    engine = open_server.connections[1].llm
    for method in ("init_communicator", "update_flattened_params"):
        with pytest.raises(AssertionError):  # as ms-swift's worker calls it, which goes on
            engine.collective_rpc(method=method, args=([],))
    refused(nccl.post(f"{PREFIX}/pushed/", json={}), 500, "EngineStateError", "1 updates over NCCL failed")
    assert nccl.post(f"{PREFIX}/pushed/", json={}).status_code == 200, "told once"


# ---- in the worker -------------------------------------------------------------------------------------------------


async def _turns(infer_requests: list[Any]) -> list[Any]:
    return [SimpleNamespace(rollout_infos={"num_turns": 2}) for _ in infer_requests]


async def _answers(infer_requests: list[Any]) -> list[Any]:
    return [SimpleNamespace(rollout_infos={}) for _ in infer_requests]


def test_an_asynchronous_engine_and_its_scheduler(server: Server) -> None:
    import asyncio

    engine = SimpleNamespace(engine=FakeAsyncLLM(), model_dir=server.args.model_dir, enable_lora=True)
    engine.async_infer = _answers
    worker.build_engine(lambda arguments: engine, SimpleNamespace(vllm_use_async_engine=True))
    scheduler = SimpleNamespace(infer_engine=engine, async_infer=_turns)
    worker.tag_scheduler(scheduler)
    folder, command = adapter(server, 4.0), getattr(engine, routes.METHOD)
    source = Source(digest_of(folder), (folder / CONFIG).read_bytes(), str(folder / WEIGHTS))
    sample, probe = SimpleNamespace(uuid="f00"), {"uuid": f"{protocol.PROBE}0"}
    nobody = SimpleNamespace(uuid=None, messages=[{"role": "user", "content": "<placeholder>"}])

    async def everything() -> list[Any]:
        with pytest.raises(errors.EngineStateError):
            await scheduler.async_infer([sample])
        for name, arguments in (("stage", {"source": source}), ("commit", {})):
            answer = await command(name, policy=policy(1).as_dict(), **arguments)
            assert "error" not in answer, answer
        return [output for asked in (sample, probe, nobody) for output in await scheduler.async_infer([asked])]

    output, answer, none = asyncio.run(everything())
    assert answer.rollout_infos == none.rollout_infos == {}, "the gate asks the engine, not the scheduler"
    assert engine.engine.loads == [4.0]
    assert output.rollout_infos == {"num_turns": 2, **{f"policy_{k}": v for k, v in policy(1).as_dict().items()}}


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
    """Where the scaling is in B nothing depends on a module's rank; else the config must name it."""
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": torch.zeros(shape)
        for module, rank in (("a.q_proj", 4), ("a.k_proj", 2))
        for side, shape in (("A", (rank, 8)), ("B", (6, rank)))
    }
    checks.check_names(tensors, {"r": 4, "lora_alpha": 4, "rank_pattern": {}}, 4)
    checks.check_names(tensors, {"r": 4, "lora_alpha": 8, "rank_pattern": {"k_proj": 2}}, 4)
    for config in ({"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 4, "use_rslora": True}, {"r": 2, "lora_alpha": 2}):
        with pytest.raises(errors.StagingError, match="has rank"):
            checks.check_names(tensors, config, 4)


def test_modules_that_the_files_do_not_name_are_left_to_vllm() -> None:
    base = {"model.layers.0.self_attn.q_proj.weight": _header(6, 8)}

    def pair(module: str) -> dict[str, torch.Tensor]:
        return {
            f"base_model.model.{module}.lora_A.weight": torch.zeros(2, 8),
            f"base_model.model.{module}.lora_B.weight": torch.zeros(6, 2),
        }

    checks.check_shapes(pair("language_model.layers.0.self_attn.q_proj"), base)  # named otherwise altogether
    checks.check_shapes({**pair(MODULE), **pair("model.layers.0.mlp.experts.base_layer")}, base)
    for unknown in ("model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.nope"):
        with pytest.raises(errors.StagingError, match=f"no module '{unknown}'"):
            checks.check_shapes({**pair(MODULE), **pair(unknown)}, base)


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
