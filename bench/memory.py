"""scripts/bench_memory: an adapter into vLLM as a folder on disk, as a folder in /dev/shm, and from memory, in turn.

Each round gives the engine a new policy under the same id and waits until it is loaded. Peak memory is what the round
adds, over all processes: anonymous memory (RssAnon) and the bytes in /dev/shm or in open segments, sampled.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_PLUGINS", "swift_lora_fix")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
SHAPES = {"tiny": (128, 256, 4, 2), "1.5b": (1536, 8960, 12, 2), "7b": (3584, 18944, 28, 4)}
VOCABULARY = 512


def make_model(shape: str, layers: int, folder: Path) -> Path:
    """A Qwen2 config with its tokenizer; vLLM makes up the weights (load_format='dummy')."""
    from transformers import Qwen2Config

    from tests.support.tiny import make_tokenizer

    hidden, intermediate, heads, kv_heads = SHAPES[shape]
    folder.mkdir(parents=True)
    make_tokenizer(folder)
    Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
        torch_dtype="bfloat16",
    ).save_pretrained(folder)
    return folder


def make_adapter(shape: str, layers: int, rank: int, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """PEFT's config and tensors for all linear layers, A (r, in), B (out, r)."""
    import torch

    hidden, intermediate, heads, kv_heads = SHAPES[shape]
    kv = hidden // heads * kv_heads
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }
    tensors = {}
    for layer in range(layers):
        for name, (inside, outside) in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inside).to(getattr(torch, dtype)) * 0.02
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(outside, rank).to(getattr(torch, dtype)) * 0.02
    targets = sorted({name.split(".")[1] for name in sizes})
    return {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}, tensors


def by_folder(engine: Any, folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """What a program does without this package: PEFT's two files, and vLLM reads them."""
    from safetensors.torch import save_file
    from vllm.lora.request import LoRARequest

    folder.mkdir(exist_ok=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    engine.add_lora(LoRARequest("policy", 1, str(folder), load_inplace=True))
    shutil.rmtree(folder)


def by_memory(engine: Any, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    from swift_lora_fix.memory import LoRATensorRequest

    engine.add_lora(LoRATensorRequest("policy", 1, config, tensors, load_inplace=True))


def by_update(engine: Any, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    from swift_lora_fix.memory import LoRATensorRequest, update

    update(engine, LoRATensorRequest("policy", 2, config, tensors))


class Peak:
    """The most memory that a block adds, in bytes; ``shared`` folders count as memory."""

    def __init__(self, shared: Path) -> None:
        from tests.support.memory import family

        self.pids, self.shared, self.added = family(), shared, 0

    def measure(self) -> int:
        total = 0
        for pid in self.pids:
            with contextlib.suppress(OSError, IndexError):
                total += 1024 * int(Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()[0])
        with contextlib.suppress(OSError):
            total += sum(file.stat().st_blocks * 512 for file in self.shared.rglob("*"))
        return total + sum(self._segments().values())

    @staticmethod
    def _segments() -> dict[int, int]:
        found = {}
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:swift-lora-fix"):
                    status = os.stat(f"/proc/self/fd/{name}")
                    found[status.st_ino] = status.st_blocks * 512
        return found

    def __enter__(self) -> Peak:
        self.base, self.running = self.measure(), True
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.running = False
        self.thread.join()

    def _sample(self) -> None:
        while self.running:
            self.added = max(self.added, self.measure() - self.base)
            time.sleep(0.005)


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch
    from vllm import LLM

    import swift_lora_fix.memory  # noqa: F401  installs the hooks

    config, tensors = make_adapter(args.shape, args.layers, args.rank, args.dtype)
    llm = LLM(
        str(make_model(args.shape, args.layers, folder / "model")),
        load_format="dummy",
        dtype="bfloat16",
        enable_lora=True,
        max_loras=2,
        max_lora_rank=args.rank,
        tensor_parallel_size=args.tensor_parallel,
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
    )
    engine = llm.llm_engine
    shm = Path(tempfile.mkdtemp(prefix="bench_memory-", dir="/dev/shm"))
    ways = {
        "folder on disk": lambda: by_folder(engine, folder / "adapter", config, tensors),
        "folder in /dev/shm": lambda: by_folder(engine, shm / "adapter", config, tensors),
        "memory": lambda: by_memory(engine, config, tensors),
    }
    if args.in_process:
        ways["update, worker in this process"] = lambda: by_update(engine, config, tensors)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    added: dict[str, list[float]] = {name: [] for name in ways}
    try:
        for round_ in range(-2, 2 * args.rounds):  # two to warm up; time and memory are measured in turn
            for name, way in ways.items():
                next(iter(tensors.values()))[0, 0] += 0.5
                peak = Peak(shm)
                start = time.perf_counter()
                with peak if round_ % 2 else contextlib.nullcontext():
                    way()
                if round_ >= 0 and round_ % 2:
                    added[name].append(peak.added / 2**20)
                elif round_ >= 0:
                    seconds[name].append(time.perf_counter() - start)
    finally:
        shutil.rmtree(shm, ignore_errors=True)
    from swift_lora_fix.install import releases

    return {
        "date": datetime.date.today().isoformat(),
        "shape": f"{args.shape}, {args.layers} layers",
        "rank": args.rank,
        "dtype": args.dtype,
        "adapter_mib": sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20,
        "in_process": args.in_process,
        "tensor_parallel": args.tensor_parallel,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "vllm": releases.installed_vllm(),
        "seconds": seconds,
        "added_mib": added,
    }


def print_table(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    where = "in this process" if record["in_process"] else "in other processes"
    table = Table(title=f"One adapter of {record['adapter_mib']:.0f} MiB into vLLM {record['vllm']}, workers {where}")
    for column in ("", "median", "min", "max", "against memory", "memory added at the peak"):
        table.add_column(column, justify="left" if not column else "right")
    for name, values in record["seconds"].items():
        ratio = statistics.median(v / m for v, m in zip(values, record["seconds"]["memory"]))
        times = [f"{1e3 * f(values):.1f} ms" for f in (statistics.median, min, max)]
        added = statistics.median(record["added_mib"][name])
        share = f"{added:.0f} MiB ({added / record['adapter_mib']:.1f}x)"
        table.add_row(name, *times, f"{ratio:.2f}x", share)
    console = Console()
    console.print(table)
    console.print(
        f"{record['shape']}, r={record['rank']} on all linear layers, {record['dtype']}; {record['device']}, "
        f"tensor parallel {record['tensor_parallel']} ({record['date']}). Ratios round by round."
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench_memory", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b", help="layer sizes of Qwen2.5 (default 1.5b)")
    parser.add_argument("--layers", type=int, default=8, help="how many layers (default 8)")
    parser.add_argument("--rank", type=int, default=64, help="LoRA rank (default 64)")
    parser.add_argument("--dtype", default="float32", help="of the tensors (default float32, as PEFT trains them)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of time, and of memory (default 10)")
    parser.add_argument("--in-process", action="store_true", help="VLLM_ENABLE_V1_MULTIPROCESSING=0")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("build/bench_memory.json"), help="where the record goes")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if args.in_process else "1"
    folder = Path(tempfile.mkdtemp(prefix="bench_memory-"))
    try:
        record = run(args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(record, indent=1))
    print_table(record)
    print(f"record: {args.json}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
