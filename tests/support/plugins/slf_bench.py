"""Times the weight sync inside a real run: stock's and ours in turn, on the same trainer and engine.

In step ``$SLF_BENCH_STEP`` each sync is made ``$SLF_BENCH_SYNCS`` times the stock way and ours, alternating; then the
run is ended. One JSON object goes to ``$SLF_BENCH_FILE``. Since 4.3.0 stock has cast the trainer's LoRA to the base's
dtype by its second sync, so stock is timed on such a copy of it and ours on the fp32 original.
"""

import json
import os
import time

import wrapt

MODULES = ("swift.rlhf_trainers.rollout_mixin", "swift.trainers.rlhf_trainer.rollout_mixin")


def _stock(mixin):
    """ms-swift's own function, below every wrapper."""
    function = vars(mixin)["_move_model_to_vllm"]
    while type(function).__name__ == "FunctionWrapper":
        function = function.__wrapped__
    return function


def _timed(call):
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return seconds, (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else 0.0


def _swap(parameters, values):
    for parameter, value in zip(parameters, values):
        parameter.data = value


def _bandwidth():
    """Bytes read and written each second by a copy on this device."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.empty((1 << 30) if device == "cuda" else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(_timed(lambda: target.copy_(source))[0] for _ in range(8))
    return 2 * source.numel() / best


def _bench(wrapped, trainer):
    import torch

    import swift_lora_fix

    count = int(os.environ.get("SLF_BENCH_SYNCS", "20"))
    parameters = [p for n, p in trainer.model.named_parameters() if "lora_" in n]
    stock = _stock(next(c for c in type(trainer).__mro__ if c.__name__ == "RolloutTrainerMixin"))
    trainer.base_sync_done = True
    ours_parts, peaks = [], []
    times = {"stock": [], "ours": []}
    base_dtype = next(p.dtype for n, p in trainer.model.named_parameters() if "lora_" not in n)
    original = [p.data for p in parameters]
    cast = [p.data.to(base_dtype) for p in parameters]
    for _ in range(count):
        _swap(parameters, cast)
        times["stock"].append(_timed(lambda: stock(trainer, skip_async_check=True))[0])
        _swap(parameters, original)
        wrapped(skip_async_check=True)  # stock's reload is noticed and repaired outside the timing
        with torch.no_grad():
            torch._foreach_mul_(parameters, 1.0009765625)  # a new policy
        seconds, peak = _timed(lambda: wrapped(skip_async_check=True))
        times["ours"].append(seconds)
        peaks.append(peak)
        ours_parts.append(dict(swift_lora_fix.status().run))
    bandwidth = _bandwidth()
    read = sum(p.numel() * p.element_size() for p in parameters)
    written = ours_parts[-1]["adapter_bytes"]
    record = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "ms_swift": swift_lora_fix.status().ms_swift,
        "vllm": swift_lora_fix.status().vllm,
        "lora_parameters": sum(p.numel() for p in parameters),
        "lora_dtypes": sorted({str(value.dtype) for value in original}),
        "seconds": times,
        "parts": ours_parts,
        "peak_extra_mib": peaks,
        "bytes_read": read,
        "bytes_written": written,
        "bandwidth": bandwidth,
        "kv_blocks": trainer.engine.engine.vllm_config.cache_config.num_gpu_blocks,
        "floor_seconds": (read + written) / bandwidth,
    }
    with open(os.environ["SLF_BENCH_FILE"], "w") as file:
        json.dump(record, file)


def _install(module):
    @wrapt.patch_function_wrapper(module.RolloutTrainerMixin, "_move_model_to_vllm")
    def sync(wrapped, trainer, args, kwargs):
        result = wrapped(*args, **kwargs)
        if trainer.state.global_step == int(os.environ.get("SLF_BENCH_STEP", "2")):
            _bench(wrapped, trainer)
            raise SystemExit(0)
        return result


for _name in MODULES:
    wrapt.register_post_import_hook(_install, _name)
