"""Trainers, web server, worker and vLLM's engine killed at random moments, on request:

    SLF_SOAK=1 SLF_KILLS=200 SLF_RESTARTS=8 scripts/test tests/real/server/test_kills.py

Each rollout must be, token by token, what the policy that was asked for answers on this server's base, and nothing may
be left behind. (Without vLLM, many more: tests/unit/server/test_kills.py.) Records: README.md.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from swift_lora_fix.server.wire import Policy
from tests.support import kills
from tests.support.driver import make_model, this_python
from tests.support.kill_trainer import SEEDS
from tests.support.reload_client import ReloadServer, made_adapter, sent_of

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not os.environ.get("SLF_SOAK"), reason="on request: SLF_SOAK=1"),
]

KILLS, RESTARTS = int(os.environ.get("SLF_KILLS", "200")), int(os.environ.get("SLF_RESTARTS", "8"))
SEED = int(os.environ.get("SLF_KILL_SEED", "0"))


class Real(ReloadServer):
    def lease(self, run: str, **changes: Any) -> requests.Response:
        """Of a process that is gone: the next trainer takes the server."""
        return super().lease(run, **{"pid": 1 << 21, **changes})

    def processes(self) -> dict[str, psutil.Process]:
        """The web server's, its worker's, and where vLLM has one of its own, the engine's."""
        assert self.process is not None
        found = {"web": psutil.Process(self.process.pid)}
        for process in found["web"].children(recursive=True):
            if "resource_tracker" not in " ".join(process.cmdline()):
                found["worker" if process.ppid() == self.process.pid else "engine"] = process
        return found

    def restart(self) -> None:
        self.stop()
        self.start().wait()


def test_killed_at_random_moments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Real(make_model(this_python(), tmp_path, "qwen2"), tmp_path) as server:
        references = {}
        for version, seed in enumerate(SEEDS):  # what each policy answers, before anything is killed
            sent = sent_of(made_adapter(server.model, seed))
            policy = Policy(version=version, step=0, digest=sent.digest, run="5eed")
            assert server.stage(policy, sent).status_code == server.commit(policy).status_code == 200
            references[sent.digest] = server.rollouts(policy)[0]
        assert len({json.dumps(tokens) for tokens in references.values()}) == len(SEEDS)
        del sent
        file = tmp_path / "references.json"
        file.write_text(json.dumps(references))
        trainers = kills.Forking(
            "tests.support.kill_trainer", tmp_path / "trainers.txt", server.model, server.url, file
        )
        try:
            record = kills.killed(server, trainers, KILLS, RESTARTS, SEED)
        finally:
            trainers.stop()
        processes = [process for top in server.processes().values() for process in kills.tree(top)]
        server.stop()
        _, alive = psutil.wait_procs(processes, timeout=30)
        assert not [process for process in alive if kills.is_there(process)] and kills.is_free(server.port)
    with capsys.disabled():
        print(f"\n{record}")
