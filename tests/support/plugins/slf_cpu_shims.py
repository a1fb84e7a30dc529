"""Test-only shims: vLLM's CPU backend keeps base weights that can be written again, and hub look-ups fail at once.

vLLM's CPU backend packs linear weights away once they are loaded, after which ms-swift's own base sync (stock and
ours) has no parameter left to write to. Here linear layers keep their weights and call plain ``linear``.
"""

import time
import types

import wrapt


def _keep_weights(layer, remove_weight):
    import torch

    layer.cpu_linear = lambda x, weight, bias: torch.nn.functional.linear(x, weight, bias)


@wrapt.when_imported("vllm.model_executor.layers.utils")
def _patch(module):
    if hasattr(module, "dispatch_cpu_unquantized_gemm"):
        module.dispatch_cpu_unquantized_gemm = _keep_weights


def _patch_old_torch():
    """ms-swift 3.10.3 calls ``torch.cpu.max_memory_reserved``, which torch does not have."""
    import torch

    if not hasattr(torch.cpu, "max_memory_reserved"):
        torch.cpu.max_memory_reserved = lambda *args, **kwargs: 0


@wrapt.when_imported("modelscope_hub._legacy_api")
def _do_not_wait(module):
    """The models are local folders and there is no network: retrying a hub look-up for 20 s a run helps nobody."""
    module.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})


@wrapt.when_imported("urllib3.util.retry")
def _do_not_back_off(module):
    module.Retry.sleep = lambda self, response=None: None


_patch_old_torch()
