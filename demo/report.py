"""What the demo found, as one table and as one chart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from demo.checks import Check
from swift_lora_fix.common import charts
from tests.support import bounds
from tests.support.bounds import Probe

RELEASE_TITLE = {
    "affected": "LoRA counted twice after a resume",
    "newest": "crash on resume, LoRA cast, base drift",
}
CPU_ONLY = (
    "This gap is the CPU's own: there vLLM scales the tensors it is given in place, and stock ms-swift hands it the "
    "trainer's. On a GPU stock's first batch is right; the cast and the crash are the same."
)
STOCK, FIXED, QUIET, SCALE = charts.STOCK, charts.OURS, charts.QUIET, charts.AMBER


@dataclass(frozen=True)
class Outcome:
    """The probes (one a batch) of the interrupted run and of the two resumes, and the verdict."""

    interrupted: list[Probe]
    stock: list[Probe]
    fixed: list[Probe]
    stock_crashed: bool
    checks: list[Check]

    @property
    def floor(self) -> Probe:
        return self.interrupted[0]

    @property
    def first_stock_is_off(self) -> bool:
        return not bounds.agrees(self.stock[0], self.floor)


def table(outcome: Outcome, versions: str) -> Table:
    """One row a batch. The interrupted run is with the plugin, as is the effect of the LoRA."""
    title = f"{versions}: |logprob engine - trainer| of greedy tokens"
    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), title_style="bold", caption_justify="left")
    if outcome.stock_crashed and outcome.first_stock_is_off:
        shown.caption = "* " + CPU_ONLY
    shown.add_column("batch\n(step)", no_wrap=True)
    for header, style in (
        ("stock\nmean", "red"),
        ("stock\nmax", "red"),
        ("stock base\nchanged", "red"),
        ("fixed\nmean", "cyan"),
        ("fixed\nmax", "cyan"),
        ("fixed base\nchanged", "cyan"),
        ("LoRA\nitself", "yellow"),
    ):
        shown.add_column(header, justify="right", style=style, no_wrap=True)

    def gaps(probe: Probe | None, mark: str = "") -> list[str]:
        if probe is None:
            return ["", "", ""]
        return [f"{probe['mean']:.4f}{mark}", f"{probe['max']:.4f}{mark}", f"{probe['base_changed']:.2%}"]

    def effect(probe: Probe) -> str:
        return f"{probe['lora_effect']:.4f}"

    for number, probe in enumerate(outcome.interrupted, 1):
        note = " floor" if number == 1 else ""
        shown.add_row(f"{number} ({probe['step']}){note}", *gaps(None), *gaps(probe), effect(probe))
    shown.add_section()
    shown.add_row("resumed", style="dim")
    stock = {probe["step"]: probe for probe in outcome.stock}
    crash = ["crash", "-", "-"] if outcome.stock_crashed else ["", "", ""]
    for number, probe in enumerate(outcome.fixed, 1):
        mark = "*" if number == 1 and shown.caption else ""
        left = gaps(stock[probe["step"]], mark) if probe["step"] in stock else crash
        shown.add_row(f"{number} ({probe['step']})", *left, *gaps(probe), effect(probe))
    return shown


def save_chart(outcome: Outcome, versions: str, path: Path) -> None:
    """The table as a picture: gaps above (log scale), changed base entries below."""
    ratios = {"height_ratios": (3, 1)}
    look: dict[str, Any] = {"rows": 2, "sharex": True, "gridspec_kw": ratios, "option": "--chart"}
    with charts.chart(path, size=(8.5, 7), **look) as (figure, (above, below)):
        _draw(figure, above, below, outcome)
        figure.suptitle(f"{_headline(outcome)}\n{versions}: GRPO with LoRA, tiny Qwen2, CPU", fontsize=12)


def _draw(figure: Any, above: Any, below: Any, outcome: Outcome) -> None:
    before = [float(index) for index in range(len(outcome.interrupted))]
    after = [len(before) + 0.5 + index for index in range(len(outcome.fixed))]
    after_stock = [x + 0.06 for x in after[: len(outcome.stock)]]  # beside the other, not on top of it
    floor = outcome.floor["mean"]

    _gaps(above, after_stock, outcome.stock, STOCK, "s", "stock ms-swift")
    _gaps(above, after, outcome.fixed, FIXED, "o", "with swift_lora_fix")
    _gaps(above, before, outcome.interrupted, FIXED, "o", None)
    scale: dict[str, Any] = {"linestyle": "--", "color": SCALE, "marker": "^", "markersize": 6, "linewidth": 1.5}
    above.plot(
        after, [p["lora_effect"] for p in outcome.fixed], **scale, label="for scale: the effect of the LoRA itself"
    )
    above.plot(before[1:], [p["lora_effect"] for p in outcome.interrupted[1:]], **scale)
    above.axhline(
        floor, color=QUIET, lw=1.5, ls=":", label=f"noise floor: LoRA still zero ({floor:.4f}, bf16 rounding)"
    )
    above.set_yscale("log")
    above.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    above.set_ylim(top=4 * max(p["lora_effect"] for p in outcome.fixed))
    above.set_ylabel("|logprob engine − trainer|\nmarker: mean, bar: up to the maximum")
    figure.legend(loc="outside lower center", ncols=2)

    _base(below, before, outcome.interrupted, FIXED, "o")
    _base(below, after, outcome.fixed, FIXED, "o")
    _base(below, after_stock, outcome.stock, STOCK, "s")
    top = 100 * max(p["base_changed"] for p in outcome.stock)
    below.set_ylim(-0.1 * top, 1.3 * top)
    below.set_ylabel("trainer's base\nchanged, %")
    below.set_xticks(
        before + after,
        [
            f"{number}\nstep {p['step']}"
            for run in (outcome.interrupted, outcome.fixed)
            for number, p in enumerate(run, 1)
        ],
    )
    below.set_xlabel("rollout batch")

    middle = (before[-1] + after[0]) / 2
    charts.horizontal_grid(above, below)
    for axis in (above, below):
        axis.axvline(middle, color=QUIET, lw=1)
    notes: dict[str, Any] = {"transform": above.get_xaxis_transform(), "color": QUIET, "va": "top"}
    above.text(middle - 0.08, 1, "from scratch, then killed", ha="right", **notes)
    above.text(middle + 0.08, 1, f"resumed from checkpoint-{outcome.fixed[0]['step']}", ha="left", **notes)
    if outcome.stock_crashed:
        _crash(above, below, after_stock, outcome)


def _headline(outcome: Outcome) -> str:
    if outcome.stock_crashed:
        return "After the resume, stock ms-swift crashes in its first optimizer step; with the plugin it goes on"
    return "After the resume, stock ms-swift counts the LoRA twice from the second batch on"


def _gaps(axis: Any, xs: list[float], probes: list[Probe], colour: str, marker: str, label: str | None) -> None:
    means = [p["mean"] for p in probes]
    above_mean = [p["max"] - p["mean"] for p in probes]
    axis.errorbar(
        xs,
        means,
        yerr=[[0] * len(means), above_mean],
        color=colour,
        marker=marker,
        ms=8,
        lw=2.2,
        capsize=5,
        label=label,
    )


def _base(axis: Any, xs: list[float], probes: list[Probe], colour: str, marker: str) -> None:
    axis.plot(xs, [100 * p["base_changed"] for p in probes], color=colour, marker=marker, ms=7, lw=2.2)


def _crash(above: Any, below: Any, xs: list[float], outcome: Outcome) -> None:
    last = outcome.stock[-1]
    x = xs[-1] + 0.4
    for axis, y in ((above, last["mean"]), (below, 100 * last["base_changed"])):
        axis.plot([xs[-1], x], [y, y], color=STOCK, lw=2.2, ls=":")
        axis.plot([x], [y], color=STOCK, marker="X", ms=13)
    text = "crash in the optimizer step:\nthe sync had cast the LoRA to bf16"
    if outcome.first_stock_is_off:
        text += "\n(this gap: CPU only, LoRA scaled in place)"
    place: dict[str, Any] = {"textcoords": "offset points", "xytext": (16, 0), "va": "center", "color": STOCK}
    above.annotate(text, (x, last["mean"]), **place)
