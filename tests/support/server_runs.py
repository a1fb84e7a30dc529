"""Real ``swift rlhf --vllm_mode server`` runs, and what a run must show whose servers serve its policy."""

from __future__ import annotations

import shlex
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.support import bounds, premises
from tests.support.driver import Run, this_python
from tests.support.rollout_server import RolloutServer, quiet_port


def trainer(
    name: str, model: Path, folder: Path, servers: list[RolloutServer], environment: dict[str, str], **arguments: Any
) -> Run:
    """A run of ms-swift's GRPO with these servers; the gate looks at each rollout."""
    run = Run(name, this_python(), model, folder / name, True, gpu=any(server.gpu for server in servers))
    run.arguments = {
        "vllm_mode": "server",
        "vllm_server_host": ["127.0.0.1"] * len(servers),
        "vllm_server_port": [server.port for server in servers],
        "vllm_server_group_port": [quiet_port() for _ in servers],
        "vllm_server_timeout": 900,
        **arguments,
    }
    for gone in ("vllm_enable_lora", "vllm_enforce_eager", "vllm_max_model_len"):
        run.arguments.setdefault(gone, None)
    run.environment = {
        **environment,
        "SWIFT_LORA_FIX_GATE_EVERY": "1",
        "SWIFT_LORA_FIX_SERVER_DEADLINE": "900",  # a server that is killed takes what it takes to come back
    }
    return run


def restarting(server: RolloutServer, flag: Path) -> threading.Thread:
    """Kills the server when the run makes ``flag``, and starts it again."""

    def watch() -> None:
        while not flag.exists():
            time.sleep(0.05)
        server.stop()
        (flag.parent / "killed").touch()
        server.start()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def killing(run: Run, server: RolloutServer, step: int) -> Run:
    """Run it; before the rollout of this step the server is killed, and started again."""
    run.folder.mkdir(parents=True)
    flag, killed = run.folder / "kill", run.folder / "killed"
    waits = f"while not os.path.exists({str(killed)!r}): time.sleep(0.05)"
    code = f"import os, time\nopen({str(flag)!r}, 'w').close()\n{waits}"
    run.environment["SLF_RUN_AT_STEP"] = f"{step}:{shlex.join([sys.executable, '-c', code])}"
    restarting(server, flag)
    run.start()
    server.wait()
    return run


def assert_serves_the_trainer(run: Run, largest_floor: float = 0.05) -> None:
    assert run.returncode == 0, run.log[-4000:]
    floor = run.metrics()[0]["lora_sync/noise_floor"]
    assert 0 < floor < largest_floor
    premises.large_lora(run.probes()[-1:], floor, 10)
    for probe in run.probes():
        assert probe["mean"] < bounds.MEAN_BOUND * floor, (probe, floor)
        assert probe["base_changed"] == 0.0 and probe["lora_changed_by_sync"] == 0 and probe["merge_calls"] == 0
        assert len(set(probe["policies"])) == 1 and probe["policies"][0], "every rollout says which policy made it"
    digests = [probe["policies"][0] for probe in run.probes()]
    assert len(set(digests)) == len(digests), "each step has a policy of its own"
