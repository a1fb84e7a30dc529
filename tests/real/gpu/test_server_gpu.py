"""Server mode on two GPUs, the trainer on the first and ``swift rollout`` on the second: real NCCL, and without.

    SLF_GPU_MODEL=FOLDER python3 -m pytest tests/real/gpu/test_server_gpu.py -q -s -o filterwarnings=default

As in test_gpu.py. Tensor parallel 2 takes both GPUs for the server, and the trainer shares the first: NCCL cannot join
two processes of one GPU, so that is ``reload``'s alone. With a single GPU, trainer and server share it, and only what
needs no NCCL runs.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.driver import Run
from tests.support.rollout_server import RolloutServer
from tests.support.server_runs import assert_serves_the_trainer, killing, trainer

torch = pytest.importorskip("torch")
GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="needs a GPU")]
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")

FLOOR = 0.1  # random weights
GRAPHS = {"vllm_enforce_eager": "false"}
LORA: dict[str, Any] = {"lora_rank": 16, "lora_alpha": 32, "learning_rate": 5e-3, "save_steps": 100}


@pytest.fixture
def model() -> Path:
    return Path(os.environ["SLF_GPU_MODEL"])


@pytest.fixture
def started(model: Path, tmp_path: Path) -> Iterator[Any]:
    made: list[RolloutServer] = []

    def start(environment: dict[str, str], devices: str = str(min(1, GPUS - 1)), **arguments: Any) -> RolloutServer:
        settings = {"vllm_gpu_memory_utilization": 0.4, "vllm_max_num_seqs": 8, **arguments}
        visible = {"CUDA_VISIBLE_DEVICES": devices}
        server = RolloutServer(model, tmp_path / "server", settings, {**environment, **visible}, gpu=True)
        made.append(server)
        return server.start().wait()

    yield start
    for server in made:
        server.stop()


def follows(run: Run, server: RolloutServer) -> None:
    keep = os.environ.get("SLF_KEEP")
    if keep:
        name = os.environ["PYTEST_CURRENT_TEST"].split("::")[1].split(" ")[0].replace("[", "-").replace("]", "")
        (Path(keep) / f"{name}.log").write_text(run.log[-60_000:] + "\n== server\n" + server.log[-60_000:])
    assert_serves_the_trainer(run, FLOOR)
    means = [f"{probe['mean']:.4f} (LoRA {probe['lora_effect']:.2f})" for probe in run.probes()]
    seconds = [1e3 * line["lora_sync/seconds"] for line in run.metrics()]
    print(f"\n{run.name}: {', '.join(means)}; sync {statistics.median(seconds[1:]):.1f} ms, the first {seconds[0]:.1f}")
    assert run.log.count("engine and trainer agree at step") == len(run.probes())
    assert "goes straight into vLLM's LoRA slots" in server.log
    assert "/swift_lora_fix/receive/" in server.log and "gets adapters without NCCL" not in run.log


@pytest.mark.parametrize("engine", ["false", "true"], ids=["sync", "async"])
@pytest.mark.parametrize("transport", [pytest.param("nccl", marks=two_gpus), "reload"])
def test_rollouts_follow_the_trainer(model: Path, tmp_path: Path, started: Any, transport: str, engine: str) -> None:
    """By NCCL with the engine of ``swift rollout``'s default once more after it was killed."""
    settings = {"SWIFT_LORA_FIX_TRANSPORT": "" if transport == "nccl" else transport}
    server = started(settings, vllm_use_async_engine=engine, **(GRAPHS if engine == "true" else {}))
    run = trainer(transport, model, tmp_path, [server], {**settings, "CUDA_VISIBLE_DEVICES": "0"}, **LORA)
    if transport == "nccl" and engine == "false":
        killing(run, server, 2)
        assert f"NCCL to rollout server {server.url} is open again" in run.log, run.log[-3000:]
    else:
        run.start()
    follows(run, server)


@two_gpus
def test_tensor_parallel(model: Path, tmp_path: Path, started: Any) -> None:
    settings = {"SWIFT_LORA_FIX_TRANSPORT": "reload"}
    server = started(settings, "0,1", vllm_tensor_parallel_size=2)
    run = trainer("tensor-parallel", model, tmp_path, [server], {**settings, "CUDA_VISIBLE_DEVICES": "0"}, **LORA)
    follows(run.start(), server)
