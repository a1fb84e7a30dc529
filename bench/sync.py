"""scripts/bench_sync: stock's sync and ours in turn, inside one real GRPO run, beside the machine's byte floor."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from bench import PLUGINS, command
from swift_lora_fix.common import charts
from tests.support.driver import Run, make_model

STAGES = (
    "check",
    "validate",
    "plan",
    "read",
    "digest",
    "write",
    "caches",
    "wait",
)  # in their order; no run has all of them

STOCK = {"adapter": "stock _move_model_to_vllm", "fused": "stock, merged weights"}  # by mode


def run_benchmark(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the model, run ``swift rlhf`` with the bench plugin, return its record."""
    import torch

    gpu = torch.cuda.is_available()
    python = Path(sys.executable)
    shape = args.shape or ("qwen2-7b" if gpu else "qwen2")
    what = f"{args.mode} mode, model: {shape}, LoRA r={args.rank} on all linear layers, {args.syncs} syncs each"
    print(what, flush=True)
    model = args.model or make_model(python, folder / "models", shape)
    run = Run("bench", python, model, folder / "bench", fixed=True, gpu=gpu, probe=False)
    run.last_plugins = (PLUGINS / "slf_bench.py",)
    run.arguments = {
        "vllm_enable_lora": "true" if args.mode == "adapter" else "false",
        "lora_rank": args.rank,
        "lora_alpha": 2 * args.rank,
        "learning_rate": 1e-4,
        "max_steps": 4,
        "save_steps": 100,
        "dataset": folder / "models" / "prompts.jsonl"
        if args.model is None
        else Path(args.model).parent / "prompts.jsonl",
    }
    record_file = folder / "bench.json"
    run.environment = {
        "SWIFT_LORA_FIX_MODE": args.mode,
        "SLF_BENCH_FILE": str(record_file),
        "SLF_BENCH_SYNCS": str(args.syncs),
        "SLF_BENCH_STEP": "2",
    }
    print("running swift rlhf (GRPO, colocated vLLM) ...", flush=True)
    run.start()
    if not record_file.is_file():
        print(run.log[-4000:], file=sys.stderr)
        raise SystemExit(f"the run ended with status {run.returncode} before it measured anything")
    record = json.loads(record_file.read_text())
    record.update(shape=shape, rank=args.rank, date=datetime.date.today().isoformat())
    return record


def summarize(record: dict[str, Any]) -> dict[str, float]:
    """Medians in seconds, and their ratio."""
    medians = {name: statistics.median(values) for name, values in record["seconds"].items()}
    pairs = [s / o for s, o in zip(record["seconds"]["stock"], record["seconds"]["ours"])]
    return {**medians, "ratio": statistics.median(pairs), "floor": record["floor_seconds"]}


def print_table(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    numbers = summarize(record)
    table = Table(
        title=f"One LoRA sync, {record['mode']} mode, {record['shape']} r={record['rank']}, {record['device']} "
        f"({record['date']})"
    )
    for column in ("", "median", "min", "max"):
        table.add_column(column, justify="left" if not column else "right")

    def row(name: str, values: list[float]) -> None:
        table.add_row(name, *(f"{1e3 * f(values):.3f} ms" for f in (statistics.median, min, max)))

    row(STOCK[record["mode"]], record["seconds"]["stock"])
    row(f"ours, {record['mode']} mode", record["seconds"]["ours"])
    for stage in STAGES:
        if all(f"{stage}_seconds" in part for part in record["parts"]):
            row(f"  {stage}", [part[f"{stage}_seconds"] for part in record["parts"]])
    table.add_row("bytes / bandwidth (floor)", f"{1e3 * numbers['floor']:.3f} ms", "", "")
    table.add_row("ratio, pair by pair", f"{numbers['ratio']:.1f}x", "", "")
    table.add_section()
    for name in ("stock", "ours"):
        table.add_row(f"trainer elements changed by {name}", f"{record['trainer_elements_changed'][name]:,}", "", "")
    console = Console()
    console.print(table)
    console.print(
        f"ms-swift {record['ms_swift']}, vLLM {record['vllm']}, torch {record['torch']}; {record['lora_parameters']:,} "
        f"LoRA parameters in {', '.join(record['lora_dtypes'])}, {record['bytes_read'] / 1e6:.0f} MB read and "
        f"{record['bytes_written'] / 1e6:.0f} MB written at {record['bandwidth'] / 1e12:.2f} TB/s; path "
        f"{record['parts'][-1]['path']}; "
        f"{record['kv_blocks']} KV cache blocks to reset; {memory_words(record)}. The trainer holds "
        f"{record['trainer_elements']:,} elements; those with other bits after a sync are counted over all "
        f"{len(record['parts'])} syncs, stock's in the base alone, which gets its own bits back each time."
    )


def memory_words(record: dict[str, Any]) -> str:
    """What our syncs took at most beside what was there, and the size of the largest adapted layer's weight."""
    peak = "not measured on a CPU" if record["device"] == "CPU" else f"{max(record['peak_extra_mib']):.1f} MiB"
    held, wide = (record[f"largest_layer_{name}"] / 2**20 for name in ("bytes", "float32_bytes"))
    return (
        f"extra device memory {peak} (the largest adapted layer: {held:.4g} MiB in the trainer, {wide:.4g} MiB "
        "in float32)"
    )


def save_chart(record: dict[str, Any], path: Path) -> None:
    numbers = summarize(record)
    with charts.chart(path, size=(8, 3.2), option="--chart") as (_, (axis,)):
        mode = record["mode"]
        names = [STOCK[mode], f"swift_lora_fix, {mode} mode", "floor (bytes / bandwidth)"]
        values = [1e3 * numbers["stock"], 1e3 * numbers["ours"], 1e3 * numbers["floor"]]
        bars = axis.barh(names, values, color=[charts.STOCK, charts.OURS, charts.QUIET])
        axis.bar_label(bars, [f"{value:.2f} ms" for value in values], padding=4)
        axis.set_xscale("log")
        axis.set_xlim(min(values) / 2, max(values) * 4)
        axis.invert_yaxis()
        axis.set_xlabel("median of one LoRA sync, ms (log scale)")
        times = f"{numbers['ratio']:.{0 if numbers['ratio'] >= 10 else 1}f} times faster"
        axis.set_title(f"{mode} mode, {record['shape']}, r={record['rank']}, {record['device']}: {times}")


def main() -> None:
    parser = command.arguments("bench_sync", __doc__)
    parser.add_argument(
        "--mode",
        choices=("adapter", "fused"),
        default="adapter",
        help="adapter: into vLLM's LoRA slots (default); fused: folded into the engine's weights, without LoRA layers",
    )
    parser.add_argument("--syncs", type=int, default=20, help="syncs of each kind (default 20)")
    command.run(parser.parse_args(), run_benchmark, print_table, save_chart)


if __name__ == "__main__":
    main()
