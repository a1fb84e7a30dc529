"""Times the weight sync of server mode inside a real run: stock's and ours over NCCL, and ours without, in turn.

As in slf_bench.py. After each sync that is timed for one way, the next one is made
ready outside the timing, so that none pays for what another did to the server. Without NCCL (trainer and server share a
GPU) stock has no way, and ours are the two without.
"""

import json
import os

import wrapt
from slf_bench_step import Copies, measure_with, stock_sync, swap, timed


@wrapt.when_imported("swift_lora_fix.server.trainer.remote")
def _let_go(remote):
    """Take the server as a process that has ended: it refuses stock's sync while its holder lives."""
    lease = remote.this_process
    remote.this_process = lambda run: lease(run).model_copy(update={"start": -2})


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
    stock_way = stock_sync(next(c for c in type(trainer).__mro__ if c.__name__ == "RolloutTrainerMixin"))
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

    def stock():
        swap(parameters, cast)
        note("stock", lambda: stock_way(trainer, skip_async_check=True))
        swap(parameters, original)
        base.restore()
        engine.check_fit()  # takes the server again

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
        if nccl is not None:
            stock()
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
        "adapter_bytes": parts["reload, body"][-1]["adapter_bytes"],
        "seconds": times,
        "peak_extra_mib": peaks,
        "parts": parts,
    }
    with open(os.environ["SLF_BENCH_FILE"], "w") as file:
        json.dump(record, file)


measure_with(_bench)
