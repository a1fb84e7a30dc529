"""Test-only shims: two-rank ZeRO-3 (``--deepspeed``) and FSDP2 (``--fsdp``) runs on a CPU.

ZeRO-3 also needs ``DS_ACCELERATOR=cpu`` in the environment.
"""

import sys

import wrapt


def _init_deepspeed():
    """Left to itself DeepSpeed asks for the ``ccl`` backend on a CPU, and compiles a faster all-reduce, which only
    DeepSpeed's inference calls, for over a minute."""
    import deepspeed

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # deepspeed.comm.torch is PyTorch
    deepspeed.init_distributed(dist_backend="gloo")


@wrapt.when_imported("accelerate.state")
def _let_fsdp_run_on_a_cpu(module):
    """accelerate's FSDP branch leaves MULTI_CPU out, so that FSDP2 with ``use_cpu`` silently becomes DDP."""

    @wrapt.patch_function_wrapper(module.AcceleratorState, "__init__")
    def init(wrapped, state, args, kwargs):
        shared = module.PartialState._shared_state
        if kwargs.get("fsdp_plugin") is not None and shared["distributed_type"] == module.DistributedType.MULTI_CPU:
            shared["distributed_type"] = module.DistributedType.MULTI_GPU  # the device, set by now, stays the CPU
        return wrapped(*args, **kwargs)


if "--deepspeed" in sys.argv:
    _init_deepspeed()
