"""Starts TRL scripts (trl_run.py), and reads what came of them."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import driver, hangs

CHECKPOINT_STEP = 2  # trl_run.py saves every second step, unless it is told otherwise


@dataclass
class Run:
    """One TRL script (tests/support/trl_run.py). options: its keys. environment: on top of the process's."""

    folder: Path
    options: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    ranks: int = 1
    returncode: int | None = None

    def start(self) -> Run:
        """Run it to its end; the exit status is in ``returncode``, never raised."""
        self.folder.mkdir(parents=True, exist_ok=True)
        ranks = ["-m", "torch.distributed.run", "--nproc_per_node", str(self.ranks)] if self.ranks > 1 else []
        script = ["-m", "tests.support.trl_run", str(self.folder), json.dumps(self.options)]
        command = [sys.executable, "-u", *ranks, *script]
        paths = [str(driver.REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        fixed = {"PYTHONPATH": os.pathsep.join(paths), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "CI": "1"}
        fixed |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(driver.free_port())}  # runs are made side by side
        with open(self.folder / "log.txt", "w") as log:
            process = driver.launch(command, {**fixed, **self.environment}, driver.REPOSITORY, log)
            try:
                self.returncode = hangs.wait(process, self.folder)
            finally:
                process.kill()
                process.wait()
        return self

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")

    def probes(self, rank: int = 0) -> list[dict[str, Any]]:
        """One record a rollout of this rank, measured from outside."""
        file = self.folder / f"probe.jsonl{f'.rank{rank}' if rank else ''}"
        return [json.loads(line) for line in file.read_text().splitlines()]

    def metrics(self) -> list[dict[str, Any]]:
        """What TRL logged, one record a rollout. (After a resume its history has the steps before, too.)"""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if "loss" in line][-len(self.probes()) :]

    def checkpoint(self, step: int = CHECKPOINT_STEP) -> Path:
        return self.folder / "run" / f"checkpoint-{step}"
