"""When the benchmark plugins measure: after the sync of step ``$SLF_BENCH_STEP``; then the run is ended. And with what:
a framework's trainer and its stock sync, a clock that waits for the device, and the trainer's parameters as they were.
"""

import os
import time

import wrapt

MODULES = ("swift.rlhf_trainers.rollout_mixin", "swift.trainers.rlhf_trainer.rollout_mixin")


def _is_the_step(trainer):
    return trainer.state.global_step == int(os.environ.get("SLF_BENCH_STEP", "2"))


class Swift:
    """ms-swift's trainer. ours: our sync, bound."""

    def __init__(self, ours, trainer):
        self.stock_dtype = next(p.dtype for n, p in trainer.model.named_parameters() if "lora_" not in n)
        self.model = trainer.accelerator.unwrap_model(trainer.model)
        self.vllm_config = trainer.engine.engine.vllm_config
        trainer.base_sync_done = True
        stock = stock_sync(next(c for c in type(trainer).__mro__ if c.__name__ == "RolloutTrainerMixin"))
        self.stock = lambda: stock(trainer, skip_async_check=True)
        self.ours = lambda: ours(skip_async_check=True)


class Trl:
    """TRL's trainer. ours: our sync, bound."""

    stock_dtype = None  # it leaves the LoRA in its own

    def __init__(self, ours, trainer):
        from swift_lora_fix.common.shadowing import shadowed
        from swift_lora_fix.engine.vllm.handle import EngineHandle
        from swift_lora_fix.engine.vllm.weights.names import of_wrapped_layers

        generation = trainer.vllm_generation
        self.model = trainer.accelerator.unwrap_model(trainer.model)
        self.vllm_config = generation.llm.llm_engine.vllm_config
        sync = stock_sync(type(generation), "sync_weights")
        handle = EngineHandle(generation.llm.llm_engine)
        rename, load = of_wrapped_layers(handle), handle.model.load_weights

        def stock():
            """Into this engine: stock TRL's has no LoRA layers, for which vLLM wants other names."""
            with shadowed(handle.model, load_weights=lambda weights: load(rename(dict(weights)).items())):
                sync(generation)

        self.stock, self.ours = stock, ours


def measure_trl(trainer, bench):
    """Have ``bench(sync, trainer)`` called there, of a trainer of TRL's that was just made."""
    generation = trainer.vllm_generation
    ours = generation.sync_weights

    def sync():
        ours()
        if _is_the_step(trainer):
            bench(ours, trainer)
            raise SystemExit(0)

    generation.sync_weights = sync


def measure_with(bench):
    """Have ``bench(sync, trainer)`` called there; ``sync`` makes one more sync."""

    def install(module):
        @wrapt.patch_function_wrapper(module.RolloutTrainerMixin, "_move_model_to_vllm")
        def sync(wrapped, trainer, args, kwargs):
            result = wrapped(*args, **kwargs)
            if _is_the_step(trainer):
                bench(wrapped, trainer)
                raise SystemExit(0)
            return result

    for name in MODULES:
        wrapt.register_post_import_hook(install, name)


def stock_sync(owner, name="_move_model_to_vllm"):
    """The framework's own function, below every wrapper."""
    function = vars(owner)[name]
    while type(function).__name__ == "FunctionWrapper":
        function = function.__wrapped__
    return function


def timed(call):
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


def swap(parameters, values):
    for parameter, value in zip(parameters, values):
        parameter.data = value


def size_of(tensor):
    return tensor.numel() * tensor.element_size()


class Copies:
    """The bits of parameters as they are now; copied to where they are while there is room, else to the CPU."""

    def __init__(self, parameters):
        import torch

        self.parameters = parameters
        size = sum(map(size_of, parameters))
        stay = not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] > 1.25 * size
        self.copies = [p.detach().clone() if stay else p.detach().cpu() for p in parameters]

    def restore(self):
        for parameter, copy in zip(self.parameters, self.copies):
            parameter.data.copy_(copy)

    def changed(self):
        """How many elements have other bits now."""
        return sum(
            int((_bits(p.data) != _bits(copy).to(p.device)).sum()) for p, copy in zip(self.parameters, self.copies)
        )


def _bits(tensor):
    import torch

    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])
