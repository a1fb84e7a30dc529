"""scripts/bench_step: a whole step of a real GRPO run by its parts, stock ms-swift's and ours.

One run a way, one after the other on the same device. The run sleeps between rollouts (level 1) on a GPU. Left out are
the first steps, of which the gate looks at every sync, and later ones in which it looked (of updates that are too small
for the noise, it asks again after 1, 2, 4, ... syncs): by default it looks at every 50th. scripts/bench_proof times it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from bench import PLUGINS, command
from swift_lora_fix.common import charts
from swift_lora_fix.looks import FIRST_SYNCS
from tests.support.driver import Run, this_python


class Way(NamedTuple):
    """ours: with the plugin. lora: the engine has LoRA layers. kernels: who computes them."""

    ours: bool
    lora: bool
    kernels: str = ""


WAYS = {
    "stock": Way(False, True),
    "vllm": Way(True, True, "vllm"),
    "dense": Way(True, True, "dense"),
    "stock-merged": Way(False, False),
    "fused": Way(True, False),
}
WORDS = {
    "stock": "stock, LoRA layers",
    "vllm": "ours, vLLM's LoRA kernels",
    "dense": "ours, dense LoRA layers",
    "stock-merged": "stock, merged weights",
    "fused": "ours, fused mode",
}
PARTS = ("sync", "generation", "rest")
LOOKED_AT = FIRST_SYNCS + 1  # the engine's first sleep, in step 1, begins the first syncs anew


def run_benchmark(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the model, run ``swift rlhf`` once a way. Record: ``runs``, by way one line a step, in seconds."""
    gpu, model, record = command.setting(args, folder, "qwen2-7b")
    tokens = args.tokens or (512 if gpu else 16)
    record.update(batch=args.batch, tokens=tokens, runs={}, gate={})
    for name in args.ways:
        way = WAYS[name]
        print(f"running swift rlhf (GRPO, colocated vLLM): {WORDS[name]} ...", flush=True)
        run = Run(name, this_python(), model, folder / name, fixed=way.ours, gpu=gpu, probe=False)
        run.last_plugins = (PLUGINS / "slf_bench_parts.py",)
        run.arguments = {
            "vllm_enable_lora": str(way.lora).lower(),
            "lora_rank": args.rank,
            "lora_alpha": 2 * args.rank,
            "learning_rate": 1e-4,
            **({"lora_dtype": args.lora_dtype} if args.lora_dtype else {}),
            "max_steps": args.steps,
            "save_steps": args.steps + 1,
            "num_generations": min(8, args.batch),
            "per_device_train_batch_size": min(8, args.batch),
            "gradient_accumulation_steps": max(1, args.batch // 8),
            "max_completion_length": tokens,
            "max_length": 900,
            "vllm_max_model_len": 2048 if gpu else 1024,
            "vllm_max_num_seqs": args.batch,
            "vllm_enforce_eager": str(args.eager or not gpu).lower(),
            **({"sleep_level": 1} if gpu else {}),  # vLLM does not sleep on a CPU
        }
        file = folder / f"{name}.jsonl"
        # vLLM's compile cache does not know who computes the adapter
        run.environment = {"SLF_BENCH_FILE": str(file), "VLLM_CACHE_ROOT": str(folder / f"cache-{name}")}
        run.environment.update({"SWIFT_LORA_FIX_KERNELS": way.kernels} if way.kernels else {})
        run.start()
        if run.returncode != 0:
            raise SystemExit(f"the run ended with status {run.returncode}:\n{run.log[-4000:]}")
        record["runs"][name] = [json.loads(line) for line in file.read_text().splitlines()]
        record["gate"][name] = run.log.count("engine and trainer agree at step")
    return record


def summarize(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Medians in seconds over the steps that the gate leaves alone. The rest is taken step by step, too."""
    settled = [line for line in lines if line["step"] > LOOKED_AT and not line["examined"]]
    if not settled:
        raise SystemExit(f"the gate looked at each of {len(lines)} steps after the first {LOOKED_AT}: more --steps")
    for line in settled:
        line["rest"] = line["seconds"] - line["sync"] - line["generation"]
    return {part: statistics.median(line[part] for line in settled) for part in ("seconds", *PARTS)}


def print_table(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    found = {name: summarize(lines) for name, lines in record["runs"].items()}
    first = next(iter(found.values()))["seconds"]
    title = f"{record['shape']}, r={record['rank']}, {record['batch']} completions of {record['tokens']} tokens"
    table = Table(title=f"{title}, {record['device']} ({record['date']}): a step, medians in seconds")
    for column in ("", *PARTS, "step", "of the first", "gate passed"):
        table.add_column(column, justify="left" if not column else "right")
    for name, numbers in found.items():
        parts = (f"{numbers[part]:.4f}" for part in (*PARTS, "seconds"))
        table.add_row(WORDS[name], *parts, f"{numbers['seconds'] / first:.3f}", str(record["gate"][name] or ""))
    Console(width=140).print(table)


def save_chart(record: dict[str, Any], path: Path) -> None:
    """A bar a way, its parts in a row."""
    found = {name: summarize(lines) for name, lines in record["runs"].items()}
    with charts.chart(path, size=(8, 1 + 0.6 * len(found)), option="--chart") as (_, (axis,)):
        left = [0.0] * len(found)
        for part, colour in zip(PARTS, (charts.STOCK, charts.OURS, charts.QUIET)):
            values = [numbers[part] for numbers in found.values()]
            axis.barh([WORDS[name] for name in found], values, left=left, color=colour, label=part)
            left = [start + value for start, value in zip(left, values)]
        axis.invert_yaxis()
        axis.legend(loc="lower right")
        axis.set_xlabel("median of a GRPO step, s")
        axis.set_title(f"{record['shape']}, r={record['rank']}, {record['device']}")


def main() -> None:
    parser = command.arguments("bench_step", __doc__)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["stock", "vllm", "dense"], help="which runs")
    parser.add_argument("--steps", type=int, default=9, help="training steps of each run (default 9)")
    parser.add_argument("--batch", type=int, default=64, help="completions a step, 8 or a multiple (default 64)")
    parser.add_argument("--tokens", type=int, help="new tokens a completion (default 512; 16 on a CPU)")
    parser.add_argument("--lora-dtype", help="ms-swift's --lora_dtype: stock casts the LoRA to bfloat16 as it syncs")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    command.run(parser.parse_args(), run_benchmark, print_table, save_chart)


if __name__ == "__main__":
    main()
