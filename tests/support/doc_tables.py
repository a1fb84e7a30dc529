"""The tables of README and docs that are made from the code: ``scripts/tables`` writes them, a test compares them.

A page has ``<!-- table: package.module.function() -->``, the table, ``<!-- end of table -->``. The function takes no
argument and returns Markdown. Those that only the docs need are in this file; run as a module it rewrites the pages.

A Chinese page has its own words. Where its table is not made here, a test compares the first column with the English.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from swift_lora_fix import errors
from swift_lora_fix.common.settings import Settings
from swift_lora_fix.install import releases

ROOT = Path(__file__).resolve().parents[2]
MARKED = re.compile(r"<!-- table: ([\w.]+)\(\) -->\n(.*?)\n<!-- end of table -->", re.DOTALL)
_SETTING = re.compile(r"^(\w+): (.*?)(?=^\w+: |\Z)", re.DOTALL | re.MULTILINE)
_VARIABLE = re.compile(r"``(SWIFT_LORA_FIX\w*)``")


def pages() -> list[Path]:
    return [*ROOT.glob("README*.md"), *sorted((ROOT / "docs").rglob("*.md")), *ROOT.glob("examples/*.md")]


def table(*rows: Iterable[str]) -> str:
    """Markdown; the first row is the head."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    cells.insert(1, ["---"] * len(cells[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


CHINESE = {
    "ms-swift": "ms-swift",
    "From scratch": "从头训练",
    "Start from `--adapters`": "从 `--adapters` 开始",
    "After `--resume_from_checkpoint`": "`--resume_from_checkpoint` 之后",
    "The trainer's own weights": "训练模型自身的权重",
    "With an option": "使用某个选项时",
    "Right": "正确",
    "The first batch comes from the base model, without the LoRA": "第一个批次来自没有 LoRA 的基座模型",
    "Every batch after the first has the LoRA counted twice: malformed text": (
        "从第二个批次起 LoRA 被重复计入：文本错乱"
    ),
    "Crashes in the first optimizer step": "在第一个优化器步崩溃",
    "Base weights drift a little at every sync": "每次权重同步，基座权重都会漂移一点",
    "The first sync casts the LoRA to bf16, and data-parallel ranks stop agreeing on its gradients; base weights drift "
    "a little at every sync": (
        "第一次同步把 LoRA 转成 bf16，数据并行各 rank 的梯度不再一致；每次权重同步，基座权重都会漂移一点"
    ),
    "`--sleep_level 2`: no base model after the first batch; `--move_model_batches`: every batch is garbage": (
        "`--sleep_level 2`：第一个批次之后没有基座模型；`--move_model_batches`：每个批次都是乱码"
    ),
    "`--sleep_level 2`: every batch from the base model, except after a resume; `--move_model_batches`: every batch is "
    "garbage": "`--sleep_level 2`：除断点续训外，每个批次都来自基座模型；`--move_model_batches`：每个批次都是乱码",
    "`--move_model_batches`: every batch is garbage": "`--move_model_batches`：每个批次都是乱码",
    "TRL": "TRL",
    "Rollouts": "采样",
    "Base weights drift a little at every sync; a push that fails leaves the LoRA merged into it": (
        "每次权重同步，基座权重都会漂移一点；传送失败时 LoRA 留在其中"
    ),
    "`vllm_enable_sleep_mode=True`: every rollout comes from the model's files, without what was learnt": (
        "`vllm_enable_sleep_mode=True`：每次采样都来自模型文件，没有学到的内容"
    ),
    "`vllm_mode='server'`: the first sync merges twice": "`vllm_mode='server'`：第一次同步合并两次",
    "vLLM": "vLLM",
    "Run on": "运行设备",
    "With ms-swift": "搭配的 ms-swift",
    "Adapters from memory": "内存中的 adapter",
    "Not tried": "未测试",
}
WAYS = {"in-process": "进程内", "multi-process": "多进程", "tensor parallel": "张量并行"}  # within a cell


ARCHITECTURE_WORDS = {
    "Adapter mode": "adapter 模式",
    "Fused mode": "融合模式",
    ", with images and sounds": "，带图像和声音",
    ", with images": "，带图像",
    ", without sounds": "，不含声音",
    ", without images": "，不含图像",
    ", folded in": "，以融合模式提供",
    ", tied embeddings": "，词嵌入共享权重",
    ", trained: SmolLM2-135M": "，已训练模型：SmolLM2-135M",
    "needs a GPU, not run": "需要 GPU，未运行",
    "not run": "未运行",
    "passed": "通过",
    "refused": "拒绝",
    "fails": "失败",
}


def affected_in_chinese() -> str:
    return _in_chinese(releases.markdown_table())


def trl_in_chinese() -> str:
    return _in_chinese(releases.trl_markdown_table())


def vllm_in_chinese() -> str:
    return _in_chinese(releases.vllm_markdown_table())


def _in_chinese(english: str) -> str:
    """Cell by cell; words that CHINESE and WAYS lack are an error, so that nothing new stays untranslated."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in english.splitlines()]
    translated = []
    for number, row in enumerate(rows):
        names = row[:1] if number else []  # a release; of vLLM's table only the last column has words
        rest = [CHINESE.get(cell) or _ways(cell) for cell in row[len(names) :]]
        translated.append([*(name.replace(" to ", " 至 ") for name in names), *rest])
    return "\n".join(f"| {' | '.join(row)} |" for row in translated)


def _ways(cell: str) -> str:
    found = re.sub("|".join(WAYS), lambda way: WAYS[way[0]], cell)
    assert not re.search("[a-z]{2}", re.sub("`[^`]*`", "", found)), f"not translated: {cell}"
    return found


def settings() -> str:
    """Every environment variable, from the docstring and the defaults of `Settings`."""
    rows = []
    for name, text in _SETTING.findall(inspect.getdoc(Settings) or ""):
        words = " ".join(text.split())
        match = _VARIABLE.search(words)
        assert match, f"the docstring of Settings does not name the variable of {name}"
        said = words.replace(match[0], "", 1).strip(" :,()").replace("``", "`")
        rows.append((f"`{match[1]}`", _default(name), said[0].upper() + said[1:]))
    return table(("Variable", "Default", "What it does"), *rows)


def _default(name: str) -> str:
    value = getattr(Settings, name)
    return {True: "`on`", "": "not set"}.get(value, f"`{value}`")


def error_table() -> str:
    """Every error, the built-in one that catches it too, and when it is raised."""
    rows = []
    for name in sorted(name for name in vars(errors) if name.endswith("Error") and name != "SwiftLoraFixError"):
        error = getattr(errors, name)
        builtin = next(base for base in error.__mro__ if base.__module__ == "builtins" and base is not Exception)
        rows.append((f"[`{name}`](#{name.lower()})", f"`{builtin.__name__}`", _first_paragraph(error)))
    return table(("Error", "Also a", "Raised when"), *rows)


def cause_table() -> str:
    """Every cause that a PolicyMismatchError can name."""
    from swift_lora_fix.proof.causes import CAUSES

    rows = [(f"`{key}`", _sentence(cause.title), cause.advice) for key, cause in CAUSES.items()]
    return table(("In the message", "What is wrong", "What to do"), *rows)


def defect_table() -> str:
    """Every known defect of stock ms-swift: where, what a user sees, what happens instead, whether it is mended."""
    rows = []
    for defect in dict.fromkeys(chain.from_iterable(family.defects for family in releases.FAMILIES)):
        having = [f for f in releases.FAMILIES if f.has(defect)]  # one after the other: the release tests say so
        where = " to ".join(dict.fromkeys((having[0].first, having[-1].last)))
        rows.append((f"`{defect.key}`", where, defect.symptom, _sentence(defect.remedy)))
    return table(("Defect", "ms-swift", "What you see", "With swift_lora_fix"), *rows)


def architecture_table() -> str:
    """Every architecture of the matrix: with which releases of ms-swift it passed, or what else is known, by mode."""
    from tests.matrix.cells import all_cells
    from tests.matrix.models import ARCHITECTURES
    from tests.matrix.table import records_of

    rows = []
    for name, architecture in ARCHITECTURES.items():
        known = []
        for mode in ("adapter", "fused"):
            ours = [cell for cell in all_cells().values() if not cell.stock]
            cells = [cell for cell in ours if (cell.architecture, cell.mode) == (name, mode)]
            records = [record for cell in cells for record in records_of(cell)]
            passed = {record["versions"]["ms-swift"] for record in records if record["outcome"] == "passed"}
            outcomes = {record["outcome"] for record in records}
            failing = "refused" if "refused" in outcomes else "fails" if outcomes else "not run"
            if all(cell.needs_gpu for cell in cells):
                failing = "needs a GPU, not run"
            how = ", folded in" if any(record.get("served", mode) != mode for record in records) else ""
            how += _unheard(architecture.media, records)
            known.append(f"passed{how} ({', '.join(sorted(passed))})" if passed else failing)
        media = " and ".join(MEDIA[kind] for kind in architecture.media)
        rows.append((f"`{architecture.model_type}`{media and f', with {media}'}{architecture.note}", *known))
    return table(("Architecture (`--model_type`)", "Adapter mode", "Fused mode"), *rows)


MEDIA = {"image": "images", "audio": "sounds"}


def _unheard(media: Iterable[str], records: list[dict[str, Any]]) -> str:
    """What the prompts of these records lacked. (Older ones do not say what they had, and had images.)"""
    asked = [sync["media"] for record in records for sync in record["syncs"] if sync["media"]]
    had = {kind for found in asked for kind in found.get("of", ["image"])}
    return "".join(f", without {MEDIA[kind]}" for kind in media if records and kind not in had)


def architectures_in_chinese() -> str:
    english = architecture_table().replace("Architecture (`--model_type`)", "架构（`--model_type`）")
    for words, chinese in ARCHITECTURE_WORDS.items():
        english = english.replace(words, chinese)
    return english


def kind_table() -> str:
    """Every kind of PEFT adapter that is known, and the modes that serve it."""
    from swift_lora_fix.policy.kinds import KINDS

    marks = {True: "yes", False: "no"}
    rows = [(_sentence(k.name, end=""), marks["adapter" in k.modes], marks["fused" in k.modes]) for k in KINDS]
    return table(("Kind", "Adapter mode", "Fused mode"), *rows)


def patch_table() -> str:
    """Every patch of ms-swift, PEFT and vLLM in the trainer's process, why it is there, and when it may go."""
    from swift_lora_fix.engine.vllm.dense import hooks as dense
    from swift_lora_fix.frameworks.swift import hooks
    from swift_lora_fix.install.registry import PatchSet

    sets = [value for module in (hooks, dense) for value in vars(module).values() if isinstance(value, PatchSet)]
    rows = [(f"`{p.target}`", _sentence(p.why), _sentence(p.goes_when)) for each in sets for p in each.patches]
    return table(("Patched", "Why", "Goes when"), *rows)


def _first_paragraph(thing: object) -> str:
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split()).replace("``", "`")


def _sentence(words: str, end: str = ".") -> str:
    is_name = not words.split()[0].isalpha() or words.startswith(("aLoRA", "vLLM"))  # ms-swift, modules_to_save
    return (words if is_name else words[0].upper() + words[1:]).rstrip(".") + end


def made(name: str) -> str:
    """What the named function returns."""
    module, _, function = name.rpartition(".")
    return str(getattr(importlib.import_module(module), function)())


def rewritten(text: str) -> str:
    return MARKED.sub(lambda m: f"<!-- table: {m[1]}() -->\n{made(m[1])}\n<!-- end of table -->", text)


if __name__ == "__main__":
    for page in pages():
        before = page.read_text()
        if before != (after := rewritten(before)):
            page.write_text(after)
            print(f"rewritten: {page.relative_to(ROOT)}")
