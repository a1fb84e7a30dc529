"""Starts a real ``vllm serve`` on the CPU, as TRL 1.11 and later talk to it.

python -m tests.support.vllm_serve MODEL PORT [ARGUMENT ...]
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import driver
from tests.support.rollout_server import quiet_port, wait_for

LORA = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2")


@dataclass
class VllmServer:
    """``start`` it, ``wait`` until it answers, ``stop`` it with all its processes."""

    model: Path
    folder: Path
    arguments: tuple[str, ...] = LORA
    environment: dict[str, str] = field(default_factory=lambda: {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"})
    port: int = field(default_factory=quiet_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "server.txt").read_text(errors="replace")

    def start(self) -> VllmServer:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-u", "-m", "tests.support.vllm_serve", str(self.model), str(self.port)]
        fixed = {"PYTHONPATH": str(driver.REPOSITORY), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with open(self.folder / "server.txt", "ab") as log:
            environment = {**fixed, "VLLM_SERVER_DEV_MODE": "1", **self.environment}
            self.process = driver.launch([*command, *self.arguments], environment, driver.REPOSITORY, log)
        return self

    def wait(self) -> VllmServer:
        """Raises hangs.Hang where it does not answer."""
        assert self.process is not None
        wait_for(self.process, self.folder / "server.txt", f"{self.url}/health")
        return self

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def running(server: VllmServer) -> Iterator[VllmServer]:
    try:
        yield server.start().wait()
    finally:
        server.stop()


def main(model: str, port: str, *arguments: str) -> None:
    fixed = ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "256", "--host", "127.0.0.1"]
    fixed += ["--logprobs-mode", "processed_logprobs", "--gpu-memory-utilization", "0.1"]
    sys.argv = ["vllm", "--model", model, "--port", port, *fixed, *arguments]
    # what `vllm serve` runs; the command itself looks for a distribution called vllm, and here it is vllm-cpu
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
