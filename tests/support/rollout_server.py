"""Starts a real ``swift rollout`` or ``swift deploy``, on the CPU unless told otherwise."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import requests

from tests.support import hangs
from tests.support.driver import FIX, PLUGINS, launch, swift_folder, this_python


def wait_for(process: subprocess.Popen[Any], log: Path, url: str) -> None:
    """Until the server answers at ``url``. Raises hangs.Hang where it does not, AssertionError where it has ended."""
    progress = hangs.Progress(process.pid, log)
    while True:
        assert process.poll() is None, _end_of(log)
        with contextlib.suppress(requests.RequestException):
            if requests.get(url, timeout=30).status_code == 200:
                return
        time.sleep(0.5)
        try:
            progress.check()
        except hangs.Hang as hang:
            raise hangs.Hang(f"the server does not answer: {hang}\n{_end_of(log)}") from None


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:]


def quiet_port() -> int:
    """A free one that no outgoing connection is given: ms-swift silently takes another port where one is in use."""
    while True:
        port = random.randrange(20000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class RolloutServer:
    """``start`` it, and ``stop`` it with all its processes; ``start`` again is a restart on the same port.

    ``fixed`` loads the plugin, after ``plugins``.
    """

    model: Path
    folder: Path
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=quiet_port)
    gpu: bool = False
    plugins: tuple[Path, ...] = ()
    fixed: bool = True
    process: subprocess.Popen[bytes] | None = None
    verb: ClassVar[str] = "rollout"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "server.txt").read_text(errors="replace")

    def command(self) -> list[str]:
        script = swift_folder(this_python()) / "cli" / f"{self.verb}.py"
        plugins = [] if self.gpu else [PLUGINS / "slf_cpu_shims.py", PLUGINS / "slf_server_shims.py"]
        plugins += [*self.plugins, *([FIX] if self.fixed else [])]
        command = [str(this_python()), str(script), "--external_plugins", *map(str, plugins)]
        for name, value in {**self._defaults(), **self.arguments}.items():
            command += [f"--{name}", str(value)]
        return command

    def _defaults(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "model_type": "qwen2",
            "template": "chatml",
            "torch_dtype": "bfloat16",
            "host": "127.0.0.1",
            "port": self.port,
            "vllm_enable_lora": "true",
            "vllm_max_lora_rank": 16,
            "vllm_enforce_eager": "true",
            "vllm_max_model_len": 256,
        }

    def start(self) -> RolloutServer:
        """Returns at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        on_cpu = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_DISABLE_PYNCCL": "1"}
        environment = {
            **({} if self.gpu else on_cpu),
            "SWIFT_LORA_FIX_TRANSPORT": "reload",
            **self.environment,
        }
        with open(self.folder / "server.txt", "ab") as log:
            self.process = launch(self.command(), environment, self.folder, log)
        return self

    def wait(self) -> RolloutServer:
        """Until it answers. Raises hangs.Hang where it does not."""
        assert self.process is not None
        wait_for(self.process, self.folder / "server.txt", f"{self.url}/health/")
        return self

    def signal(self, number: int) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()


@dataclass
class TeacherServer(RolloutServer):
    """``swift deploy`` with vLLM, as --teacher_model_server wants it: it tells the logprobs of what it is given."""

    fixed: bool = False
    verb: ClassVar[str] = "deploy"

    def _defaults(self) -> dict[str, Any]:
        defaults = {**super()._defaults(), "infer_backend": "vllm"}
        del defaults["vllm_enable_lora"], defaults["vllm_max_lora_rank"]
        return defaults


@contextlib.contextmanager
def running(servers: list[RolloutServer]) -> Iterator[list[RolloutServer]]:
    """Started side by side; stopped at the end, with all their processes."""
    try:
        for server in servers:
            server.start()
        yield [server.wait() for server in servers]
    finally:
        for server in servers:
            server.stop()
