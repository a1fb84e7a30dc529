"""Processes that begin with torch, transformers and vLLM imported: forked from one that imported them, once a session.

Each is a process of its own, as ``python -c`` or ``python -m`` would be, without the 8 s that those imports take. What
is under test is not among them: neither this package nor ms-swift nor PEFT. Where an import itself is the point, or
what it costs, a test starts a fresh Python.

Run as a module it is the one they are forked from. It reads requests and writes replies, a line of JSON each.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.support import hangs

PRELOADED = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.async_llm",
    "vllm.v1.worker.lora_model_runner_mixin",
    "vllm.entrypoints.llm",
)
UNDER_TEST = ("swift_lora_fix", "swift", "peft")
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Forked:
    """A started one. What it prints goes to the files."""

    pid: int
    folder: Path

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def wait(self) -> int:
        """Its exit status, negative for a signal, as ``subprocess`` has it. Raises hangs.Hang where it does not end."""
        return int(_server.ask({"wait": self.pid}, self.pid)["status"])


def start(code: str = "", *, module: str = "", arguments: Sequence[str] = (), environment: Mapping[str, str]) -> Forked:
    """Run code, or a module with arguments; environment is all of it."""
    folder = Path(tempfile.mkdtemp(prefix="forked-", dir=_server.folder()))
    for name in ("stdout", "stderr"):  # there from the start, however late it comes to write to them
        (folder / name).touch()
    request = {"code": code, "module": module, "arguments": [*arguments], "environment": dict(environment)}
    return Forked(int(_server.ask({**request, "folder": str(folder)})["pid"]), folder)


def run(
    code: str = "",
    *,
    module: str = "",
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    forked = start(code, module=module, arguments=arguments, environment=environment)
    status = forked.wait()
    return subprocess.CompletedProcess([module or code, *arguments], status, forked.stdout, forked.stderr)


def tiny_model(folder: Path, architecture: str = "qwen2", dtype: str = "bfloat16") -> Path:
    """Make a tiny model (tests/support/tiny.py); returns its folder."""
    target = folder / architecture
    done = run(module="tests.support.tiny", arguments=[architecture, str(target), "--dtype", dtype])
    assert done.returncode == 0, done.stderr
    return target


class Server:
    """The process that they are forked from, started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def folder(self) -> str:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="slf-forks-")
        return self._folder.name

    def ask(self, request: dict[str, Any], pid: int | None = None) -> dict[str, Any]:
        """pid: of the process that the answer waits for, if it is another one than this server."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.forks"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=REPOSITORY,
                env={"OMP_NUM_THREADS": "1", **os.environ, "VLLM_PLUGINS": "none", "HF_HUB_OFFLINE": "1"},
            )
            atexit.register(self._process.kill)
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        progress, hang = hangs.Progress(pid or process.pid, Path(self.folder())), None
        while not select.select([process.stdout], [], [], progress.pause)[0]:
            try:
                progress.check()
            except hangs.Hang as error:
                hang = error
                hangs.kill(progress.pid)  # and then there is an answer
        line = process.stdout.readline()
        if hang is not None:
            raise hangs.Hang(f"{hang}: {request}")
        assert line, f"no answer to {request}"
        reply: dict[str, Any] = json.loads(line)
        return reply


_server = Server()


def serve() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the imports print
    before = dict(os.environ)
    for name in PRELOADED:
        import_module(name)
    assert not any(name in sys.modules for name in UNDER_TEST)
    made = {name: value for name, value in os.environ.items() if before.get(name) != value}  # by vLLM's import
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            reply = {"status": os.waitstatus_to_exitcode(status)}
        else:
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if not pid:
                _become(request, made)
            reply = {"pid": pid}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _become(request: dict[str, Any], made: dict[str, str]) -> None:
    """In the child: what was asked for, as the main program of this process; never returns."""
    folder = request["folder"]
    for number, file in enumerate((os.devnull, f"{folder}/stdout", f"{folder}/stderr")):
        os.dup2(os.open(file, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update({**made, **request["environment"]})
    sys.argv = [request["module"] or "-c", *request["arguments"]]
    status: Any = 0
    try:
        if request["module"]:
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        else:
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(request["code"], "<string>", "exec"), vars(main))
    except SystemExit as error:
        status = error.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
