"""Examine this environment: what is installed, which defects it has, whether the fix goes in, and what is to be done.
Ends with 0 (ready), 1 (works, with advice) or 2 (cannot work)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .facts import DISTRIBUTIONS, Report, examine
from .variables import Variable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

HELP = "examine this environment: versions, defects, whether the fix goes in, what to do"
VERDICTS = {
    "ready": ("green", "ready: the fix goes in, nothing to do"),
    "advice": ("yellow", "works, and there is something to do"),
    "broken": ("red", "cannot work as it is"),
}
MORE = "Everything that was found: swift-lora-fix doctor --verbose (tables) or --json (for machines)."
START = {
    "ms-swift": 'swift rlhf ... --external_plugins "$(swift-lora-fix plugin)"',
    "TRL": "import swift_lora_fix, before the trainer is made.",
}
TO_DO_AT_MOST = 2
Row = tuple[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verbose", action="store_true", help="everything that was found, in tables")
    parser.add_argument("--json", action="store_true", help="for machines; keys: swift_lora_fix/tools/doctor/facts.py")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    with Console(stderr=True).status("Loading what is installed, up to a minute or two ..."):
        report = examine()
    if args.json:
        json.dump(report.as_dict(), sys.stdout, indent=1)
        print()
    elif args.verbose:
        show(report, Console(highlight=False, soft_wrap=False))
    else:
        show_briefly(report, Console(highlight=False, soft_wrap=True))
    return report.exit_code


def show_briefly(report: Report, console: Console) -> None:
    """The verdict and what to do, in at most five lines: not wrapped, the terminal does that."""
    _print_verdict(report, console)
    for line in (_found(report), *(_to_do(report) or _how_to_use_it(report)), MORE):
        console.print(line, markup=False)


def _found(report: Report) -> str:
    names = {report.framework: DISTRIBUTIONS[report.framework], "vLLM": "vllm", "torch": "torch", "PEFT": "peft"}
    versions = [f"{shown} {_version(report, name, report.versions[name])}" for shown, name in names.items()]
    return ", ".join(versions) + (f", on {report.engine.device}" if report.engine.device else "")


def _to_do(report: Report) -> list[str]:
    """The first `TO_DO_AT_MOST` things to do, problems first, and how many more there are."""
    sentences = (*report.problems, *report.advice)
    lines = [f"{number}. {' '.join(words.split())}" for number, words in enumerate(sentences[:TO_DO_AT_MOST], 1)]
    left = len(sentences) - len(lines)
    return [*lines[:-1], f"{lines[-1]} (And {left} more.)"] if left else lines


def _how_to_use_it(report: Report) -> list[str]:
    mended = [defect.title for defect in report.defects if defect.mended]
    found = f"Stock has {len(report.defects)} known defects here; mended in the colocated engine: {'; '.join(mended)}."
    return [found, f"Use it: {START[report.framework]}"]


def show(report: Report, console: Console) -> None:
    """Everything, in tables."""
    from rich.text import Text

    _print_verdict(report, console)
    console.print(_facts(report))
    if report.defects:
        console.print(_defects(report))
    for title, style, sentences in (("Problems", "red", report.problems), ("Advice", "yellow", report.advice)):
        if sentences:
            console.print(Text(title, style=f"bold {style}"))
            console.print(_numbered(sentences))


def _print_verdict(report: Report, console: Console) -> None:
    from rich.text import Text

    colour, words = VERDICTS[report.verdict]
    console.print(Text(f"swift-lora-fix doctor: {words}", style=f"bold {colour}"))


def _facts(report: Report) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for title, rows in _sections(report):
        for index, (name, finding) in enumerate(rows):
            table.add_row(Text("" if index else title), Text(name), Text(finding))
        table.add_section()
    return table


def _defects(report: Report) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = f"What stock {report.framework} {report.release.span} does wrong with LoRA"
    table = Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("mended", no_wrap=True)
    table.add_column("defect", ratio=2, overflow="fold")
    table.add_column("what you see", ratio=3, overflow="fold")
    table.add_column("with swift_lora_fix", ratio=2, overflow="fold")
    for defect in report.defects:
        mended = Text("yes", style="green") if defect.mended else Text("no", style="red")
        table.add_row(mended, Text(defect.title), Text(defect.symptom), Text(defect.remedy))
    return table


def _sections(report: Report) -> Iterator[tuple[str, list[Row]]]:
    yield "Installed", [(name, _version(report, name, version)) for name, version in report.versions.items()]
    yield "Affected", _affected(report)
    yield (
        "Patches",
        [
            ("all of them" if report.patches.applied else "none", f"{report.patches.reason}"),
            *((target.rsplit(": ", 1)[-1], state) for target, state in report.patches.targets.items()),
        ],
    )
    yield "Plugin", _plugin(report)
    yield "Engine", _engine(report)
    yield "Environment", [(variable.name, _variable(variable)) for variable in report.environment]


def _version(report: Report, name: str, version: str | None) -> str:
    if name == "vllm" and report.vllm_distribution not in (None, "vllm"):
        return f"{version} (from {report.vllm_distribution})"
    return version or "not installed"


def _affected(report: Report) -> list[Row]:
    if not report.release.known:
        installed = report.versions[DISTRIBUTIONS[report.framework]] is not None
        why = "this release is not in the table" if installed else "it is not installed"
        return [("not known", f"{report.framework}: {why}")]
    mended = sum(defect.mended for defect in report.defects)
    return [("yes" if report.release.affected else "no", f"{len(report.defects)} known defects, {mended} mended here")]


def _plugin(report: Report) -> list[Row]:
    plugin = report.plugin
    entry = "not registered" if not plugin.entry_point else "registered"
    if plugin.kept_out:
        entry += ", and VLLM_PLUGINS keeps it out"
    return [
        ("--external_plugins", plugin.file if plugin.file_exists else f"missing: {plugin.file}"),
        ("vllm.general_plugins", entry),
    ]


def _engine(report: Report) -> list[Row]:
    engine = report.engine

    def known(value: bool | None) -> str:
        return {True: "yes", False: "no", None: "not known"}[value]

    tested = f"on {' and '.join(kind.upper() for kind in engine.tested_on)}" if engine.tested_on else "no"
    count = f"{engine.device_count} x " if (engine.device_count or 1) > 1 else ""
    return [
        ("vLLM release tested", tested),
        ("load_inplace", f"{known(engine.load_inplace)} (replaces an adapter under the same id)"),
        ("device", f"{count}{engine.device or 'not known'}"),
        ("bfloat16", known(engine.bf16)),
    ]


def _variable(variable: Variable) -> str:
    value = "not set" if variable.value is None else repr(variable.value)
    words = "invalid" if variable.problem else variable.note
    return f"{value} ({words})" if words else value


def _numbered(sentences: tuple[str, ...]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    for number, sentence in enumerate(sentences, 1):
        grid.add_row(f" {number}.", Text(sentence))
    return grid
