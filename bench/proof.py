"""scripts/bench_proof: what the proof adds to a step of a real GRPO run, with the trainer's model offloaded or not.

The gate runs at every second sync, so that steps with and without it lie side by side in one run. By default it runs at
the first syncs and then at every 50th.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from bench import PLUGINS, command
from swift_lora_fix.common import charts
from swift_lora_fix.common.settings import Settings
from swift_lora_fix.looks import FIRST_SYNCS
from tests.support.driver import Run, this_python

OFFLOADS = {"offload_model": "true", "offload_optimizer": "true"}
SETTINGS: dict[str, dict[str, Any]] = {"the model stays": {}, "both offloads": OFFLOADS}
PARTS = ("audit", "base_audit", "gate")


def run_benchmark(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the model, run ``swift rlhf`` once for each setting. Record: ``runs``, by setting one line a step."""
    gpu, model, record = command.setting(args, folder, "qwen2-1.5b")
    record.update(mode=args.mode, runs={})
    for number, (setting, flags) in enumerate(SETTINGS.items()):
        print(f"running swift rlhf (GRPO, colocated vLLM), {setting} ...", flush=True)
        run = Run("proof", this_python(), model, folder / str(number), fixed=True, gpu=gpu, probe=False)
        run.last_plugins = (PLUGINS / "slf_bench_proof.py",)
        run.arguments = {
            "vllm_enable_lora": "true" if args.mode == "adapter" else "false",
            "lora_rank": args.rank,
            "lora_alpha": 2 * args.rank,
            "learning_rate": 1e-4,
            "max_steps": args.steps,
            "save_steps": args.steps + 1,
            "num_generations": args.batch,
            "per_device_train_batch_size": args.batch,
            "max_completion_length": args.tokens or (512 if gpu else 16),
            "max_length": 900,
            "vllm_max_model_len": 2048 if gpu else 1024,
            **flags,
            **({"sleep_level": 1} if flags and gpu else {}),  # vLLM does not sleep on a CPU
        }
        file = folder / f"{number}.jsonl"
        run.environment = {"SLF_BENCH_FILE": str(file), "SWIFT_LORA_FIX_GATE_EVERY": "2"}
        run.start()
        if run.returncode != 0:
            raise SystemExit(f"the run ended with status {run.returncode}:\n{run.log[-4000:]}")
        record["runs"][setting] = [json.loads(line) for line in file.read_text().splitlines()]
    return record


def summarize(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Medians in seconds over the steps after the first syncs, which also measure the noise of the plain base."""
    settled = [line for line in lines if line["step"] > FIRST_SYNCS]
    examined = [line for line in settled if line["examined"]]
    plain = [line for line in settled if not line["examined"]]
    if not examined or not plain:
        raise SystemExit(f"no steps of both kinds among {len(settled)}: more --steps")
    median = {name: statistics.median(line[name] for line in examined) for name in ("seconds", "sync", *PARTS)}
    every_step = statistics.median(line["audit"] + line["base_audit"] for line in plain)
    without = statistics.median(line["seconds"] for line in plain)
    proof = sum(median[part] for part in PARTS)
    by_default = every_step + (proof - every_step) / Settings.gate_every
    return {**median, "without": without, "every_step": every_step, "proof": proof, "by_default": by_default}


def print_table(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{record['shape']}, {record['mode']} mode, r={record['rank']}, {record['device']}: medians")
    rows = {
        "a step without the gate": "without",
        "a step with it": "seconds",
        "of which the gate": "gate",
        "of which the base's audit": "base_audit",
        "of which the adapter's audit": "audit",
        "audits in a step without the gate": "every_step",
        f"the proof a step, gate at every {Settings.gate_every}th sync (the default)": "by_default",
        "the sync": "sync",
    }
    found = {setting: summarize(lines) for setting, lines in record["runs"].items()}
    table.add_column("seconds")
    for setting in found:
        table.add_column(setting, justify="right")
    for title, name in rows.items():
        table.add_row(title, *(f"{numbers[name]:.4f}" for numbers in found.values()))
    shares = (f"{numbers['by_default'] / numbers['without']:.2%}" for numbers in found.values())
    table.add_row("the proof's share of a step, by default", *shares)
    Console(width=120).print(table)


def save_chart(record: dict[str, Any], path: Path) -> None:
    """A bar for each setting and kind of step, the proof's part of it marked."""
    found = {setting: summarize(lines) for setting, lines in record["runs"].items()}
    with charts.chart(path, size=(8, 1 + 0.8 * len(found) * 2), option="--chart") as (_, (axis,)):
        for setting, numbers in found.items():
            for kind, total, part in (("with the gate", "seconds", "proof"), ("without", "without", "every_step")):
                step, proof, name = numbers[total], numbers[part], f"{setting}, {kind}"
                axis.barh(name, step - proof, color=charts.QUIET)
                bars = axis.barh(name, proof, left=step - proof, color=charts.OURS)
                axis.bar_label(bars, [f"{step:.2f} s, of which proof {proof:.3f}"], padding=4)
        axis.margins(x=0.35)
        axis.invert_yaxis()
        axis.set_xlabel("median of a training step, s (blue: the proof)")
        axis.set_title(f"{record['shape']}, {record['mode']} mode, r={record['rank']}, {record['device']}")


def main() -> None:
    parser = command.arguments("bench_proof", __doc__)
    parser.add_argument("--mode", choices=("adapter", "fused"), default="adapter")
    parser.add_argument("--steps", type=int, default=14, help="training steps of each run (default 14)")
    parser.add_argument("--batch", type=int, default=8, help="completions a step (default 8)")
    parser.add_argument("--tokens", type=int, help="new tokens a completion (default 512; 16 on a CPU)")
    command.run(parser.parse_args(), run_benchmark, print_table, save_chart)


if __name__ == "__main__":
    main()
