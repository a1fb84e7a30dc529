"""The chart of ``swift-lora-fix report``: mismatches above, evidence in the middle, the time of each sync below."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...common import charts
from ...proof.verdict import ALLOWED, DECISIVE
from .facts import AUDIT, REST, RunReport, Step, duration, median_split, plural

MISMATCH, BASE, DOUBLE, GREY, BAD = charts.OURS, charts.AMBER, charts.VIOLET, charts.QUIET, charts.BAD
STAGE_COLOURS = {
    "validate": "#90caf9",
    "write": "#1565c0",
    "caches": "#80cbc4",
    "wait": "#9575cd",
    REST: "#bdbdbd",
    AUDIT: "#ffb74d",
}
STAGE_LABELS = {
    "validate": "validate adapter",
    "write": "write it",
    "caches": "reset caches",
    "wait": "wait for device",
    REST: "rest of the sync",
    AUDIT: "audit of the slots",
}
TALL = 4.0  # times the median: longer bars are cut off, and the first is labelled
BARS_AT_MOST = 400
MARKERS_AT_MOST = 60


def draw(report: RunReport, path: Path) -> None:
    """Save the chart: mismatch against noise and controls (log scale), the evidence against other policies, and the
    time of each sync.

    Raises MissingPackageError without matplotlib, ChartError when the file cannot be written.
    """
    ratios = {"height_ratios": (3, 1.6, 2)}
    with charts.chart(path, size=(10, 11), rows=3, sharex=True, gridspec_kw=ratios) as (figure, axes):
        above, middle, below = axes
        charts.horizontal_grid(above, middle, below)
        _draw_mismatch(above, report)
        _draw_evidence(middle, report)
        _draw_time(below, report.synced)
        below.set_xlabel("global step")
        below.xaxis.get_major_locator().set_params(integer=True)
        figure.suptitle(f"{report.folder.resolve().name}: {_headline(report)}", fontsize=13)


def _headline(report: RunReport) -> str:
    if report.wrong:
        return f"the engine served another policy at {plural(len(report.wrong), 'step')}"
    if report.proved:
        return f"engine and trainer agree at {plural(len(report.proved), 'step')} that could tell"
    return "not proved, no step could tell"


def _draw_mismatch(axis: Any, report: RunReport) -> None:
    probed = report.probed
    if not probed:
        _empty(axis, "no step was probed")
        return
    few = len(probed) <= MARKERS_AT_MOST

    def line(name: str, label: str, marker: str | None = None, **look: Any) -> None:
        points = [(step.position, step.values[name]) for step in probed if name in step.values]
        if points:
            axis.plot(*zip(*points), label=label, marker=marker if few else None, markersize=5, **look)

    line("control_double", "control: the LoRA counted twice", color=DOUBLE, marker="v", lw=1.5, ls="--")
    line("control_base", "control: no LoRA at all", color=BASE, marker="^", lw=1.5, ls="--")
    line("mismatch_max", "engine against trainer, largest", color=MISMATCH, lw=1, alpha=0.35)
    line("mismatch_mean", "engine against trainer, mean", color=MISMATCH, marker="o", lw=2.2)
    allowed = [(step.position, ALLOWED * step.values["noise"]) for step in probed if "noise" in step.values]
    if allowed:
        axis.plot(*zip(*allowed), label=f"{ALLOWED:g} x that noise", color=BAD, lw=1.2, ls="-.")
    line("noise", "noise of the policy's own numerics", color=GREY, lw=1.5, ls=":")
    if few:
        _mark(axis, [step for step in probed if step.is_evaluation], "in an evaluation", mfc=MISMATCH, marker="D")
        _mark(axis, [step for step in probed if not step.is_distinguishable], "LoRA too small to tell", mfc="white")
    _mark(axis, report.open, "left open", mfc=GREY, marker="s")
    _mark(axis, report.wrong, "another policy was served", mfc=BAD, marker="X", ms=11, mec="white")
    axis.set_yscale("log", nonpositive="clip")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_ylabel("|log-probability engine − trainer|,\nnats per token")
    _legend(axis, 3)


def _draw_evidence(axis: Any, report: RunReport) -> None:
    """Nats of evidence against the policies that an engine serves when a sync goes wrong."""
    drawn = False
    for name, label, look in (
        ("against_base", "against: no LoRA at all", {"color": BASE, "marker": "^"}),
        ("against_double", "against: the LoRA counted twice", {"color": DOUBLE, "marker": "v"}),
    ):
        points = [(step.position, step.values[name]) for step in report.probed if name in step.values]
        if points:
            if len(points) > MARKERS_AT_MOST:
                look["marker"] = ""
            axis.plot(*zip(*points), label=label, markersize=5, lw=1.5, **look)
            drawn = True
    if not drawn:
        _empty(axis, "no evidence was weighed")
        return
    axis.axhline(DECISIVE, color=GREY, lw=1.2, ls="-.", label=f"decides from {DECISIVE:g} on")
    axis.set_yscale("symlog", linthresh=DECISIVE)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_ylabel("evidence that the engine\ndoes not serve it, nats")
    _legend(axis, 3)


def _mark(axis: Any, steps: Sequence[Step], label: str, **look: Any) -> None:
    points = [(s.position, s.values["mismatch_mean"]) for s in steps if math.isfinite(s.values["mismatch_mean"])]
    if points:
        look = {"marker": "o", "ms": 6, "mec": MISMATCH, **look}
        axis.plot(*zip(*points), ls="", label=label, zorder=5, **look)


def _draw_time(axis: Any, synced: Sequence[Step]) -> None:
    if not synced:
        _empty(axis, "no sync was timed")
        return
    splits = [step.split() for step in synced]
    totals = [sum(split.values()) for split in splits]
    median = statistics.median(totals)
    unit, name = (1e3, "ms") if median < 1 else (1.0, "s")
    positions = [step.position for step in synced]
    stages = list(median_split(synced)) or [REST]
    heights = [[unit * split[stage] for split in splits] for stage in stages]
    colours = [STAGE_COLOURS[stage] for stage in stages]
    labels = [STAGE_LABELS[stage] for stage in stages]
    if len(positions) <= BARS_AT_MOST:
        _bars(axis, positions, heights, colours, labels)
    else:
        axis.stackplot(positions, heights, colors=colours, labels=labels, lw=0)
    top = 1.25 * max(total for total in totals if total <= TALL * median)
    axis.set_ylim(0, unit * top or 1)
    _name_tall(axis, [(step, total) for step, total in zip(synced, totals) if total > top])
    axis.set_ylabel(f"time of a sync and its audit, {name}")
    _legend(axis, 6)


def _bars(
    axis: Any, positions: Sequence[float], heights: list[list[float]], colours: list[str], labels: list[str]
) -> None:
    width = 0.8 * min((later - earlier for earlier, later in zip(positions, positions[1:])), default=1)
    bottom = [0.0] * len(positions)
    for height, colour, label in zip(heights, colours, labels):
        axis.bar(positions, height, width=width, bottom=bottom, color=colour, label=label)
        bottom = [low + more for low, more in zip(bottom, height)]


def _name_tall(axis: Any, tall: Sequence[tuple[Step, float]]) -> None:
    """Label the bars that are cut off: the first with its time, the rest as a count."""
    if tall:
        step, total = tall[0]
        more = f", and {plural(len(tall) - 1, 'more bar')} cut off" if len(tall) > 1 else ""
        text = f"{step.place}: {duration(total)}, cut off{more}"
        place = {"textcoords": "offset points", "xytext": (12, -3), "va": "top", "fontsize": 9, "color": "#424242"}
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
        axis.annotate(text, (step.position, 1), xycoords=axis.get_xaxis_transform(), bbox=box, **place)


def _empty(axis: Any, words: str) -> None:
    axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", color=GREY)
    axis.set_yticks([])


def _legend(axis: Any, columns: int) -> None:
    look = {"loc": "lower left", "bbox_to_anchor": (0, 1), "fontsize": 9, "borderaxespad": 0.3}
    look["columnspacing"] = 1.2
    axis.legend(ncol=columns, **look)
