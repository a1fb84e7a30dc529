"""One real ``swift rollout`` on the CPU; what it refuses must leave what it serves as it was.

With SLF_SERVER_ASYNC=1 in the environment its engine is the asynchronous one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import safetensors.torch
import torch

from swift_lora_fix.server.wire import CONFIG, PREFIX, WEIGHTS, Policy
from tests.support.driver import make_model, this_python
from tests.support.reload_client import ReloadServer, digest_of, make_adapter

pytestmark = pytest.mark.e2e

RUN = "5eed"
LIMIT_MIB = 2
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReloadServer]:
    folder = tmp_path_factory.mktemp("server")
    model = make_model(this_python(), folder, "qwen2")
    arguments = {"vllm_use_async_engine": "true"} if os.environ.get("SLF_SERVER_ASYNC") else {}
    with ReloadServer(model, folder, arguments, environment={"SWIFT_LORA_FIX_MAX_MIB": str(LIMIT_MIB)}) as running:
        yield running


@pytest.fixture(scope="module")
def adapters(server: ReloadServer) -> list[Path]:
    return [make_adapter(server.model, server.root / f"adapter-{seed}", seed) for seed in (1, 2)]


class Versions:
    """The policies of one run, each newer than the last."""

    def __init__(self) -> None:
        self.version = 0

    def next(self) -> Policy:
        self.version += 1
        return Policy(self.version, 10 * self.version, f"digest-{self.version}", RUN)


@pytest.fixture(scope="module")
def versions() -> Versions:
    return Versions()


@pytest.fixture
def served(server: ReloadServer, adapters: list[Path], versions: Versions) -> Policy:
    """The first adapter, committed."""
    policy = versions.next()
    assert server.stage(policy, adapters[0]).status_code == 200
    assert server.commit(policy).status_code == 200
    return policy


def refused(response: requests.Response, status: int, kind: str, *phrases: str) -> None:
    body = response.json()
    assert (response.status_code, body["error"]) == (status, kind), body
    for phrase in phrases:
        assert phrase in body["message"], body["message"]


def altered(source: Path, name: str, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    """A sibling of ``source`` with another config or other tensors."""
    folder = source.parent / name
    shutil.copytree(source, folder)
    config = json.loads((folder / CONFIG).read_text())
    tensors = safetensors.torch.load_file(str(folder / WEIGHTS))
    change(config, tensors)
    (folder / CONFIG).write_text(json.dumps(config, sort_keys=True))
    safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, str(folder / WEIGHTS))
    return folder


# ---- before the first policy (in the order of this file) ------------------------------------------------------------


def test_it_says_what_it_is(server: ReloadServer) -> None:
    status = server.status()
    expected = {"protocol": 2, "enable_lora": True, "max_lora_rank": 16, "policy": None, "plain": False, "workers": 1}
    assert {name: status[name] for name in expected} == expected
    assert status["root"] == str(server.root) and status["lora_dtype"] == "bfloat16" and len(status["boot"]) == 16


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
    server: ReloadServer, adapters: list[Path], versions: Versions, served: Policy
) -> None:
    first, infos = server.rollouts(served)
    assert infos == [{f"policy_{name}": value for name, value in served.as_dict().items()}] * 2

    other = versions.next()
    assert server.stage_bytes(other, adapters[1]).status_code == 200
    assert server.rollouts(served)[0] == first, "what is staged is served already"
    assert server.commit(other).status_code == 200
    assert server.status()["policy"] == other.as_dict()
    second, infos = server.rollouts(other)
    assert second != first and infos[0]["policy_version"] == other.version

    again = versions.next()
    assert server.stage(again, adapters[0]).status_code == 200 and server.commit(again).status_code == 200
    assert server.rollouts(again)[0] == first
    assert server.commit(again).status_code == 200, "a commit that is repeated"
    assert server.stage(again, adapters[0]).status_code == 200, "a stage that is repeated"

    for seed, expected in ((1, second), (0, first)):  # as a repair does it, and back to the usual way
        repaired = versions.next()
        assert server.stage(repaired, adapters[seed]).status_code == 200
        answer = server.post("commit", policy=repaired.as_dict(), by_reference=seed == 1)
        assert answer.status_code == 200, answer.text
        assert server.rollouts(repaired)[0] == expected


def folded(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """The same adapter with its scaling in B."""
    scale, config["lora_alpha"] = config["lora_alpha"] / config["r"], config["r"]
    assert scale == 1.5
    for name in tensors:
        tensors[name] *= scale if "lora_B" in name else 1.0


def test_it_is_scaled_as_its_config_says(
    server: ReloadServer, adapters: list[Path], versions: Versions, served: Policy
) -> None:
    """The other one goes by vLLM's own loader: its config is another, and what is served is not given up for it."""
    with_adapter, twin = server.rollouts(served)[0], versions.next()
    reads = server.log.count("goes straight into vLLM's LoRA slots")
    assert reads == 1
    assert server.stage(twin, altered(adapters[0], "folded", folded)).status_code == 200
    assert server.commit(twin).status_code == 200
    assert server.rollouts(twin)[0] == with_adapter
    assert server.log.count("goes straight into vLLM's LoRA slots") == reads


def test_rollouts_of_another_policy_are_refused(server: ReloadServer, served: Policy) -> None:
    wrong = Policy(served.version + 1, served.step, served.digest, RUN)
    refused(server.infer(wrong), 409, "PolicyMismatchError", f"version {wrong.version} ", f"version {served.version} ")
    refused(
        server.call("POST", "/infer/", headers={"X-Swift-Lora-Fix-Policy": "nonsense"}),
        400,
        "ProtocolError",
        "not JSON",
    )


def test_plain_rollouts(server: ReloadServer, adapters: list[Path], versions: Versions, served: Policy) -> None:
    with_adapter = server.rollouts(served)[0]
    assert server.post("serve", plain=True).status_code == 200 and server.status()["plain"] is True
    plain, infos = server.rollouts()
    assert infos == [{"policy_plain": True}] * 2 and plain != with_adapter
    refused(server.infer(served), 409, "PolicyMismatchError", "the plain base")
    assert server.post("serve", plain=False).status_code == 200
    assert server.rollouts(served)[0] == with_adapter

    assert server.post("serve", plain=True).status_code == 200  # a trainer that ended within its gate
    policy = versions.next()
    assert server.stage(policy, adapters[0]).status_code == 200 and server.commit(policy).status_code == 200
    assert server.rollouts(policy)[0] == with_adapter and server.status()["plain"] is False


def test_another_run_begins_with_its_first_version(server: ReloadServer, adapters: list[Path], served: Policy) -> None:
    policy = Policy(0, 0, "first", "abc")
    assert server.stage(policy, adapters[1]).status_code == 200 and server.commit(policy).status_code == 200
    assert server.rollouts(policy)[1][0]["policy_run"] == "abc"


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
    config["r"] *= 4
    for name, tensor in tensors.items():
        tensors[name] = torch.cat([tensor] * 4, dim=0 if "lora_A" in name else 1)


def lying(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["r"] *= 2


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
        ("nan", nan, "NonFiniteAdapterError", f"not finite in torch.bfloat16: {Q_PROJ}.lora_A.weight (1 tensors)"),
        ("tall", tall, "StagingError", "has rank 32, this server has room for 16"),
        ("lying", lying, "StagingError", "has rank 8, adapter_config.json says ['16']"),
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
    server: ReloadServer,
    adapters: list[Path],
    versions: Versions,
    unchanged: Policy,
    name: str,
    change: Any,
    kind: str,
    phrase: str,
) -> None:
    policy = versions.next()
    for send in (server.stage, server.stage_bytes):
        folder = altered(adapters[1], f"{name}-{send.__name__}", change)
        refused(send(policy, folder), 422, kind, phrase)
    refused(server.commit(policy), 409, "StagingError", "nothing is staged")


def test_what_is_not_what_was_sent(
    server: ReloadServer, adapters: list[Path], versions: Versions, unchanged: Policy
) -> None:
    policy = versions.next()
    folder = server.root / "truncated"
    shutil.copytree(adapters[1], folder)
    whole = digest_of(folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    for send in (server.stage, server.stage_bytes):
        refused(send(policy, folder, whole), 422, "StagingError", "digest", "truncated or changed")
        refused(send(policy, folder), 422, "StagingError", "no safetensors file, or half of one")
    (folder / WEIGHTS).write_bytes(b"\x80\x04}.")  # a pickle
    refused(server.stage(policy, folder), 422, "StagingError", "no safetensors file")


def test_paths_are_confined(
    server: ReloadServer, adapters: list[Path], versions: Versions, unchanged: Policy, tmp_path: Path
) -> None:
    policy, inside = versions.next(), adapters[1]
    outside = tmp_path / "adapter"
    shutil.copytree(inside, outside)
    (server.root / "link").symlink_to(outside)
    linked = server.root / "linked-file"
    shutil.copytree(inside, linked)
    (linked / WEIGHTS).unlink()
    (linked / WEIGHTS).symlink_to(outside / WEIGHTS)
    digest = digest_of(inside)
    for path in (outside, server.root / ".." / "adapter", server.root / "adapter-1" / "..", server.root, "adapter-1"):
        refused(server.stage(policy, Path(path), digest), 403, "AccessError", "not right below this server's root")
    refused(server.stage(policy, server.root / "link", digest), 403, "AccessError", "a link")
    refused(server.stage(policy, linked, digest), 403, "AccessError", "a link")
    refused(server.stage(policy, server.root / "absent", digest), 404, "StagingError", "No such file")


def test_too_large(server: ReloadServer, adapters: list[Path], versions: Versions, unchanged: Policy) -> None:
    folder = server.root / "large"
    shutil.copytree(adapters[1], folder)
    (folder / WEIGHTS).write_bytes(b"\0" * ((LIMIT_MIB << 20) + 1))
    for send in (server.stage, server.stage_bytes):
        refused(send(versions.next(), folder), 413, "StagingError", "SWIFT_LORA_FIX_MAX_MIB")


def test_the_key(server: ReloadServer, adapters: list[Path], versions: Versions, unchanged: Policy) -> None:
    policy = versions.next()
    for key in (None, "", "wrong"):
        refused(server.stage(policy, adapters[1], key=key), 401, "AccessError", "--api_key")
        refused(server.post("commit", key, policy=policy.as_dict()), 401, "AccessError", "SWIFT_LORA_FIX_API_KEY")
        refused(server.call("GET", f"{PREFIX}/status/", key), 401, "AccessError")


def test_old_versions_and_what_is_not_staged(
    server: ReloadServer, adapters: list[Path], versions: Versions, unchanged: Policy
) -> None:
    older = Policy(unchanged.version - 1, 0, "older", RUN)
    refused(server.stage(older, adapters[1]), 409, "StagingError", "is not newer")
    changed = Policy(unchanged.version, 0, "same version, other policy".replace(" ", "-"), RUN)
    refused(server.stage(changed, adapters[1]), 409, "StagingError", "is not newer")
    staged = versions.next()
    assert server.stage(staged, adapters[1]).status_code == 200
    refused(server.commit(versions.next()), 409, "StagingError", f"staged is version {staged.version}")
    assert server.post("abort", policy=staged.as_dict()).status_code == 200
    refused(server.commit(staged), 409, "StagingError", "nothing is staged")


def test_what_the_protocol_does_not_know(server: ReloadServer, unchanged: Policy) -> None:
    refused(server.post("stage", policy={}), 400, "ProtocolError", "has no digest, folder")
    refused(
        server.post("commit", policy={**unchanged.as_dict(), "version": "1"}), 400, "ProtocolError", "version is '1'"
    )
    refused(server.post("serve", plain="yes"), 400, "ProtocolError", "plain is 'yes'")
    refused(server.call("POST", f"{PREFIX}/commit/", data=b"\xff"), 400, "ProtocolError", "not JSON")


def test_nccl_is_refused(server: ReloadServer, unchanged: Policy) -> None:
    body = {"name": "lm_head.weight", "dtype": "torch.bfloat16", "shape": [512, 128]}
    response = server.call("POST", "/update_named_param/", json=body)
    refused(response, 409, "ProtocolError", "SWIFT_LORA_FIX_TRANSPORT=reload")


def test_what_vllm_refuses_is_taken_back(
    server: ReloadServer, adapters: list[Path], versions: Versions, unchanged: Policy
) -> None:
    """The model's files do not tell that there are no experts, so this is found out by vLLM's loader, at the commit."""
    policy, module = versions.next(), "model.layers.0.mlp.experts.0.q_proj"
    assert server.stage(policy, altered(adapters[1], "experts", renamed(module))).status_code == 200
    serves = f"Every worker serves version {unchanged.version} "
    refused(server.commit(policy), 500, "UnsupportedAdapterError", "vLLM refused adapter", module, serves)
