"""Prove it on your own model and adapter: short real GRPO runs with and without the plugin, engine against trainer at
each sync. Ends with 0 (proved), 1 (not proved) or 2 (could not be run). What follows -- goes to ms-swift, or TRL."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ChartError, MissingPackageError, SettingsError
from ...install import releases
from ...proof.verdict import ALLOWED
from .chart import CHART_NAME, draw
from .facts import Request, Result, Side, found
from .runs import run as run_both

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

HELP = "prove on your model and adapter that the engine serves the adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="M", help="a local folder, or a model id as the framework takes it"
    )
    parser.add_argument("--adapter", required=True, metavar="A", help="a PEFT LoRA folder or checkpoint, or its id")
    parser.add_argument(
        "--framework", choices=("ms-swift", "trl"), help="whose trainer (default: ms-swift, where it is installed)"
    )
    parser.add_argument(
        "--use_hf", choices=("true", "false"), default="false", help="ids are Hugging Face's (TRL's are)"
    )
    parser.add_argument("--syncs", type=int, default=4, metavar="N", help="syncs in each run (default: 4)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where logs and chart go (default: a new folder)")
    parser.add_argument("--json", action="store_true", help="the result for machines, on standard output")
    parser.add_argument(
        "extra", nargs="*", metavar="-- ARGUMENTS", help="more arguments for swift rlhf, or of TRL's GRPOConfig"
    )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    if args.syncs < 2:
        raise SettingsError(f"--syncs {args.syncs}: at least 2, because the defects show from the second sync on.")
    folder = args.out or Path(tempfile.mkdtemp(prefix="swift-lora-fix-verify-"))
    is_trl = args.framework == "trl" or (args.framework is None and releases.installed_swift() is None)
    framework = "TRL" if is_trl and (args.framework or releases.installed_trl()) else "ms-swift"
    request = Request(args.model, args.adapter, args.use_hf == "true", args.syncs, tuple(args.extra), framework)
    result = Result(*_with_progress(request, folder), framework)
    if args.json:
        print(json.dumps(result.as_dict(), indent=1))
        return result.exit_code
    show(result, folder, Console(highlight=False))
    return result.exit_code


def show(result: Result, folder: Path, console: Console) -> None:
    """Table, verdict and chart."""
    from rich.text import Text

    console.print(_table(result))
    console.print(Text(result.verdict, style="bold green" if result.is_proved else "bold red"), soft_wrap=True)
    try:
        draw(result, folder / CHART_NAME)
    except (MissingPackageError, ChartError) as error:
        print(f"No chart: {error}", file=sys.stderr)
        console.print(Text(f"Logs: {folder}"), soft_wrap=True)
    else:
        console.print(Text(f"Chart: {folder / CHART_NAME}; logs beside it."), soft_wrap=True)


def _table(result: Result) -> Table:
    from rich.table import Table

    table = Table(title="|logprob engine - trainer| at each sync, nats a token")
    table.add_column("run")
    table.add_column("", justify="right")
    for name in ("mean", "max", "ratio", "sync", "base changed", "LoRA changed"):
        table.add_column(name, justify="right")
    table.add_column("found", max_width=24)
    for side in (result.stock, result.ours):
        for number, sync in enumerate(side.syncs, start=1):
            table.add_row(
                side.name if number == 1 else "",
                str(number),
                f"{sync.mean:.4g}",
                f"{sync.max:.4g}",
                f"{sync.ratio:.1f}",
                f"{sync.seconds * 1e3:.1f} ms",
                f"{sync.base_changed}/{sync.base_tensors}",
                f"{sync.lora_changed}/{sync.lora_tensors}",
                found(sync),
                style="" if sync.agrees else "red",
            )
        table.add_section()
    last = result.ours.syncs[-1]
    table.caption = (
        f"ratio: in units of what the trainer's own numerics explain ({last.noise:.4g} here), outliers apart; up to "
        f"{ALLOWED:g} is sound. The base alone would be {last.control_base:.4g} off, twice the adapter "
        f"{last.control_double:.4g}. Base changed: tensors of the trainer's frozen base that differ from the start; "
        "LoRA changed: of the trainer's LoRA, by this sync."
    )
    return table


def _with_progress(request: Request, folder: Path) -> tuple[Side, Side]:
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
