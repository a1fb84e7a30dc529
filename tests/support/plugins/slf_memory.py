"""Samples how much memory of the device is in use while rollouts are made: one JSON line a call of ``_fast_infer`` to
``$SLF_MEMORY_FILE`` (step, whether it synced, the largest use in MiB). vLLM's sleeping memory is none of PyTorch's, so
the device itself is asked."""

import json
import os
import threading

import wrapt

MODULES = ("swift.rlhf_trainers.rollout_mixin", "swift.trainers.rlhf_trainer.rollout_mixin")


class _Sampler(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.largest, self.done = 0, threading.Event()

    def run(self):
        import torch

        while not self.done.wait(0.001):
            free, total = torch.cuda.mem_get_info()
            self.largest = max(self.largest, total - free)


def _install(module):
    @wrapt.patch_function_wrapper(module.RolloutTrainerMixin, "_fast_infer")
    def fast_infer(wrapped, trainer, args, kwargs):
        sampler = _Sampler()
        syncs = trainer._last_loaded_step != trainer.state.global_step
        sampler.start()
        try:
            return wrapped(*args, **kwargs)
        finally:
            sampler.done.set()
            sampler.join()
            with open(os.environ["SLF_MEMORY_FILE"], "a") as file:
                line = {"step": trainer.state.global_step, "syncs": syncs, "mib": sampler.largest >> 20}
                file.write(json.dumps(line) + "\n")


for _name in MODULES:
    wrapt.register_post_import_hook(_install, _name)
