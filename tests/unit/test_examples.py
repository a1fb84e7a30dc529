"""``examples/``: each script is complete, and gives ms-swift arguments that it has. Five are run: tests/real."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swift_lora_fix.tools.plugin import PLUGIN_FILE
from tests.real.gpu.test_examples_gpu import CASES
from tests.unit.test_docs import flags_of_swift

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.sh"))
RECORDER = """#!{python}
import json, os, sys, time
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "rollout":
    time.sleep(60)
time.sleep(0.5)
"""


def started(script: str, folder: Path, *more: str) -> list[list[str]]:
    """What the script calls ``swift`` with: a stand-in on PATH writes it down."""
    swift = folder / "bin" / "swift"
    swift.parent.mkdir()
    swift.write_text(RECORDER.format(python=sys.executable))
    swift.chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{swift.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RECORD": str(folder / "record"), "MODEL": "a model", "DATASET": "a dataset", "CHECKPOINT": "a checkpoint",
        "EXTRA_PLUGINS": "one.py two.py",
    }  # fmt: skip
    since = time.monotonic()
    done = subprocess.run([EXAMPLES / script, *more], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - since < 30, "servers are ended with the trainer"
    return [json.loads(line) for line in (folder / "record").read_text().splitlines()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_gives_arguments_that_there_are(script: str, tmp_path: Path) -> None:
    calls = started(script, tmp_path, "--max_steps", "3")
    known = flags_of_swift()
    for words in calls:
        flags = [word for word in words if re.match(r"--[a-z]", word)]
        assert set(flags) <= known and len(flags) == len(set(flags)), set(flags) - known
        assert words[words.index("--model") + 1] == "a model"
        assert words[words.index("--external_plugins") + 1] == str(PLUGIN_FILE)
    (trainer,) = [words for words in calls if words[0] == "rlhf"]
    after = trainer.index("--external_plugins")
    assert trainer[after + 2 : after + 4] == ["one.py", "two.py"] and trainer[-2:] == ["--max_steps", "3"]
    servers = [words for words in calls if words[0] == "rollout"]
    assert len(servers) == (2 if "servers" in script else 0)
    if servers:
        ports = {words[words.index("--port") + 1] for words in servers}
        first = trainer.index("--vllm_server_port")
        assert ports == set(trainer[first + 1 : first + 3])


@pytest.mark.parametrize("script, case", [("grpo_fused_offload.sh", "fused_offloaded"), ("grpo_qlora.sh", "qlora")])
def test_a_script_has_the_flags_that_the_gpu_tests_run(script: str, case: str, tmp_path: Path) -> None:
    (words,) = started(script, tmp_path)
    _, flags = CASES[case]
    assert {name: words[words.index(f"--{name}") + 1] for name in flags} == {k: str(v) for k, v in flags.items()}


def test_the_page_names_them_all() -> None:
    page = (EXAMPLES / "README.md").read_text()
    files = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".sh", ".py")]
    assert all(f"[{name}]({name})" in page and f"examples/{name}" in page for name in files) and len(files) >= 5
