"""The example with two rollout servers, run: the script starts all three, and ends the servers with the trainer."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import requests

from tests.real.server.conftest import newest
from tests.support.driver import PLUGINS, REPOSITORY, Example, this_python
from tests.support.rollout_server import quiet_port

pytestmark = pytest.mark.e2e
SMALL = ("--model_type", "qwen2", "--template", "chatml", "--torch_dtype", "bfloat16", "--host", "127.0.0.1")
SMALL += ("--vllm_enforce_eager", "true", "--vllm_max_model_len", "256")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("example")


@newest
def test_the_servers_of_the_example_serve_its_trainer(model: Path, folder: Path) -> None:
    port = quiet_port()
    while port % 2:  # the second server has the next one
        port = quiet_port()
    run = Example("servers", this_python(), model, folder / "servers", True, probe=False, script="grpo_two_servers.sh")
    run.plugins = (PLUGINS / "slf_server_shims.py",)
    run.arguments = {"vllm_mode": "server", "vllm_server_port": [port, port + 1], "max_steps": 3, "save_steps": 100}
    run.arguments.update(vllm_server_group_port=[quiet_port(), quiet_port()], vllm_max_model_len=None)
    run.arguments.update(vllm_enforce_eager=None, vllm_enable_lora=None)
    run.__post_init__()  # its plugins again
    on_cpu = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_DISABLE_PYNCCL": "1", "SWIFT_LORA_FIX_TRANSPORT": "reload"}
    run.environment.update(on_cpu, PORT=str(port), SERVER_ARGUMENTS=shlex.join(SMALL), SWIFT_LORA_FIX_GATE_EVERY="1")
    run.start()
    servers = [(run.folder / f"server-{number}.log").read_text(errors="replace") for number in (0, 1)]
    assert run.returncode == 0, run.log[-3000:] + "".join(log[-2000:] for log in servers)
    assert run.command()[:2] == ["bash", str(REPOSITORY / "examples" / "grpo_two_servers.sh")]
    lines = [line for line in run.metrics() if "lora_sync/agrees" in line]
    assert len(lines) == 3 and all(line["lora_sync/agrees"] == 1 for line in lines)
    assert lines[-1]["lora_sync/distinguishable"] == 1, "the adapter is large enough to be missed"
    assert "armed, server mode" in run.log and "= 2 rollout servers, policy digest" in run.log
    for number, log in enumerate(servers):
        assert log.count("POST /swift_lora_fix/commit/") == 3, "each policy reached each server"
        with pytest.raises(requests.ConnectionError):
            requests.get(f"http://127.0.0.1:{port + number}/health/", timeout=5)
