"""Prove it on your own model and adapter: short real GRPO runs with and without the plugin, engine against trainer at
each sync. Ends with 0 (proved), 1 (not proved) or 2 (could not be run). What follows -- goes to ms-swift as it is."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from ...errors import SettingsError
from .results import CHART_NAME, Result
from .runs import Request
from .runs import run as run_both

HELP = "prove on your model and adapter that the engine serves the adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="M", help="a local folder, or a model id as ms-swift takes it"
    )
    parser.add_argument("--adapter", required=True, metavar="A", help="a PEFT LoRA folder or checkpoint, or its id")
    parser.add_argument("--use_hf", choices=("true", "false"), default="false", help="ids are Hugging Face's")
    parser.add_argument("--syncs", type=int, default=4, metavar="N", help="syncs in each run (default: 4)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where logs and chart go (default: a new folder)")
    parser.add_argument("--json", action="store_true", help="the result for machines, on standard output")
    parser.add_argument("swift", nargs="*", metavar="-- SWIFT ARGUMENTS", help="more arguments for swift rlhf")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.text import Text

    if args.syncs < 2:
        raise SettingsError(f"--syncs {args.syncs}: at least 2, because the defects show from the second sync on.")
    folder = args.out or Path(tempfile.mkdtemp(prefix="swift-lora-fix-verify-"))
    request = Request(args.model, args.adapter, args.use_hf == "true", args.syncs, tuple(args.swift))
    result = Result(*_with_progress(request, folder))
    if args.json:
        print(json.dumps(result.as_dict(), indent=1))
        return result.exit_code
    console = Console(highlight=False)
    console.print(result.table())
    console.print(Text(result.verdict, style="bold green" if result.is_proved else "bold red"), soft_wrap=True)
    result.draw(folder / CHART_NAME)
    console.print(Text(f"Chart: {folder / CHART_NAME}; logs beside it."), soft_wrap=True)
    return result.exit_code


def _with_progress(request: Request, folder: Path):  # type: ignore[no-untyped-def]
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("syncs"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, object] = {}

        def progress(name: str, syncs: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=request.syncs)
            bar.update(tasks[name], completed=syncs)  # type: ignore[arg-type]

        return run_both(request, folder, progress)
