"""The chart of ``swift-lora-fix verify``: how far the engine was from the trainer at each sync of the two runs."""

from __future__ import annotations

from pathlib import Path

from ...common import charts
from .facts import Result

CHART_NAME = "verify.png"


def draw(result: Result, path: Path) -> None:
    """Save the chart. Raises MissingPackageError without matplotlib, ChartError when the file cannot be written."""
    with charts.chart(path, size=(8, 4.5)) as (figure, (axis,)):
        for side, colour, marker in ((result.stock, charts.STOCK, "s"), (result.ours, charts.OURS, "o")):
            numbers = list(range(1, len(side.syncs) + 1))
            axis.plot(numbers, [sync.mean for sync in side.syncs], color=colour, marker=marker, label=side.name)
        last = result.ours.syncs[-1]
        for level, label, style in (
            (last.control_base, "if the engine served the plain base", ":"),
            (last.control_double, "if it served twice the adapter", "-."),
            (last.noise, "the trainer's own numerics", "--"),
        ):
            axis.axhline(level, color=charts.QUIET, linestyle=style, linewidth=1, label=label)
        axis.set_yscale("log")
        axis.set_xticks(range(1, 1 + max(len(result.stock.syncs), len(result.ours.syncs))))
        axis.set_xlabel("sync")
        axis.set_ylabel("mean |logprob engine \u2212 trainer| (nats a token)")
        axis.set_title("Does the engine serve the trainer's policy?")
        figure.legend(loc="outside lower center", ncols=2)
