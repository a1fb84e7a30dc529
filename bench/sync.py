"""scripts/bench_sync: stock's sync and ours in turn, inside one real GRPO run, beside the machine's byte floor: of
ms-swift's, or of TRL's (--framework trl)."""

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
from tests.support import trl_driver
from tests.support.driver import Run, make_model

STAGES = (
    "check",
    "validate",
    "base",
    "plan",
    "read",
    "digest",
    "write",
    "caches",
    "wait",
)  # in their order; no run has all of them

STOCK = {  # by framework and mode
    ("swift", "adapter"): "stock _move_model_to_vllm",
    ("swift", "fused"): "stock, merged weights",
    ("trl", "adapter"): "stock sync_weights, merged weights",  # it has no other way
    ("trl", "fused"): "stock sync_weights, merged weights",
}
DEFAULT_MODE = {"swift": "adapter", "trl": "fused"}


def run_benchmark(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the model, run GRPO with the bench plugin, return its record."""
    import torch

    gpu = torch.cuda.is_available()
    args.mode = args.mode or DEFAULT_MODE[args.framework]
    shape = args.shape or ("qwen2-7b" if gpu else "qwen2")
    what = f"{args.mode} mode, model: {shape}, LoRA r={args.rank} on all linear layers, {args.syncs} syncs each"
    print(what, flush=True)
    model = args.model or make_model(Path(sys.executable), folder / "models", shape)
    record_file = folder / "bench.json"
    environment = {
        "SWIFT_LORA_FIX_MODE": args.mode,
        "SLF_BENCH_FILE": str(record_file),
        "SLF_BENCH_SYNCS": str(args.syncs),
        "SLF_BENCH_STEP": "2",
    }
    make = _of_trl if args.framework == "trl" else _of_swift
    run = make(args, folder, model, gpu, environment)
    print("running GRPO with a colocated vLLM engine ...", flush=True)
    run.start()
    if not record_file.is_file():
        print(run.log[-4000:], file=sys.stderr)
        raise SystemExit(f"the run ended with status {run.returncode} before it measured anything")
    record: dict[str, Any] = json.loads(record_file.read_text())
    record.update(shape=shape, rank=args.rank, date=datetime.date.today().isoformat())
    record["stock"] = STOCK[args.framework, args.mode]
    return record


def _of_trl(
    args: argparse.Namespace, folder: Path, model: Path, gpu: bool, environment: dict[str, str]
) -> trl_driver.Run:
    arguments = {"learning_rate": 1e-4, "save_steps": 100, "use_cpu": not gpu}
    if gpu:
        arguments |= {"vllm_gpu_memory_utilization": 0.2, "vllm_enable_sleep_mode": True}
    options = {
        "model": str(model),
        "fixed": True,
        "bench": str(PLUGINS / "slf_bench.py"),
        "lora": {"r": args.rank, "lora_alpha": 2 * args.rank},
        "arguments": arguments,
    }
    return trl_driver.Run(folder / "bench", options, environment)


def _of_swift(args: argparse.Namespace, folder: Path, model: Path, gpu: bool, environment: dict[str, str]) -> Run:
    run = Run("bench", Path(sys.executable), model, folder / "bench", fixed=True, gpu=gpu, probe=False)
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
    run.environment = environment
    return run


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

    row(record["stock"], record["seconds"]["stock"])
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
        f"{record['framework']}, vLLM {record['vllm']}, torch {record['torch']}; {record['lora_parameters']:,} "
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
        names = [record["stock"], f"swift_lora_fix, {mode} mode", "floor (bytes / bandwidth)"]
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
    parser.add_argument("--framework", choices=("swift", "trl"), default="swift", help="whose trainer (default swift)")
    parser.add_argument(
        "--mode",
        choices=("adapter", "fused"),
        help="adapter: into vLLM's LoRA slots (ms-swift's default); fused: folded into the engine's weights, without "
        "LoRA layers (TRL's)",
    )
    parser.add_argument("--syncs", type=int, default=20, help="syncs of each kind (default 20)")
    command.run(parser.parse_args(), run_benchmark, print_table, save_chart)


if __name__ == "__main__":
    main()
