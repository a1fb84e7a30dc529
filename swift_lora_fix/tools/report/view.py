"""Show what a run's log says of its weight syncs: a chart, and in words whether the engine served the trainer's policy.
Ends with 0 (proved), 1 (a step with another policy, or nothing proved) or 2 (no log to read)."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import MissingPackageError
from ...proof.verdict import DECISIVE
from .chart import draw
from .facts import CHART_NAME, RunReport, duration, median_of, median_split, plural
from .reading import read

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

HELP = "chart and summarise the weight syncs of a run"
QUIET_SECONDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", metavar="RUN_DIR", type=Path, help="the run's output folder, a vN-* folder in it, or a checkpoint"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help=f"the chart (default: RUN_DIR/{CHART_NAME})")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.text import Text

    bar = _Bar()
    try:
        report = read(args.folder, bar)
    finally:
        bar.stop()
    console = Console(highlight=False)
    console.print(_summary(report))
    for words in report.words:
        console.print(Text(words))
    console.print(Text(report.verdict, style="bold green" if report.exit_code == 0 else "bold red"))
    chart = args.out or args.folder / CHART_NAME
    try:
        with Console(stderr=True).status("Drawing ..."):
            draw(report, chart)
    except MissingPackageError as error:
        print(f"No chart: {error}", file=sys.stderr)
    else:
        console.print(Text(f"Chart: {chart}"), soft_wrap=True)
    return report.exit_code


class _Bar:
    """A progress bar on standard error, if reading takes longer than a moment."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self.bar: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None and time.monotonic() - self.since > QUIET_SECONDS:
            from rich.console import Console
            from rich.progress import Progress

            self.bar = Progress(console=Console(stderr=True))
            self.bar.start()
            self.bar.add_task("Reading the log")
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done, total=total)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def _summary(report: RunReport) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("run", str(report.folder))
    table.add_row("steps", _steps(report))
    for name, finding in (*_mismatch(report), *_time(report)):
        table.add_row(name, finding)
    return table


def _steps(report: RunReport) -> str:
    trained, evaluations = report.trained, report.evaluations
    words = f"{len(trained):,} with numbers"
    if trained:
        words += f", {trained[0].step} to {trained[-1].step}"
    return words + (f", and {plural(len(evaluations), 'evaluation')}" if evaluations else "")


def _mismatch(report: RunReport) -> list[tuple[str, str]]:
    probed, told = report.probed, report.distinguishable
    counts = f"{len(told):,} could tell a wrong policy, {len(report.wrong):,} wrong, {len(report.open):,} left open"
    rows = [("probed", f"{len(probed):,}, of which {counts}")]
    for name, label in (
        ("mismatch_mean", "mismatch, mean"),
        ("mismatch_max", "mismatch, largest"),
        ("mismatch_kl", "mismatch, KL"),
        ("noise", "noise of its own numerics"),
        ("control_base", "control: no LoRA"),
        ("control_double", "control: LoRA twice"),
    ):
        median = median_of(told or probed, name)
        if median is not None:
            rows.append((label, f"{median:.3g} nats per token (median)"))
    for name, label in (("against_base", "evidence: not no LoRA"), ("against_double", "evidence: not LoRA twice")):
        median = median_of(told or probed, name)
        if median is not None:
            rows.append((label, f"{median:.3g} nats a look (median), {DECISIVE:g} decide"))
    slope = median_of(told, "slope")
    if slope is not None:
        rows.append(("the engine stands at", f"{slope:.3f} from the plain base, 0, to the policy, 1 (median)"))
    return rows


def _time(report: RunReport) -> list[tuple[str, str]]:
    from rich import filesize

    synced = report.synced
    seconds = median_of(synced, "seconds")
    rows = []
    if seconds is not None:
        longest = max(synced, key=lambda step: step.values["seconds"])
        most = f"longest {duration(longest.values['seconds'])} at {longest.place}"
        rows.append(("time of a sync", f"{duration(seconds)} (median), {most}"))
        parts = median_split(synced).items()
        rows.append(("of which", ", ".join(f"{stage} {duration(part)}" for stage, part in parts)))
    gate = median_of(report.steps, "seconds_gate")
    if gate is not None:
        gated = sum("seconds_gate" in step.values for step in report.steps)
        rows.append(("the gate", f"{duration(gate)} (median), at {gated:,} of {len(report.steps):,} steps"))
    size = median_of(report.steps, "bytes")
    if size is not None:
        rows.append(("written", f"{filesize.decimal(round(size))} a sync (median)"))
    return rows
