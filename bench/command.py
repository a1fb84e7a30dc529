"""What the command lines of the benchmarks inside a real GRPO run have in common."""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swift_lora_fix.errors import ChartError, MissingPackageError
from tests.support.driver import make_model

Record = dict[str, Any]


def arguments(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of what every ``scripts/NAME`` takes: the model, the rank, where record, chart and work folder go."""
    parser = argparse.ArgumentParser(prog=f"scripts/{name}", description=description)
    parser.add_argument("--shape", help="qwen2 (tiny, the default on a CPU), qwen2-1.5b, qwen2-7b (default on a GPU)")
    parser.add_argument("--model", type=Path, help="a local model folder instead, prompts.jsonl beside it")
    parser.add_argument("--rank", type=int, default=64, help="LoRA rank (default 64)")
    parser.add_argument("--json", type=Path, default=Path(f"build/{name}.json"), help="where the record goes")
    parser.add_argument("--chart", type=Path, default=Path(f"build/{name}.png"), help="where the chart goes")
    parser.add_argument("--folder", type=Path, help="work folder, kept (default: a temporary one)")
    return parser


def setting(args: argparse.Namespace, folder: Path, gpu_shape: str) -> tuple[bool, Path, Record]:
    """Whether there is a GPU, the model's folder (made if ``--model`` names none), and the record's first entries."""
    import torch

    gpu = torch.cuda.is_available()
    shape = args.shape or (gpu_shape if gpu else "qwen2")
    model = args.model.resolve() if args.model else make_model(Path(sys.executable), folder / "models", shape)
    record: Record = {"shape": args.model.name if args.model else shape, "rank": args.rank}
    record.update(device=torch.cuda.get_device_name() if gpu else "CPU", date=datetime.date.today().isoformat())
    return gpu, model, record


def run(
    args: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Path], Record],
    print_table: Callable[[Record], None],
    save_chart: Callable[[Record, Path], None],
) -> None:
    """Measure in the work folder; save the record, print its table, save its chart."""
    folder = args.folder or Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        record = measure(args, folder.resolve())
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(record, indent=1))
    print_table(record)
    try:
        save_chart(record, args.chart)
    except (MissingPackageError, ChartError) as error:
        raise SystemExit(f"record: {args.json}, no chart: {error}") from error
    print(f"record: {args.json}, chart: {args.chart}")
