"""Test-only shim: vLLM's engine sleeps on a CPU, where it has no sleep mode.

Level 2 discards what a GPU would lose: the weights and the LoRA slots, which become NaN. Buffers stay, as vLLM's do.
"""

import wrapt


@wrapt.when_imported("vllm.platforms.interface")
def _allow(module):
    module.Platform.is_sleep_mode_available = lambda self: True


@wrapt.when_imported("vllm.v1.worker.cpu_worker")
def _forget(module):
    def sleep(worker, level=1):
        if level == 2:
            for part in worker.model_runner.model.modules():
                slots = [*getattr(part, "lora_a_stacked", ()), *getattr(part, "lora_b_stacked", ())]
                for tensor in [*part.parameters(recurse=False), *slots]:
                    tensor.data.fill_(float("nan"))

    module.CPUWorker.sleep = sleep
    module.CPUWorker.wake_up = lambda worker, tags=None: None
