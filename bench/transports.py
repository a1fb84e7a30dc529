"""scripts/bench_transports: in server mode, stock's sync and ours by each transport in turn, in one real GRPO run."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import PLUGINS, command
from swift_lora_fix.common import charts
from tests.support.driver import REPOSITORY, make_model
from tests.support.rollout_server import RolloutServer, running
from tests.support.server_runs import trainer

WAYS = {
    "stock": ("stock, NCCL", charts.STOCK),
    "nccl": ("ours, NCCL", charts.OURS),
    "reload, memory": ("ours, shared memory", charts.GREEN),
    "reload, body": ("ours, request body", charts.VIOLET),
}


def run_benchmark(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Start ``swift rollout``, run ``swift rlhf`` with the bench plugin, return its record.

    With two GPUs the server has the second one. With one they share it: NCCL cannot join two processes of one GPU, so
    that stock's way and ours over NCCL are left out.
    """
    devices = gpus()
    python, shape = Path(sys.executable), args.shape or ("qwen2-7b" if devices else "qwen2")
    print(f"server mode, model: {shape}, LoRA r={args.rank} on all linear layers, {args.syncs} syncs each", flush=True)
    model = args.model or make_model(python, folder / "models", shape)
    is_shared = len(devices) == 1
    if is_shared:
        print("one GPU, which trainer and server share: without NCCL, and so without stock's way", flush=True)
    environment = {"SWIFT_LORA_FIX_TRANSPORT": "reload" if is_shared else "", **({} if devices else without_nccl())}
    with serving(model, folder, environment, args, devices) as server:
        visible = {"CUDA_VISIBLE_DEVICES": devices[0]} if devices else {}
        run = trainer("bench", model, folder, [server], {**environment, **visible})
        run.probe, run.last_plugins = False, (PLUGINS / "slf_bench_transports.py",)
        run.arguments.update(lora_rank=args.rank, lora_alpha=2 * args.rank, learning_rate=1e-4, save_steps=100)
        record_file = folder / "bench.json"
        run.environment.update(SLF_BENCH_FILE=str(record_file), SLF_BENCH_SYNCS=str(args.syncs), SLF_BENCH_STEP="2")
        print("running swift rollout and swift rlhf (GRPO) ...", flush=True)
        run.start()
        if not record_file.is_file():
            print(run.log[-4000:], server.log[-4000:], file=sys.stderr)
            raise SystemExit(f"the run ended with status {run.returncode} before it measured anything")
    record: dict[str, Any] = json.loads(record_file.read_text())
    record.update(shape=shape, rank=args.rank, engine=args.engine, date=datetime.date.today().isoformat())
    record["gpus"] = min(2, len(devices))
    return record


def gpus() -> list[str]:
    """The GPUs of this host as CUDA_VISIBLE_DEVICES names them; of those that it lists, if it is set."""
    import torch

    listed = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return listed[: torch.cuda.device_count()] or [str(index) for index in range(torch.cuda.device_count())]


def without_nccl() -> dict[str, str]:
    """On the CPU the wire is a stand-in, which says nothing about NCCL's speed."""
    stand_in = REPOSITORY / "tests" / "support" / "nccl_over_store"
    return {"PYTHONPATH": os.pathsep.join([str(stand_in), os.environ.get("PYTHONPATH", "")])}


@contextlib.contextmanager
def serving(
    model: Path, folder: Path, environment: dict[str, str], args: argparse.Namespace, devices: list[str]
) -> Iterator[RolloutServer]:
    arguments = {"vllm_max_lora_rank": args.rank, "vllm_use_async_engine": str(args.engine == "async").lower()}
    if devices:
        share = 0.7 if len(devices) > 1 else 0.4
        arguments.update(vllm_enforce_eager="false", vllm_gpu_memory_utilization=share)
        environment = {**environment, "CUDA_VISIBLE_DEVICES": devices[:2][-1]}
    server = RolloutServer(model, folder / "server", arguments, environment, gpu=bool(devices))
    with running([server]):
        yield server


def summarize(record: dict[str, Any]) -> dict[str, float]:
    """Medians in seconds, by way."""
    return {name: statistics.median(values) for name, values in record["seconds"].items()}


def print_table(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"One LoRA sync to a rollout server ({record['engine']} engine), {record['shape']} r={record['rank']}, "
        f"{devices_of(record)} ({record['date']})"
    )
    for column in ("", "median", "min", "max", "stock / it", "extra MiB"):
        table.add_column(column, justify="left" if not column else "right")
    stock = record["seconds"].get("stock")
    for name, values in record["seconds"].items():
        ratio = f"{statistics.median(s / o for s, o in zip(stock, values)):.2f}" if stock else ""
        times = [f"{1e3 * f(values):.2f} ms" for f in (statistics.median, min, max)]
        table.add_row(WAYS[name][0], *times, ratio, f"{max(record['peak_extra_mib'][name]):.0f}")
        for stage in ("read", "stage", "commit"):
            parts = [1e3 * part[f"{stage}_seconds"] for part in record["parts"].get(name, ())]
            if parts:
                table.add_row(f"  {stage}", f"{statistics.median(parts):.2f} ms", "", "", "", "")
    console = Console()
    console.print(table)
    console.print(
        f"ms-swift {record['ms_swift']}, vLLM {record['vllm']}, torch {record['torch']}; "
        f"{record['adapter_bytes'] / 1e6:.0f} MB an adapter. read: the adapter put into one buffer, and its "
        "digest; stage: sent to the server and checked there; commit: switched to, read back, caches reset."
        + (" Stock's includes the cache resets, too, which wait for the adapter." if stock else "")
    )


def devices_of(record: dict[str, Any]) -> str:
    shared = ", shared by trainer and server" if record["gpus"] == 1 else ""
    return f"{record['device']}{shared}"


def save_chart(record: dict[str, Any], path: Path) -> None:
    numbers = summarize(record)
    with charts.chart(path, size=(8, 2.8), option="--chart") as (_, (axis,)):
        values = [1e3 * seconds for seconds in numbers.values()]
        bars = axis.barh([WAYS[name][0] for name in numbers], values, color=[WAYS[name][1] for name in numbers])
        axis.bar_label(bars, [f"{value:.1f} ms" for value in values], padding=4)
        axis.set_xlim(0, max(values) * 1.15)
        axis.invert_yaxis()
        axis.set_xlabel("median of one LoRA sync to a rollout server, ms")
        axis.set_title(f"server mode, {record['shape']}, r={record['rank']}, {devices_of(record)}")


def main() -> None:
    parser = command.arguments("bench_transports", __doc__)
    parser.add_argument("--engine", choices=("sync", "async"), default="sync", help="the server's (default sync)")
    parser.add_argument("--syncs", type=int, default=20, help="syncs of each kind (default 20)")
    command.run(parser.parse_args(), run_benchmark, print_table, save_chart)


if __name__ == "__main__":
    main()
