"""Times dense LoRA layers by themselves, on a GPU, in CUDA graphs: `python -m bench.combine [--rank 64] [--tune]`.

For each layer of a 7B shape and each batch size: microseconds of the plain base product, of the product with the rows
of A below, and of the dense layer, which also has the kernel. With --tune also the kernel's best tilings.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from functools import partial

import torch

from swift_lora_fix.engine.vllm.dense import op
from swift_lora_fix.engine.vllm.kernels import combine_kernel

LAYERS = {  # of Qwen2 7B: inputs, output slices
    "qkv": (3584, [3584, 512, 512]),
    "o": (3584, [3584]),
    "gate_up": (3584, [18944, 18944]),
    "down": (18944, [3584]),
}
BATCHES = (8, 64, 128, 256)
COPIES = 8  # layers in one graph, each with its own weights, so that the L2 cache does not hold them
TILINGS = list(itertools.product((16, 32, 64, 128), (32, 64, 128), (4, 8)))


def microseconds(work: Callable[[int], object]) -> float:
    """Of one call, in a CUDA graph of ``COPIES`` calls: the fastest of 20 replays."""
    for number in range(COPIES):
        work(number)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(COPIES):
            work(number)
    best = float("inf")
    for _ in range(20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 1000 / COPIES)
    return best


@torch.compile
def silu(both: torch.Tensor) -> torch.Tensor:
    """The activation as vLLM's compiled graphs have it."""
    half = both.shape[1] // 2
    return torch.nn.functional.silu(both[:, :half]) * both[:, half:]


class Layer:
    """``COPIES`` dense layers of one kind, and tokens for them."""

    def __init__(self, inputs: int, slices: list[int], rank: int) -> None:
        self.inputs, self.slices, self.outputs = inputs, slices, sum(slices)
        shape = (self.outputs + len(slices) * rank, inputs)
        self.rows = [torch.randn(shape, device="cuda").bfloat16() * 0.02 for _ in range(COPIES)]
        self.b = [torch.randn(self.outputs, rank, device="cuda").bfloat16() * 0.02 for _ in range(COPIES)]
        self.indices = torch.zeros(max(BATCHES), dtype=torch.int64, device="cuda")
        self.is_gated = len(slices) == 2
        self.feed(1)

    def feed(self, batch: int) -> None:
        self.x = torch.randn(batch, self.inputs, device="cuda").bfloat16()
        width = self.slices[0] if self.is_gated else self.outputs
        self.out = torch.empty(batch, width, device="cuda", dtype=self.x.dtype)

    def plain(self, number: int) -> torch.Tensor:
        return torch.nn.functional.linear(self.x, self.rows[number][: self.outputs])

    def with_a(self, number: int) -> torch.Tensor:
        return torch.nn.functional.linear(self.x, self.rows[number])

    def then_silu(self, number: int) -> torch.Tensor:
        return silu(self.plain(number))

    def dense(self, number: int) -> torch.Tensor:
        return op.dense_linear(self.x, self.rows[number], None, self.b[number], self.indices, self.slices)

    def gated(self, number: int) -> torch.Tensor:
        return op.dense_gated(self.x, self.rows[number], None, self.b[number], self.indices, self.slices)

    def tiled(self, tiling: combine_kernel.Tiling, number: int) -> None:
        both, b = self.with_a(number), self.b[number]
        base, shrunk = both[:, : self.outputs], both[:, self.outputs :]
        if self.is_gated:
            combine_kernel.combine_gated(self.out, base, shrunk, b, self.indices, tiling)
        else:
            combine_kernel.combine(self.out, base, shrunk, b, self.indices, self.slices, tiling)

    def tilings(self) -> list[tuple[float, combine_kernel.Tiling]]:
        """Microseconds of product and kernel together, by tiling, best first."""
        found = []
        for tiling in TILINGS:
            if tiling[0] <= max(16, len(self.x)):
                try:
                    found.append((round(microseconds(partial(self.tiled, tiling)), 2), tiling))
                except Exception as error:  # a tile that does not fit on the device
                    print(json.dumps({"tiling": tiling, "error": str(error).splitlines()[0][:100]}), flush=True)
                    torch.cuda.synchronize()
        return sorted(found)


def measure(rank: int, tune: bool) -> None:
    for name, (inputs, slices) in LAYERS.items():
        layer = Layer(inputs, slices, rank)
        works = [layer.plain, layer.with_a, layer.dense, *([layer.then_silu, layer.gated] if layer.is_gated else [])]
        for batch in BATCHES:
            layer.feed(batch)
            times = {work.__name__: round(microseconds(work), 2) for work in works}
            best = {"tilings": layer.tilings()[:4]} if tune else {}
            print(json.dumps({"layer": name, "batch": batch, "rank": rank, **times, **best}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    measure(args.rank, args.tune)


if __name__ == "__main__":
    main()
