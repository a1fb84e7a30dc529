"""Times the weight sync inside a real run: stock's and ours in turn, on the same trainer and engine.

In step ``$SLF_BENCH_STEP`` each sync is made ``$SLF_BENCH_SYNCS`` times the stock way and ours, alternating; then the
run is ended. One JSON object goes to ``$SLF_BENCH_FILE``. Since 4.3.0 ms-swift has cast the trainer's LoRA to the
base's dtype by its second sync, so stock is timed on such a copy of it and ours on the fp32 original; TRL's on a copy
of its own dtype. Their merge and unmerge leave other bits in the trainer's base, which gets its own back after each of
stock's syncs, outside the timing.
"""

import json
import os

from slf_bench_step import Copies, Swift, Trl, measure_trl, measure_with, size_of, swap, timed


def _bandwidth():
    """Bytes read and written each second by a copy on this device."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.empty((1 << 30) if device == "cuda" else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(timed(lambda: target.copy_(source))[0] for _ in range(8))
    return 2 * source.numel() / best


def _bench(side):
    """side: `Swift` or `Trl`."""
    import torch

    import swift_lora_fix

    count = int(os.environ.get("SLF_BENCH_SYNCS", "20"))
    status = swift_lora_fix.status()
    mode = status.run["mode"]
    named = dict(side.model.named_parameters())
    parameters = [p for n, p in named.items() if "lora_" in n]
    adapted = [p for n, p in named.items() if n.endswith(".base_layer.weight")]
    base = Copies([p for n, p in named.items() if "lora_" not in n])
    ours_parts, peaks = [], []
    times = {"stock": [], "ours": []}
    changed = {"stock": 0, "ours": 0}
    original = [p.data for p in parameters]
    cast = [p.data.to(side.stock_dtype or p.dtype, copy=True) for p in parameters]
    for _ in range(count):
        swap(parameters, cast)
        times["stock"].append(timed(side.stock)[0])
        swap(parameters, original)
        changed["stock"] += base.changed()
        base.restore()
        side.ours()  # what stock did to the engine is noticed and repaired outside the timing
        with torch.no_grad():
            torch._foreach_mul_(parameters, 1.0009765625)  # a new policy
        policy = Copies(parameters)
        seconds, peak = timed(side.ours)
        changed["ours"] += base.changed() + policy.changed()
        times["ours"].append(seconds)
        peaks.append(peak)
        ours_parts.append(dict(swift_lora_fix.status().run))
    bandwidth = _bandwidth()
    read = sum(size_of(p) for p in (parameters if mode == "adapter" else parameters + adapted))
    written = ours_parts[-1]["adapter_bytes"]
    record = {
        "mode": mode,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "framework": f"TRL {status.trl}" if isinstance(side, Trl) else f"ms-swift {status.ms_swift}",
        "vllm": status.vllm,
        "lora_parameters": sum(p.numel() for p in parameters),
        "lora_dtypes": sorted({str(value.dtype) for value in original}),
        "seconds": times,
        "parts": ours_parts,
        "peak_extra_mib": peaks,
        "largest_layer_bytes": max(size_of(p) for p in adapted),
        "largest_layer_float32_bytes": max(4 * p.numel() for p in adapted),
        "trainer_elements": sum(p.numel() for p in named.values()),
        "trainer_elements_changed": changed,
        "bytes_read": read,
        "bytes_written": written,
        "bandwidth": bandwidth,
        "kv_blocks": side.vllm_config.cache_config.num_gpu_blocks,
        "floor_seconds": (read + written) / bandwidth,
    }
    with open(os.environ["SLF_BENCH_FILE"], "w") as file:
        json.dump(record, file)


def begin(trainer):
    """A trainer of TRL's was made (tests/support/trl_run.py)."""
    measure_trl(trainer, lambda ours, trainer: _bench(Trl(ours, trainer)))


measure_with(lambda ours, trainer: _bench(Swift(ours, trainer)))
