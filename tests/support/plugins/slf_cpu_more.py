"""Test-only shims for the matrix (tests/matrix) on vLLM's CPU backend: experts, the sleep flags, and 4-bit weights.

Experts: the backend packs those that it reads from files, and not those that are pushed afterwards, so that stock and
ours would compute with another layout than they wrote. Here they stay as they are loaded, and are computed plainly.

Sleep: vLLM refuses ``enable_sleep_mode`` on a CPU, although the worker's own ``sleep`` is there and does nothing. Here
it is allowed, so that --sleep_level runs as published: all that ms-swift and the plugin do around a sleep happens, and
the engine loses nothing in it. (On a GPU it does: tests/real/gpu.)

4-bit weights (GPTQ, AWQ): the backend's kernel wants AVX512. On other processors it loads such a model and packs it as
for the kernel, and fails in its first forward. There what it packed is multiplied plainly.
"""

import wrapt


@wrapt.when_imported("vllm.model_executor.layers.fused_moe.experts.cpu_moe")
def _patch(module):
    cls = module.CPUUnquantizedExperts

    def process_weights_after_loading(self, layer):
        pass

    def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, *args, **kwargs):
        import torch

        output.zero_()
        for slot in range(topk_ids.shape[1]):
            for expert in topk_ids[:, slot].unique().tolist():
                rows = (topk_ids[:, slot] == expert).nonzero()[:, 0]
                gate, up = torch.nn.functional.linear(hidden_states[rows], w1[expert]).chunk(2, dim=-1)
                inner = torch.nn.functional.silu(gate) * up
                found = torch.nn.functional.linear(inner, w2[expert])
                output[rows] += found * topk_weights[rows, slot, None].to(found.dtype)

    for kind in (cls, module.X86CPUUnquantizedExperts):
        kind.process_weights_after_loading, kind.apply = process_weights_after_loading, apply


@wrapt.when_imported("vllm.platforms.cpu")
def _let_it_sleep(module):
    module.CpuPlatform.is_sleep_mode_available = lambda self: True


@wrapt.when_imported("torch")
def _count_memory(module):
    """What ms-swift asks of a device after its engine woke up (``aggressive_empty_cache``)."""
    for name in ("memory_reserved", "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        if not hasattr(module.cpu, name):
            setattr(module.cpu, name, lambda *args, **kwargs: 0)
    if not hasattr(module.cpu, "empty_cache"):
        module.cpu.empty_cache = lambda: None


@wrapt.when_imported("vllm.v1.worker.gpu_model_runner")
def _seed_in_parts(module):
    """A seeded request whose prompt is read in parts (hybrid models) ends in vLLM's ``generator.get_offset()``: a
    CPU's generator has none."""
    import torch

    class Generator(torch.Generator):
        def get_offset(self):
            return 4

        def set_offset(self, offset):
            pass

    class Torch(wrapt.ObjectProxy):
        pass

    if not torch.cuda.is_available():
        Torch.Generator = Generator
        module.torch = Torch(torch)


@wrapt.when_imported("vllm.model_executor.layers.mamba.ops.cpu.gdn_attention")
def _leave_convolutions_alone(module):
    """Where the processor has AVX512-BF16, the backend packs the convolutions of GDN layers as it packs linear weights,
    and its kernel takes for granted that they are. Here they are not (slf_cpu_shims.py): the plain kernel is used."""
    import torch

    class Part(wrapt.ObjectProxy):
        pass

    Part._is_avx512_bf16_supported = staticmethod(lambda: False)
    Part.cpu = property(lambda self: Part(torch.cpu))
    module.torch = Part(torch)


@wrapt.when_imported("vllm.distributed.device_communicators.cpu_communicator")
def _name_shared_memory(module):
    """Ranks of one engine share memory under a name that their port is part of, and ms-swift's engine has none: the
    memory that a killed run left would be in the next one's way."""
    import os

    @wrapt.patch_function_wrapper(module._CPUSHMDistributed, "__init__")
    def init(wrapped, instance, args, kwargs):
        os.environ["VLLM_DIST_IDENT"] = os.environ["MASTER_PORT"]
        return wrapped(*args, **kwargs)


@wrapt.when_imported("vllm._custom_ops")
def _multiply_four_bits(module):
    import torch

    def codes(packed):
        shifts = torch.arange(0, 32, 4)
        return ((packed[..., None] >> shifts) & 15).flatten(-2)

    @wrapt.patch_function_wrapper(module, "cpu_gemm_wna16")
    def multiply(wrapped, instance, args, kwargs):
        if hasattr(torch.ops._C, "cpu_gemm_wna16"):
            return wrapped(*args, **kwargs)
        x, packed, scales, zeros, bias = (kwargs[name] for name in ("input", "q_weight", "scales", "zeros", "bias"))
        groups, width = scales.shape
        blocks = packed.view(width // 16, -1, 2).transpose(0, 1)  # of 16 outputs, each with all inputs
        values = codes(blocks.reshape(-1, width // 8)).view(groups, -1, width)
        values = values - (8 if zeros is None else codes(zeros)[:, None])
        weight = (values * scales[:, None].float()).to(x.dtype).view(-1, width)
        return torch.nn.functional.linear(x, weight.T, bias)
