"""What the README quotes is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from swift_lora_fix.install import releases

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_table_is_the_table_of_facts() -> None:
    assert releases.markdown_table() in README
    assert releases.vllm_markdown_table() in README


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert link.startswith("http") or (ROOT / link).exists(), link


def test_quoted_log_lines_are_the_codes() -> None:
    code = "".join(path.read_text() for path in (ROOT / "swift_lora_fix").rglob("*.py"))
    for quoted in (
        "armed: the engine gets the unmerged base once and the adapter once, the trainer is only read.",
        "the adapter goes straight into vLLM's LoRA slots: ",
        "proved against vLLM's own loader.",
        "the trainer's tensors equal the file's",
        "lora_B is not zero",
    ):
        assert quoted in code and quoted in " ".join(README.split()), quoted


@pytest.mark.parametrize("script", sorted(set(re.findall(r"scripts/\w+", README))))
def test_scripts_exist(script: str) -> None:
    assert (ROOT / script).is_file()
