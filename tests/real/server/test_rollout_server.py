"""One real ``swift rollout`` on the CPU; what it refuses must leave what it serves as it was.

With SLF_SERVER_ASYNC=1 in the environment its engine is the asynchronous one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
import torch

from swift_lora_fix.server.wire import PREFIX, PROTOCOL, Policy
from tests.support.driver import PLUGINS, make_model, this_python
from tests.support.parcels import Sent
from tests.support.reload_client import ReloadServer, made_adapter, sent_of
from tests.support.shm import names

pytestmark = pytest.mark.e2e

RUN = "5eed"
IS_ASYNC = bool(os.environ.get("SLF_SERVER_ASYNC"))
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReloadServer]:
    folder = tmp_path_factory.mktemp("server")
    model = make_model(this_python(), folder, "qwen2")
    arguments = {"vllm_use_async_engine": "true"} if IS_ASYNC else {}
    path = os.pathsep.join([str(PLUGINS), os.environ.get("PYTHONPATH", "")])
    environment = {
        "SLF_FAULT_ORDER": str(folder / "order.json"),
        "PYTHONPATH": path,
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # a function goes to vLLM's worker
    }
    plugins = (PLUGINS / "slf_server_faults.py",)
    with ReloadServer(model, folder, arguments, environment, plugins=plugins) as running:
        yield running


@pytest.fixture(scope="module")
def adapters(server: ReloadServer) -> list[Sent]:
    return [sent_of(made_adapter(server.model, seed)) for seed in (1, 2)]


class Versions:
    """The policies of one run, each newer than the last."""

    def __init__(self) -> None:
        self.version = 0

    def next(self, sent: Sent) -> Policy:
        self.version += 1
        return Policy(version=self.version, step=10 * self.version, digest=sent.digest, run=RUN)


@pytest.fixture(scope="module")
def versions() -> Versions:
    return Versions()


@pytest.fixture
def served(server: ReloadServer, adapters: list[Sent], versions: Versions) -> Policy:
    """The first adapter, committed."""
    policy = versions.next(adapters[0])
    assert server.lease(RUN).status_code == 200
    assert server.stage(policy, adapters[0]).status_code == 200
    assert server.commit(policy).status_code == 200
    return policy


def refused(response: requests.Response, status: int, kind: str, *phrases: str) -> None:
    body = response.json()
    assert (response.status_code, body["error"]) == (status, kind), body
    for phrase in phrases:
        assert phrase in body["message"], body["message"]


def altered(server: ReloadServer, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Sent:
    """The second adapter with another config or other tensors."""
    made = made_adapter(server.model, 2)
    change(made["config"], made["tensors"])
    return sent_of({**made, "tensors": {name: tensor.contiguous() for name, tensor in made["tensors"].items()}})


# ---- before the first policy (in the order of this file) ------------------------------------------------------------


def test_it_says_what_it_is(server: ReloadServer) -> None:
    status = server.status()
    expected = {
        "protocol": PROTOCOL,
        "enable_lora": True,
        "max_lora_rank": 16,
        "policy": None,
        "plain": False,
        "logits_processors": [],
        "workers": 1,
        "epoch": 0,
    }
    assert {name: status[name] for name in expected} == expected
    assert status["lora_dtype"] == "bfloat16" and len(status["boot"]) == 16


def test_no_rollouts_before_a_policy(server: ReloadServer) -> None:
    refused(server.infer(), 503, "EngineStateError", "No policy was committed")


def test_the_base_is_the_trainers(server: ReloadServer) -> None:
    from transformers import AutoModelForCausalLM

    from swift_lora_fix.common.digest import checksum

    sums = server.call("GET", f"{PREFIX}/base/").json()["sums"]
    model = AutoModelForCausalLM.from_pretrained(server.model, dtype=torch.bfloat16)
    expected = {n: ["bfloat16", list(p.shape), int(checksum(p.detach()))] for n, p in model.named_parameters()}
    assert sums == expected


# ---- policies ------------------------------------------------------------------------------------------------------


def test_rollouts_come_from_what_was_committed(
    server: ReloadServer, adapters: list[Sent], versions: Versions, served: Policy
) -> None:
    first, infos = server.rollouts(served)
    status, before = server.status(), names()
    by = {"server_boot": status["boot"], "server_epoch": 0}
    assert infos == [{**{f"policy_{name}": value for name, value in served.as_dict().items()}, **by}] * 2

    other = versions.next(adapters[1])
    assert server.stage_body(other, adapters[1]).status_code == 200
    assert server.rollouts(served)[0] == first, "what is staged is served already"
    assert server.commit(other).status_code == 200
    assert server.status()["policy"] == other.as_dict()
    second, infos = server.rollouts(other)
    assert second != first and infos[0]["policy_version"] == other.version

    again = versions.next(adapters[0])
    assert server.stage(again, adapters[0]).status_code == 200 and server.commit(again).status_code == 200
    assert server.rollouts(again)[0] == first
    assert server.commit(again).status_code == 200, "a commit that is repeated"
    assert server.stage(again, adapters[0]).status_code == 200, "a stage that is repeated"

    for seed, expected in ((1, second), (0, first)):  # as a repair does it, and back to the usual way
        repaired = versions.next(adapters[seed])
        assert server.stage(repaired, adapters[seed]).status_code == 200
        answer = server.commit(repaired, by_reference=seed == 1)
        assert answer.status_code == 200, answer.text
        assert server.rollouts(repaired)[0] == expected
    assert server.log.count("goes straight into vLLM's LoRA slots") == 1
    assert names() <= before, "no transport leaves a name"


def test_another_layout(server: ReloadServer, versions: Versions, served: Policy) -> None:
    """Of another rank, and back: what is served stays until it is switched."""
    first = server.rollouts(served)[0]
    small = sent_of(made_adapter(server.model, 3, rank=4))
    policy = versions.next(small)
    assert server.stage(policy, small).status_code == 200
    assert server.rollouts(served)[0] == first
    assert server.commit(policy).status_code == 200
    assert server.rollouts(policy)[0] != first


@pytest.mark.skipif(IS_ASYNC, reason="the fault is made in the synchronous engine")
def test_what_vllm_drops_is_loaded_again(server: ReloadServer, adapters: list[Sent], served: Policy) -> None:
    """As an idle data-parallel rank does; vLLM asks for it with the next request."""
    before = server.rollouts(served)[0]
    (server.folder / "order.json").write_text(json.dumps([1, "removed"]))
    assert server.rollouts(served)[0] == before


def test_rollouts_of_another_policy_are_refused(server: ReloadServer, served: Policy) -> None:
    wrong = served.model_copy(update={"version": served.version + 1})
    refused(server.infer(wrong), 409, "PolicyMismatchError", f"version {wrong.version} ", f"version {served.version} ")
    refused(
        server.call("POST", "/infer/", headers={"X-Swift-Lora-Fix-Policy": "nonsense"}),
        400,
        "ProtocolError",
        "Invalid JSON",
    )


def test_plain_rollouts(server: ReloadServer, adapters: list[Sent], versions: Versions, served: Policy) -> None:
    with_adapter = server.rollouts(served)[0]
    assert server.order("serve", plain=True).status_code == 200 and server.status()["plain"] is True
    plain, infos = server.rollouts()
    assert all(info["policy_plain"] and "policy_digest" not in info for info in infos) and plain != with_adapter
    refused(server.infer(served), 409, "PolicyMismatchError", "the plain base")
    assert server.order("serve", plain=False).status_code == 200
    assert server.rollouts(served)[0] == with_adapter

    assert server.order("serve", plain=True).status_code == 200  # a trainer that ended within its gate
    policy = versions.next(adapters[0])
    assert server.stage(policy, adapters[0]).status_code == 200 and server.commit(policy).status_code == 200
    assert server.rollouts(policy)[0] == with_adapter and server.status()["plain"] is False


def test_another_run_begins_with_its_first_version(server: ReloadServer, adapters: list[Sent], served: Policy) -> None:
    """Of the same process; one of another is refused while this one lives (test_routes_access.py)."""
    policy = Policy(version=0, step=0, digest=adapters[1].digest, run="abc")
    refused(server.announce(policy, adapters[1]), 409, "StagingError", "is not run abc's but run 5eed")
    assert server.lease("abc").status_code == 200 and server.status()["policy"] is None
    assert server.stage(policy, adapters[1]).status_code == 200 and server.commit(policy).status_code == 200
    assert server.rollouts(policy)[1][0]["policy_run"] == "abc"
    refused(server.order("commit", policy=served.as_dict()), 409, "StagingError", "is not run 5eed's but run abc")


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture
def unchanged(server: ReloadServer, served: Policy) -> Iterator[Policy]:
    before = server.rollouts(served)[0]
    yield served
    assert server.status()["policy"] == served.as_dict()
    assert server.rollouts(served)[0] == before


def nan(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q_PROJ}.lora_A.weight"][0, 0] = float("nan")


def tall(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["r"] = config["lora_alpha"] = 32
    for name, tensor in tensors.items():
        tensors[name] = torch.cat([tensor] * 4, dim=0 if "lora_A" in name else 1)


def lying(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["r"] = config["lora_alpha"] = 4


def renamed(module: str) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for side in "AB":
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = tensors.pop(f"{Q_PROJ}.lora_{side}.weight")

    return change


def half(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{Q_PROJ}.lora_B.weight"]


def wide(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    name = f"{Q_PROJ}.lora_A.weight"
    tensors[name] = torch.cat([tensors[name]] * 2, dim=1)


def dora(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["use_dora"] = True


@pytest.mark.parametrize(
    "name, change, kind, phrase",
    [
        (
            "nan",
            nan,
            "NonFiniteAdapterError",
            f"1 of the adapter's tensors are not finite in torch.bfloat16, the first '{Q_PROJ}.lora_A.weight'",
        ),
        ("tall", tall, "StagingError", "has rank 32, this server has room for 16"),
        ("lying", lying, "StagingError", "has rank 8"),
        (
            "module",
            renamed("model.layers.0.self_attn.nope"),
            "StagingError",
            "no module 'model.layers.0.self_attn.nope'",
        ),
        ("layer", renamed("model.layers.9.self_attn.q_proj"), "StagingError", "no module 'model.layers.9"),
        ("half", half, "StagingError", "has only lora_A"),
        ("wide", wide, "StagingError", "is (128, 128) in the server's model"),
        ("dora", dora, "UnsupportedAdapterError", "DoRA"),
    ],
)
def test_what_is_no_adapter_of_this_model(
    server: ReloadServer, versions: Versions, unchanged: Policy, name: str, change: Any, kind: str, phrase: str
) -> None:
    sent = altered(server, change)
    policy = versions.next(sent)
    for send in (server.stage, server.stage_body):
        refused(send(policy, sent), 422, kind, phrase)
    refused(server.commit(policy), 409, "StagingError", "nothing is staged")


def test_what_is_not_what_was_sent(
    server: ReloadServer, adapters: list[Sent], versions: Versions, unchanged: Policy
) -> None:
    policy, body = versions.next(adapters[1]), bytearray(adapters[1].body)
    refused(server.stage_body(policy, adapters[1], bytes(body[:-100])), 422, "StagingError", "bytes where")
    body[1000] ^= 1
    refused(server.stage_body(policy, adapters[1], bytes(body)), 422, "StagingError", "What arrived has digest")
    refused(server.stage(policy, adapters[0]), 422, "StagingError", "What arrived has digest", policy.digest)
    refused(server.commit(policy), 409, "StagingError", "nothing is staged")


def test_the_key(server: ReloadServer, adapters: list[Sent], versions: Versions, unchanged: Policy) -> None:
    policy = versions.next(adapters[1])
    for key in (None, "", "wrong"):
        refused(server.stage(policy, adapters[1], key=key), 401, "AccessError", "--api_key")
        refused(server.order("commit", key, policy=policy.as_dict()), 401, "AccessError", "SWIFT_LORA_FIX_API_KEY")
        refused(server.call("GET", f"{PREFIX}/status/", key), 401, "AccessError")


def test_old_versions_and_what_is_not_staged(
    server: ReloadServer, adapters: list[Sent], versions: Versions, unchanged: Policy
) -> None:
    older = unchanged.model_copy(update={"version": unchanged.version - 1})
    refused(server.announce(older, adapters[0]), 409, "StagingError", "is not newer")
    changed = unchanged.model_copy(update={"digest": adapters[1].digest})
    refused(server.announce(changed, adapters[1]), 409, "StagingError", "is not newer")
    staged = versions.next(adapters[1])
    assert server.stage(staged, adapters[1]).status_code == 200
    refused(server.commit(versions.next(adapters[1])), 409, "StagingError", f"staged is version {staged.version}")


def test_another_process_or_base(server: ReloadServer, adapters: list[Sent], unchanged: Policy) -> None:
    for to in ({"boot": "0" * 16}, {"epoch": 1}):
        refused(server.order("commit", to=to, policy=unchanged.as_dict()), 412, "StagingError", "it restarted, or its")


def test_what_the_protocol_does_not_know(server: ReloadServer, unchanged: Policy) -> None:
    refused(server.order("stage", policy={}), 400, "ProtocolError", "nccl is", "policy.version is")
    wrong = {**unchanged.as_dict(), "version": "1"}
    refused(server.order("commit", policy=wrong), 400, "ProtocolError", "version is '1'")
    refused(server.order("serve", plain="yes"), 400, "ProtocolError", "plain is 'yes'")
    for data in (b"\xff", b"[" * 50_000):
        refused(server.call("POST", f"{PREFIX}/commit/", data=data), 400, "ProtocolError", "")


def test_nccl_is_refused(server: ReloadServer, unchanged: Policy) -> None:
    body = {"name": "lm_head.weight", "dtype": "torch.bfloat16", "shape": [512, 128]}
    response = server.call("POST", "/update_named_param/", json=body)
    refused(response, 409, "ProtocolError", "SWIFT_LORA_FIX_TRANSPORT=reload")


def test_what_vllm_refuses_ends_what_is_served(
    server: ReloadServer, adapters: list[Sent], versions: Versions, served: Policy
) -> None:
    """The model's files do not tell that there are no experts, so this is found out by vLLM's loader, at the commit."""
    module = "model.layers.0.mlp.experts.0.q_proj"
    sent = altered(server, renamed(module))
    policy = versions.next(sent)
    assert server.stage(policy, sent).status_code == 200
    answer = server.commit(policy)
    assert answer.status_code == 500 and "serves nothing until another policy" in answer.json()["message"]
    assert module in answer.json()["message"]
    refused(server.infer(served), 503, "EngineStateError", "No policy was committed")
    again = versions.next(adapters[0])
    assert server.stage(again, adapters[0]).status_code == server.commit(again).status_code == 200
    assert server.rollouts(again)[1][0]["policy_digest"] == adapters[0].digest
