"""Times the weight sync of server mode inside a real run: stock's and ours over NCCL, and ours without, in turn.

As in slf_bench.py. After each sync that is timed for one way, the next one is made
ready outside the timing, so that none pays for what another did to the server.
"""

import json
import os

from slf_bench_step import Copies, measure_with, stock_sync, swap, timed


def _bench(wrapped, trainer):
    import torch

    import swift_lora_fix
    from swift_lora_fix import session

    count = int(os.environ.get("SLF_BENCH_SYNCS", "20"))
    engine = session.session_of(trainer).engine
    nccl = engine.nccl
    named = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    parameters = [p for n, p in named.items() if "lora_" in n]
    base = Copies([p for n, p in named.items() if "lora_" not in n])
    stock = stock_sync(next(c for c in type(trainer).__mro__ if c.__name__ == "RolloutTrainerMixin"))
    trainer.base_sync_done = True
    original = [p.data for p in parameters]
    cast = [p.data.to(base.parameters[0].dtype) for p in parameters]
    times, peaks, parts = {}, {}, {}

    def note(name, call):
        seconds, peak = timed(call)
        times.setdefault(name, []).append(seconds)
        peaks.setdefault(name, []).append(peak)
        if name != "stock":
            parts.setdefault(name, []).append(dict(swift_lora_fix.status().run))

    def ours(name, change):
        change()
        wrapped(skip_async_check=True)
        with torch.no_grad():
            torch._foreach_mul_(parameters, 1.0009765625)  # a new policy
        note(name, lambda: wrapped(skip_async_check=True))

    def over_nccl():
        engine.nccl = nccl

    host = engine.statuses[0]["host"]

    def by_memory():
        engine.nccl = None
        engine.statuses[0]["host"] = host

    def by_body():
        engine.nccl = None
        engine.statuses[0]["host"] = "another"

    for _ in range(count):
        swap(parameters, cast)
        note("stock", lambda: stock(trainer, skip_async_check=True))
        swap(parameters, original)
        base.restore()
        ours("nccl", over_nccl)
        ours("reload, memory", by_memory)
        ours("reload, body", by_body)
        over_nccl()
        wrapped(skip_async_check=True)
    record = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "ms_swift": swift_lora_fix.status().ms_swift,
        "vllm": swift_lora_fix.status().vllm,
        "lora_parameters": sum(p.numel() for p in parameters),
        "adapter_bytes": parts["nccl"][-1]["adapter_bytes"],
        "seconds": times,
        "peak_extra_mib": peaks,
        "parts": parts,
    }
    with open(os.environ["SLF_BENCH_FILE"], "w") as file:
        json.dump(record, file)


measure_with(_bench)
