"""scripts/bench_kernels: how fast vLLM generates with one LoRA adapter, by who computes it.

One engine a way, all at once on one device, and asked in turn, so that each round compares them under the same
conditions.

plain: an engine without LoRA layers, the base alone. vllm: vLLM's LoRA kernels. dual: the same with
VLLM_LORA_ENABLE_DUAL_STREAM=1. dense: this package's dense layers. Weights and adapter are random.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import command
from swift_lora_fix.common import charts
from tests.support.tiny import REAL_KV_HEADS, REAL_SHAPES, REAL_VOCABULARY

PROMPT_TOKENS = 64
WAYS: dict[str, dict[str, str]] = {
    "plain": {"SWIFT_LORA_FIX_KERNELS": "vllm"},
    "vllm": {"SWIFT_LORA_FIX_KERNELS": "vllm"},
    "dual": {"SWIFT_LORA_FIX_KERNELS": "vllm", "VLLM_LORA_ENABLE_DUAL_STREAM": "1"},
    "dense": {"SWIFT_LORA_FIX_KERNELS": "dense"},
}
TINY = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
SHAPES: dict[str, dict[str, Any]] = {**REAL_SHAPES, "tiny": TINY}
KEY_VALUE_HEADS = {**REAL_KV_HEADS, "tiny": 2}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---- one engine, in a process of its own ---------------------------------------------------------------------------


def worker(args: argparse.Namespace) -> None:
    """Build the engine, then answer each line of standard input (batch, new tokens) by seconds, on ``args.answers``."""
    answers = os.fdopen(args.answers, "w", buffering=1)
    logging.basicConfig(level=logging.INFO)
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    import swift_lora_fix  # noqa: F401  arms the dense layers

    gpu = torch.cuda.is_available()
    if not gpu:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support" / "plugins"))
        import slf_cpu_shims  # noqa: F401
    lora = dict(enable_lora=True, max_loras=1, max_lora_rank=args.rank) if args.way != "plain" else {}
    # a fixed cache, so that the engines may start side by side
    memory = {"kv_cache_memory_bytes": args.cache << 30, "gpu_memory_utilization": 0.05} if gpu else {}
    llm = LLM(
        str(args.folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=max(args.batches),
        enable_prefix_caching=False,
        enforce_eager=args.eager,
        seed=0,
        **memory,
        **lora,
    )
    request = LoRARequest("bench", 1, str(args.folder / f"adapter{args.rank}")) if lora else None
    generator = torch.Generator().manual_seed(0)
    answers.write(json.dumps({"ready": args.way}) + "\n")
    for line in sys.stdin:
        batch, tokens = json.loads(line)
        prompts = [
            {"prompt_token_ids": torch.randint(10, 500, (PROMPT_TOKENS,), generator=generator).tolist()}
            for _ in range(batch)
        ]
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=1.0, detokenize=False)
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, lora_request=request, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        answers.write(json.dumps({"seconds": seconds}) + "\n")


class Engine:
    """A worker process, and how to ask it."""

    def __init__(self, way: str, args: argparse.Namespace, folder: Path) -> None:
        self.way, self.log = way, folder / f"{way}.log"
        read, write = os.pipe()
        arguments = ["--worker", way, "--answers", str(write), "--rank", str(args.rank), "--cache", str(args.cache)]
        arguments += ["--folder", str(folder), "--batches", *map(str, args.batches)]
        environment = {
            **os.environ,
            **WAYS[way],
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_PLUGINS": "none",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # vLLM's compile cache does not know who computes the adapter
            "VLLM_CACHE_ROOT": str(folder / f"cache-{way}"),
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.kernels", *arguments, *(["--eager"] if args.eager else [])],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[write],
                env=environment,
                text=True,
            )
        os.close(write)
        self.answers = os.fdopen(read)

    def answer(self) -> dict[str, Any]:
        line = self.answers.readline()
        if not line:
            raise SystemExit(f"{self.way}: the engine ended:\n{self.log.read_text()[-4000:]}")
        return json.loads(line)

    def seconds(self, batch: int, tokens: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([batch, tokens]) + "\n")
        self.process.stdin.flush()
        return float(self.answer()["seconds"])

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


# ---- all of them ---------------------------------------------------------------------------------------------------


def make_model(folder: Path, shape: str, rank: int, device: str) -> None:
    """The config of the shape, without weights, and a random adapter on all linear layers."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    sizes = SHAPES[shape]
    heads = KEY_VALUE_HEADS[shape]
    config = {
        **sizes,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_key_value_heads": heads,
        "vocab_size": 512 if shape == "tiny" else REAL_VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    hidden, middle = sizes["hidden_size"], sizes["intermediate_size"]
    narrow = hidden // sizes["num_attention_heads"] * heads
    shapes = dict(zip(PROJECTIONS, [(hidden, hidden), (narrow, hidden), (narrow, hidden), (hidden, hidden)]))
    shapes.update(gate_proj=(middle, hidden), up_proj=(middle, hidden), down_proj=(hidden, middle))
    values = {}
    for layer in range(sizes["num_hidden_layers"]):
        for name, (outputs, inputs) in shapes.items():
            group = "self_attn" if name in PROJECTIONS[:4] else "mlp"
            key = f"base_model.model.model.layers.{layer}.{group}.{name}.lora_"
            values[f"{key}A.weight"] = (torch.randn(rank, inputs, device=device) * 0.02).bfloat16().cpu()
            values[f"{key}B.weight"] = (torch.randn(outputs, rank, device=device) * 0.02).bfloat16().cpu()
    adapter = folder / f"adapter{rank}"
    adapter.mkdir(exist_ok=True)
    save_file(values, adapter / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(PROJECTIONS),
        "bias": "none",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(described))


def run_benchmark(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build the engines side by side, measure them in turn. ``tokens_per_second``: by way and batch, one a round."""
    import torch
    import vllm

    gpu = torch.cuda.is_available()
    shape = args.shape or ("qwen2-7b" if gpu else "tiny")
    tokens = args.tokens or (256 if gpu else 16)
    args.eager = args.eager or not gpu
    make_model(folder, shape, args.rank, "cuda" if gpu else "cpu")
    print(f"{shape}, r={args.rank}: starting {', '.join(args.ways)} ...", flush=True)
    start = time.monotonic()
    engines = [Engine(way, args, folder) for way in args.ways]
    rates: dict[str, dict[str, list[float]]] = {way: {str(b): [] for b in args.batches} for way in args.ways}
    try:
        for engine in engines:
            engine.answer()
        print(f"all ready after {time.monotonic() - start:.0f} s", flush=True)
        for engine in engines:
            for batch in args.batches:
                engine.seconds(batch, 16)
        for number in range(args.rounds):
            for batch in args.batches:
                for engine in engines if number % 2 else reversed(engines):
                    rates[engine.way][str(batch)].append(batch * tokens / engine.seconds(batch, tokens))
            print(f"round {number + 1} of {args.rounds} after {time.monotonic() - start:.0f} s", flush=True)
    finally:
        for engine in engines:
            engine.stop()
    said = [line for line in (folder / "dense.log").read_text().splitlines() if "dense LoRA layers" in line]
    return {
        "shape": shape,
        "rank": args.rank,
        "new_tokens": tokens,
        "prompt_tokens": PROMPT_TOKENS,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "enforce_eager": args.eager,
        "said": said[:1],
        "tokens_per_second": rates,
    }


def share(record: dict[str, Any], way: str, batch: str) -> float:
    """Of the way's tokens a second in the plain base's: the median over the rounds."""
    rates = record["tokens_per_second"]
    return statistics.median(one / plain for one, plain in zip(rates[way][batch], rates["plain"][batch]))


def print_table(record: dict[str, Any]) -> None:
    rates = record["tokens_per_second"]
    graphs = "no CUDA graphs" if record["enforce_eager"] else "CUDA graphs"
    print(
        f"{record['shape']} r={record['rank']}, {record['device']}, vLLM {record['vllm']}, torch {record['torch']}, "
        f"{graphs} ({record['date']}); output tokens a second, median of {len(next(iter(rates['plain'].values())))} "
        f"rounds, in brackets the share of plain; {record['prompt_tokens']} prompt tokens and {record['new_tokens']} "
        "new ones a request, prefill included"
    )
    print(" | ".join(["batch", *rates]))
    for batch in rates["plain"]:
        cells = [f"{statistics.median(rates[way][batch]):,.0f} ({share(record, way, batch):.3f})" for way in rates]
        print(" | ".join([batch, *cells]))


def save_chart(record: dict[str, Any], path: Path) -> None:
    rates = record["tokens_per_second"]
    with charts.chart(path, size=(7, 4.2), option="--chart") as (_, (axis,)):
        ways = [way for way in rates if way != "plain"]
        width = 0.8 / len(ways)
        for number, way in enumerate(ways):
            places = [place + width * (number - (len(ways) - 1) / 2) for place in range(len(rates[way]))]
            shares = [share(record, way, batch) for batch in rates[way]]
            bars = axis.bar(places, shares, 0.92 * width, label=way, color=charts.OURS if way == "dense" else None)
            axis.bar_label(bars, [f"{value:.3f}" for value in shares], padding=2, fontsize=8)
        axis.axhline(1, color=charts.QUIET, lw=1)
        axis.set_xticks(range(len(rates["plain"])), list(rates["plain"]))
        axis.set_xlabel("batch size")
        axis.set_ylabel("output tokens / s, share of the plain base")
        axis.legend(loc="lower left")
        axis.set_title(f"One adapter, {record['shape']} r={record['rank']}, {record['device']}", fontsize=11)


def main() -> None:
    parser = command.arguments("bench_kernels", (__doc__ or "").splitlines()[0])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64, 128, 256])
    parser.add_argument("--tokens", type=int, help="new tokens a request (default 256, on a CPU 16)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=int, default=6, help="GiB of KV cache an engine")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--worker", dest="way", help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        worker(args)
    else:
        command.run(args, run_benchmark, print_table, save_chart)


if __name__ == "__main__":
    main()
