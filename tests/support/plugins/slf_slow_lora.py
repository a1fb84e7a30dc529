"""Makes vLLM's LoRA layers slow where an adapter is applied, so that on every machine the fused mode is the faster."""

import time

import wrapt

SECONDS = 0.005  # in each layer at each step


@wrapt.when_imported("vllm.lora.punica_wrapper.punica_cpu")
def _patch(module):
    @wrapt.patch_function_wrapper(module.PunicaWrapperCPU, "add_lora_linear")
    def slowly(wrapped, instance, args, kwargs):
        if bool((instance.token_lora_indices >= 0).any()):
            time.sleep(SECONDS)
        return wrapped(*args, **kwargs)
