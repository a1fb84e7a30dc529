"""The faults that a run with plugins/slf_faults.py has to catch, and what came of it, for the CPU and GPU suites."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.driver import Run

FAULTS = {  # of plugins/slf_faults.py, one a step from step 1 on, and the cause that is to be named
    "double_count_in_place": "double-count",
    "double_count_in_the_base": "double-count",
    "removed": "not-loaded",
    "zeroed": "not-applied",
    "stale": "stale",
    "one_module_doubled": "module-doubled",
    "one_layer_from_another": "misplaced",
    "not_a_number": "not-finite",
    "base_by_one_ulp": "base-changed",
    "another_model": "base-replaced",
    "trainer_base_by_one_ulp": "trainer-base-changed",
    "cache_not_reset": "",  # shows in the next step
    "none": "stale-cache",
    "scaling_changed": "scaling",
}
# Clean syncs after the faults: so many, unless SECONDS are over before; but at least MINIMUM. "inf" is for all of them.
CLEAN_SYNCS = int(os.environ.get("SLF_CLEAN_SYNCS", "200"))
CLEAN_SECONDS = float(os.environ.get("SLF_CLEAN_SECONDS", "240"))
CLEAN_MINIMUM = min(30, CLEAN_SYNCS)
MESSAGE = re.compile(r"does not serve the trainer's policy of step (\d+): .*? \[([a-z-]+)\]\. Found by the (.*)")


def environment(folder: Path) -> dict[str, str]:
    return {
        "SLF_FAULTS": ",".join(FAULTS),
        "SLF_FAULTS_FILE": str(folder / "faults.jsonl"),
        "SLF_CLEAN_SYNCS": str(CLEAN_SYNCS),
        "SLF_CLEAN_SECONDS": str(CLEAN_SECONDS),
        "SLF_CLEAN_MINIMUM": str(CLEAN_MINIMUM),
        "SWIFT_LORA_FIX_ON_MISMATCH": "repair",
        "SWIFT_LORA_FIX_GATE_EVERY": "1",
    }


def records(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "faults.jsonl").read_text().splitlines()]


def messages(run: Run) -> Iterator[tuple[int, str, str]]:
    """Step, cause and evidence of each fault that was found and was to be repaired."""
    for line in run.log.splitlines():
        found = MESSAGE.search(line)
        if found and "Repairing" in line:
            yield int(found[1]), found[2], found[3]


def named(run: Run, fault: str) -> list[str]:
    """The causes that were named in the step of ``fault``."""
    step = list(FAULTS).index(fault) + 1
    return [cause for at, cause, _ in messages(run) if at == step]


def verdicts(run: Run) -> list[list[float]]:
    """Of the clean syncs: mean, max, noise, base control, double control; seconds of audit, base audit, gate, sync; the
    ratio to the noise, and whether other policies could be told."""
    (clean,) = [record for record in records(run) if record["fault"] == "clean"]
    return clean["verdicts"]
