"""Only for the runs of ``swift-lora-fix verify``: measures each sync, and gives no reward. Load it after the fix."""

import wrapt

from swift_lora_fix.tools.verify import observer


def _no_reward():
    try:
        from swift.rewards import ORM, orms
    except ImportError:
        from swift.plugin.orm import ORM, orms

    class NoReward(ORM):
        def __call__(self, completions, **kwargs):
            return [0.0] * len(completions)

    orms["swift_lora_fix_none"] = NoReward


@wrapt.when_imported("vllm.model_executor.layers.utils")
def _keep_weights_on_a_cpu(module):
    """vLLM's CPU backend packs linear weights after loading, and then no base can be sent to it. This makes linear
    layers keep their weights. On a GPU it is not called."""

    def keep(layer, remove_weight):
        import torch

        layer.cpu_linear = lambda x, weight, bias: torch.nn.functional.linear(x, weight, bias)

    if hasattr(module, "dispatch_cpu_unquantized_gemm"):
        module.dispatch_cpu_unquantized_gemm = keep


_no_reward()
observer.install()
