"""scripts/bench_generate: how fast the run's own vLLM engine generates, by what it serves, inside one real GRPO run.

adapter: plain weights and vLLM's LoRA kernels. fused: the adapter folded into the weights. base: the plain weights.
"""

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

PROMPT_TOKENS = 64
ENGINES = {"lora": "engine with LoRA layers", "plain": "engine without LoRA layers"}
COLOURS = {"adapter": charts.STOCK, "fused": charts.OURS, "base": charts.QUIET}


def run_benchmark(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the model, run ``swift rlhf`` with the bench plugin once for each engine, return the record of both.

    ``engines``: by engine what the plugin wrote; ``tokens_per_second`` in it by way and batch size, one a round.
    """
    import torch

    gpu = torch.cuda.is_available()
    python = Path(sys.executable)
    shape = args.shape or (args.model.name if args.model else "qwen2-7b" if gpu else "qwen2")
    tokens = args.tokens or (256 if gpu else 16)
    batches = ", ".join(map(str, args.batches))
    what = f"LoRA r={args.rank} on all linear layers, batches of {batches}, {args.rounds} rounds"
    print(f"model: {shape}, {what}", flush=True)
    model = args.model.resolve() if args.model else make_model(python, folder / "models", shape)
    record: dict[str, Any] = {
        "shape": shape,
        "rank": args.rank,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": tokens,
        "date": datetime.date.today().isoformat(),
        "engines": {},
    }
    for engine in ENGINES if args.plain_engine else ["lora"]:
        print(f"running swift rlhf (GRPO, colocated vLLM), {ENGINES[engine]} ...", flush=True)
        record["engines"][engine] = _measure(engine, _run(args, engine, tokens, model, folder / engine, gpu))
    return record


def _run(args: argparse.Namespace, engine: str, tokens: int, model: Path, folder: Path, gpu: bool) -> Run:
    run = Run(f"generate-{engine}", Path(sys.executable), model, folder, fixed=True, gpu=gpu, probe=False)
    run.last_plugins = (PLUGINS / "slf_bench_generate.py",)
    run.arguments = {
        "vllm_enable_lora": "true" if engine == "lora" else "false",
        "vllm_enforce_eager": "false" if gpu else "true",  # CUDA graphs, as in production
        "vllm_max_num_seqs": max(args.batches),
        "vllm_max_model_len": max(256, PROMPT_TOKENS + tokens),
        "lora_rank": args.rank,
        "lora_alpha": 2 * args.rank,
        "learning_rate": 1e-4,
        "max_steps": 4,
        "save_steps": 100,
    }
    run.environment = {
        "SWIFT_LORA_FIX_MODE": "adapter" if engine == "lora" else "fused",
        "SLF_BENCH_FILE": str(folder / "bench.json"),
        "SLF_BENCH_STEP": "2",
        "SLF_BENCH_PROMPT": str(PROMPT_TOKENS),
        "SLF_BENCH_TOKENS": str(tokens),
        "SLF_BENCH_ROUNDS": str(args.rounds),
        "SLF_BENCH_BATCHES": " ".join(map(str, args.batches)),
    }
    return run


def _measure(engine: str, run: Run) -> dict[str, Any]:
    record_file = Path(run.environment["SLF_BENCH_FILE"])
    record_file.unlink(missing_ok=True)
    run.start()
    if not record_file.is_file():
        print(run.log[-4000:], file=sys.stderr)
        raise SystemExit(f"{ENGINES[engine]}: the run ended with status {run.returncode} before it measured anything")
    return json.loads(record_file.read_text())


def ratio(rates: dict[str, dict[str, list[float]]], way: str, batch: str) -> float:
    """Of the way's tokens a second to those of the plain weights: the median over the rounds."""
    return statistics.median(one / base for one, base in zip(rates[way][batch], rates["base"][batch]))


def print_table(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    any_engine = next(iter(record["engines"].values()))
    table = Table(
        title=f"Generation, output tokens a second, {record['shape']} r={record['rank']}, {any_engine['device']} "
        f"({record['date']})"
    )
    for column in ("", "batch", "median", "min", "max", "way / base"):
        table.add_column(column, justify="left" if not column else "right")
    for engine, measured in record["engines"].items():
        table.add_section()
        table.add_row(f"[bold]{ENGINES[engine]}")
        rates = measured["tokens_per_second"]
        for batch in rates["base"]:
            for way in rates:
                numbers = (f"{f(rates[way][batch]):,.0f}" for f in (statistics.median, min, max))
                table.add_row(f"  {way}", batch, *numbers, "" if way == "base" else f"{ratio(rates, way, batch):.3f}")
    console = Console()
    console.print(table)
    console.print(
        f"ms-swift {any_engine['ms_swift']}, vLLM {any_engine['vllm']}, torch {any_engine['torch']}; "
        f"{record['prompt_tokens']} prompt tokens and {record['new_tokens']} new ones a request, EOS ignored, prefill "
        "included; way / base is the median over the rounds."
    )
    for engine, measured in record["engines"].items():
        gaps = ", ".join(f"{pair} {gap:.4f}" for pair, gap in measured["gaps"].items())
        graphs = "no CUDA graphs" if measured["enforce_eager"] else "CUDA graphs"
        apart = {True: ", those without LoRA of their own", False: ", the same with and without LoRA"}
        special = apart.get(measured["specialize_lora"], "") if engine == "lora" and graphs == "CUDA graphs" else ""
        console.print(
            f"{ENGINES[engine]}: {graphs}{special}; weights written by way of {measured['path']}; mean |logprob "
            f"difference| in nats a token: {gaps}."
        )


def save_chart(record: dict[str, Any], path: Path) -> None:
    engines = record["engines"]
    size = (1 + 5.5 * len(engines), 4.2)
    with charts.chart(path, size=size, columns=len(engines), sharey=True, option="--chart") as (figure, axes):
        for axis, (engine, measured) in zip(axes, engines.items()):
            rates = measured["tokens_per_second"]
            width = 0.8 / len(rates)
            for number, way in enumerate(rates):
                batches = rates[way]
                medians = [statistics.median(values) for values in batches.values()]
                spread = [
                    [median - min(values) for median, values in zip(medians, batches.values())],
                    [max(values) - median for median, values in zip(medians, batches.values())],
                ]
                places = [place + width * (number - (len(rates) - 1) / 2) for place in range(len(batches))]
                look = {"color": COLOURS[way], "label": way, "capsize": 3, "error_kw": {"lw": 1}}
                bars = axis.bar(places, medians, 0.92 * width, yerr=spread, **look)
                labels = ["" if way == "base" else f"{ratio(rates, way, batch):.3f}" for batch in batches]
                axis.bar_label(bars, labels, padding=3, fontsize=9)
            axis.set_xticks(range(len(rates["base"])), list(rates["base"]))
            axis.set_xlabel("batch size")
            axis.set_title(ENGINES[engine], fontsize=11)
            axis.margins(y=0.12)
        axes[0].set_ylabel("output tokens / s, median (whiskers: min to max)")
        axes[0].legend(title="number: way / base", loc="upper left")
        what = f"{record['shape']}, r={record['rank']}, {record['new_tokens']} new tokens"
        figure.suptitle(f"Generation, {what}, {next(iter(engines.values()))['device']}")


def main() -> None:
    parser = command.arguments("bench_generate", __doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64, 128], help="batch sizes (default 8 64 128)")
    parser.add_argument("--tokens", type=int, help="new tokens a request (default 256, on a CPU 16)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default 3), after one warm-up")
    parser.add_argument(
        "--plain-engine", action="store_true", help="a second run, whose engine has no LoRA layers: fused and base"
    )
    command.run(parser.parse_args(), run_benchmark, print_table, save_chart)


if __name__ == "__main__":
    main()
