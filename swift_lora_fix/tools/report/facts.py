"""What ``swift-lora-fix report`` makes of a run: ``logging.jsonl`` into a frozen `RunReport`, that into a chart.

Reads what the package logged through ms-swift's metrics, ``lora_sync/...``: times in seconds, mismatches as the mean
absolute difference of log-probabilities between engine and trainer, in nats a token. Not every step has every number.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from ...errors import MissingPackageError, RunLogError
from ...proof.verdict import FLOORS, MINIMUM_FLOOR

LOG_NAME = "logging.jsonl"
CHART_NAME = "lora_sync.png"
PREFIX = "lora_sync/"
STEP = "global_step/max_steps"
STAGES = ("validate", "write", "caches", "wait")  # parts of ``seconds``
REST = "rest"  # of ``seconds``
AUDIT = "audit"  # beside ``seconds``, as is the gate, which is rare and would dwarf the rest

Progress = Callable[[int, int], None]  # bytes read, bytes in all


@dataclass(frozen=True)
class Step:
    """One step's numbers by their names without ``lora_sync/``."""

    step: int
    values: dict[str, float]

    @property
    def is_probed(self) -> bool:
        return "mismatch_mean" in self.values

    @property
    def is_distinguishable(self) -> bool:
        """Whether the probe could have told a wrong policy from the right one."""
        return self.is_probed and "noise_floor" in self.values and self.values.get("distinguishable", 0.0) > 0

    @property
    def is_above(self) -> bool:
        """Above what the gate allows; a mismatch that is not a number is."""
        return self.is_distinguishable and not self.floors <= FLOORS

    @property
    def floors(self) -> float:
        """The mismatch as a multiple of the noise floor."""
        return self.values["mismatch_mean"] / max(self.values["noise_floor"], MINIMUM_FLOOR)

    def split(self) -> dict[str, float]:
        """Seconds by stage; what no stage accounts for is `REST`."""
        parts = {stage: self.values.get(f"seconds_{stage}", 0.0) for stage in STAGES}
        parts[REST] = max(0.0, self.values.get("seconds", 0.0) - sum(parts.values()))
        return {**parts, AUDIT: self.values.get(f"seconds_{AUDIT}", 0.0)}


@dataclass(frozen=True)
class RunReport:
    """A run's steps in order. ``words`` are what was noticed while reading, a sentence each."""

    folder: Path
    steps: tuple[Step, ...]
    words: tuple[str, ...] = ()

    @property
    def synced(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if "seconds" in step.values)

    @property
    def probed(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.is_probed)

    @property
    def distinguishable(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.is_distinguishable)

    @property
    def above(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.is_above)

    @property
    def exit_code(self) -> int:
        return 1 if self.above or not self.distinguishable else 0

    @property
    def verdict(self) -> str:
        """One or two sentences."""
        if self.above:
            worst = max(self.above, key=lambda step: math.inf if math.isnan(step.floors) else step.floors)
            return (
                f"The engine did NOT serve the trainer's policy: {_plural(len(self.above), 'probed step')} above "
                f"{FLOORS:g} times the noise floor, the worst at step {worst.step} ({worst.floors:.1f} times)."
            )
        if self.distinguishable:
            worst = max(self.distinguishable, key=lambda step: step.floors)
            return (
                f"The engine served the trainer's policy at every step that could tell ({len(self.distinguishable)} of "
                f"{len(self.probed)} probed): at most {worst.floors:.2f} times the noise floor, at step {worst.step}."
            )
        if self.probed:
            return (
                f"Not proved: at none of the {_plural(len(self.probed), 'probed step')} was the LoRA large enough to "
                "tell it from the noise. Train longer, or look at a run that starts from an adapter."
            )
        return "Not proved: no step was probed, so engine and trainer were never compared in this run."


@dataclass
class _Reading:
    """What one file has, so far."""

    steps: list[Step] = field(default_factory=list)  # ascending
    lines: int = 0
    corrupt: int = 0
    without_step: int = 0
    repeated: int = 0

    def add(self, step: Step) -> None:
        """A resumed run appends to its log and does the steps after its checkpoint again: the last time counts."""
        while self.steps and self.steps[-1].step > step.step:
            self.steps.pop()
            self.repeated += 1
        if self.steps and self.steps[-1].step == step.step:
            step = Step(step.step, {**self.steps.pop().values, **step.values})
        self.steps.append(step)


# ---- reading -------------------------------------------------------------------------------------------------------


def read(folder: Path, progress: Progress = lambda done, total: None) -> RunReport:
    """Read the run in ``folder``, or the newest one with our lines in its ``vN-...`` folders.

    Raises RunLogError where there is no log, nothing in it, or nothing of ours.
    """
    logs = _logs(folder)
    readings = {}
    for log in logs:
        readings[log] = reading = _read(log, progress)
        if reading.steps:
            return RunReport(log.parent, tuple(reading.steps), tuple(_words(folder, log, logs, reading)))
    raise RunLogError(_nothing(readings))


def _logs(folder: Path) -> list[Path]:
    """The candidates, the one to prefer first."""
    if not folder.exists():
        raise RunLogError(f"{folder} does not exist.")
    if not folder.is_dir():
        raise RunLogError(f"{folder} is no folder: name the run's output folder, which holds {LOG_NAME}.")
    versions = sorted((path.parent for path in folder.glob(f"v*/{LOG_NAME}")), key=_age, reverse=True)
    logs = [log for log in (folder / LOG_NAME, *(version / LOG_NAME for version in versions)) if log.is_file()]
    if not logs:
        raise RunLogError(
            f"{folder} has no {LOG_NAME}, and no vN-... folder in it has one. ms-swift writes it into the run's "
            "--output_dir at the first logging step: name that folder."
        )
    return logs


def _age(folder: Path) -> tuple[int, float]:
    """ms-swift counts up: v0-20260102-030405, v1-..."""
    number = re.match(r"v(\d+)(-|$)", folder.name)
    return (int(number[1]) if number else -1, folder.stat().st_mtime)


def _read(log: Path, progress: Progress) -> _Reading:
    reading, done, total = _Reading(), 0, log.stat().st_size
    try:
        with log.open("rb") as lines:
            for line in lines:
                done += len(line)
                if not line.strip():
                    continue
                reading.lines += 1
                _take(line, reading)
                if reading.lines % 1000 == 0:
                    progress(done, total)
    except OSError as error:
        raise RunLogError(f"{log} cannot be read: {error.strerror}.") from error
    return reading


def _take(line: bytes, reading: _Reading) -> None:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        reading.corrupt += 1
        return
    values = {
        name[len(PREFIX) :]: number
        for name, value in entry.items()
        if name.startswith(PREFIX) and (number := _number(value)) is not None
    }
    if not values:
        return
    step = _step(entry, values)
    if step is None:
        reading.without_step += 1
    else:
        reading.add(Step(step, values))


def _number(value: Any) -> float | None:
    """ms-swift writes numbers, some of its releases as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _step(entry: dict[str, Any], values: dict[str, float]) -> int | None:
    number = _number(str(entry.get(STEP, "")).partition("/")[0])
    if number is None:
        number = values.get("policy_step")
    return int(number) if number is not None and math.isfinite(number) else None


def _words(folder: Path, log: Path, logs: Sequence[Path], reading: _Reading) -> Iterator[str]:
    if log.parent != folder:
        newer = [other.parent.name for other in logs[: logs.index(log)] if other.parent != folder]
        skipped = f", {_list(newer)} newer but without {PREFIX} lines" if newer else ""
        yield f"{log.parent.name} is the newest run of {folder} with {PREFIX} lines{skipped}."
    if reading.corrupt:
        lines = f"{_plural(reading.corrupt, 'line')} of {reading.lines:,}"
        yield f"{lines} could not be read and {_are(reading.corrupt)} left out."
    if reading.without_step:
        yield f"{_plural(reading.without_step, 'line')} without a step {_are(reading.without_step)} left out."
    if reading.repeated:
        were = "was" if reading.repeated == 1 else "were"
        yield f"{_plural(reading.repeated, 'step')} {were} done again after a resume: the last time counts."


def _nothing(readings: dict[Path, _Reading]) -> str:
    """Why no log has anything of ours."""
    log, reading = next(iter(readings.items()))
    others = f" (nor in {len(readings) - 1} more)" if len(readings) > 1 else ""
    if not any(each.lines for each in readings.values()):
        return f"{log} is empty{others}: the run ended before its first logging step."
    if all(each.corrupt == each.lines for each in readings.values()):
        return f"{log} is no log of ms-swift{others}: none of its {_plural(reading.lines, 'line')} is a JSON object."
    return (
        f"{log} has no {PREFIX} line in {reading.lines}{others}: the plugin was not loaded, or it stepped aside, which "
        'the run\'s own output says. Train with --external_plugins "$(swift-lora-fix plugin)"; `swift-lora-fix doctor` '
        "tells whether this environment can."
    )


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ---- numbers -------------------------------------------------------------------------------------------------------


def median_of(steps: Sequence[Step], name: str) -> float | None:
    values = [step.values[name] for step in steps if math.isfinite(step.values.get(name, math.nan))]
    return statistics.median(values) if values else None


def median_split(steps: Sequence[Step]) -> dict[str, float]:
    """The median seconds of each stage that took any time."""
    splits = [step.split() for step in steps]
    taken = [stage for stage in (*STAGES, REST, AUDIT) if any(split[stage] for split in splits)]
    return {stage: statistics.median(split[stage] for split in splits) for stage in taken}


# ---- the chart -----------------------------------------------------------------------------------------------------

MISMATCH, BASE, DOUBLE, GREY, BAD = "#1565c0", "#b26a00", "#8e24aa", "#616161", "#c62828"
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
TALL = 4.0  # times the median: bars above it are cut off, with their time beside them
BARS_AT_MOST = 400
MARKERS_AT_MOST = 60


def draw(report: RunReport, path: Path) -> None:
    """Save the chart: mismatch against floor and controls (log scale) above, the time of each sync below."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            f'The chart needs matplotlib ({error}): pip install "swift-lora-fix[plot]"'
        ) from error
    figure = Figure(figsize=(10, 8.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 2)})
    for axis in (above, below):
        axis.grid(axis="y", color="#e6e6e6")
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    _draw_mismatch(above, report)
    _draw_time(below, report.synced)
    below.set_xlabel("global step")
    below.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(f"{report.folder.resolve().name}: {_headline(report)}", fontsize=13)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    except OSError as error:
        raise RunLogError(f"{path} cannot be written: {error.strerror}. Name another file with --out.") from error


def _headline(report: RunReport) -> str:
    if report.above:
        return f"{_plural(len(report.above), 'step')} above {FLOORS:g} x noise floor"
    if report.distinguishable:
        return f"engine and trainer agree at {_plural(len(report.distinguishable), 'step')} that could tell"
    return "not proved, no step could tell"


def _draw_mismatch(axis: Any, report: RunReport) -> None:
    probed = report.probed
    if not probed:
        _empty(axis, "no step was probed")
        return
    few = len(probed) <= MARKERS_AT_MOST

    def line(name: str, label: str, marker: str | None = None, allowed: bool = False, **look: Any) -> None:
        points = [(step.step, step.values[name]) for step in probed if name in step.values]
        if allowed:
            points = [(step, FLOORS * max(floor, MINIMUM_FLOOR)) for step, floor in points]
        if points:
            axis.plot(*zip(*points), label=label, marker=marker if few else None, markersize=5, **look)

    line("control_double", "control: the LoRA counted twice", color=DOUBLE, marker="v", lw=1.5, ls="--")
    line("control_base", "control: no LoRA at all", color=BASE, marker="^", lw=1.5, ls="--")
    line("mismatch_max", "engine against trainer, largest", color=MISMATCH, lw=1, alpha=0.35)
    line("mismatch_mean", "engine against trainer, mean", color=MISMATCH, marker="o", lw=2.2)
    line("noise_floor", f"allowed: {FLOORS:g} x noise floor", allowed=True, color=BAD, lw=1.2, ls="-.")
    line("noise_floor", "noise floor", color=GREY, lw=1.5, ls=":")
    if few:
        _mark(axis, [step for step in probed if not step.is_distinguishable], "LoRA too small to tell", mfc="white")
    _mark(axis, report.above, "above what is allowed", mfc=BAD, marker="X", ms=11, mec="white")
    axis.set_yscale("log", nonpositive="clip")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_ylabel("|log-probability engine − trainer|,\nnats per token")
    _legend(axis, 3)


def _mark(axis: Any, steps: Sequence[Step], label: str, **look: Any) -> None:
    points = [(s.step, s.values["mismatch_mean"]) for s in steps if math.isfinite(s.values["mismatch_mean"])]
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
    steps = [step.step for step in synced]
    stages = list(median_split(synced)) or [REST]
    heights = [[unit * split[stage] for split in splits] for stage in stages]
    colours = [STAGE_COLOURS[stage] for stage in stages]
    labels = [STAGE_LABELS[stage] for stage in stages]
    if len(steps) <= BARS_AT_MOST:
        _bars(axis, steps, heights, colours, labels)
    else:
        axis.stackplot(steps, heights, colors=colours, labels=labels, lw=0)
    top = 1.25 * max(total for total in totals if total <= TALL * median)
    axis.set_ylim(0, unit * top or 1)
    _name_tall(axis, [(step, total) for step, total in zip(steps, totals) if total > top])
    axis.set_ylabel(f"time of a sync and its audit, {name}")
    _legend(axis, 6)


def _bars(axis: Any, steps: Sequence[int], heights: list[list[float]], colours: list[str], labels: list[str]) -> None:
    width = 0.8 * min((later - earlier for earlier, later in zip(steps, steps[1:])), default=1)
    bottom = [0.0] * len(steps)
    for height, colour, label in zip(heights, colours, labels):
        axis.bar(steps, height, width=width, bottom=bottom, color=colour, label=label)
        bottom = [low + more for low, more in zip(bottom, height)]


def _name_tall(axis: Any, tall: Sequence[tuple[int, float]]) -> None:
    """What the bars that are cut off would have reached: the first by name, the rest as a number."""
    if tall:
        step, total = tall[0]
        more = f", and {_plural(len(tall) - 1, 'more bar')} cut off" if len(tall) > 1 else ""
        text = f"step {step}: {duration(total)}, cut off{more}"
        place = {"textcoords": "offset points", "xytext": (12, -3), "va": "top", "fontsize": 9, "color": "#424242"}
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
        axis.annotate(text, (step, 1), xycoords=axis.get_xaxis_transform(), bbox=box, **place)


def _empty(axis: Any, words: str) -> None:
    axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", color=GREY)
    axis.set_yticks([])


def _legend(axis: Any, columns: int) -> None:
    look = {"loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False, "fontsize": 9, "borderaxespad": 0.3}
    look["columnspacing"] = 1.2
    axis.legend(ncol=columns, **look)


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.9995 else f"{1e3 * seconds:.3g} ms"
