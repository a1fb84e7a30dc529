"""In the vLLM worker of a rollout server: breaks what the engine serves. slf_server_faults.py sends these functions by
their names, so this module is on the worker's path.

Faults of the base are undone by the next order: a trainer without NCCL cannot send it again.
"""

import slf_faults

_kept = {}  # the slots as the last sync left them, and the base before a fault


class _Engine:
    """As the faults of slf_faults.py know a trainer's engine."""

    def __init__(self, worker):
        self.engine = self
        self.inner_model = worker.model_runner.model
        self.list_loras, self.remove_lora = worker.list_loras, worker.remove_lora


def double_count_in_the_base(engine):
    """vLLM's CPU backend packs the weights of its linear layers away: what they compute is changed."""
    import torch

    for _, module in engine.inner_model.named_modules():
        if hasattr(module, "lora_b_stacked"):
            sides = zip(module.lora_a_stacked, module.lora_b_stacked)
            delta = torch.cat([b[0, 0].float() @ a[0, 0].float() for a, b in sides])
            layer, own = module.base_layer, module.base_layer.cpu_linear
            _kept.setdefault("linear", []).append((layer, own))
            layer.cpu_linear = _added(own, delta)


def _added(own, delta):
    import torch

    return lambda x, weight, bias: own(x, weight, bias) + torch.nn.functional.linear(x, delta.to(x.dtype))


def another_model(engine):
    import torch

    for parameter in _whole(engine):
        parameter.data.copy_(torch.randn_like(parameter) * parameter.float().std())


def base_by_one_ulp(engine):
    slf_faults._one_ulp(next(_whole(engine)))


def _whole(engine):
    """Matrices of the base that are not packed away."""
    return (parameter for parameter in engine.inner_model.parameters() if parameter.dim() == 2 and parameter.numel())


OF_THE_BASE = {fault.__name__: fault for fault in (double_count_in_the_base, another_model, base_by_one_ulp)}


def in_worker(worker, fault):
    engine = _Engine(getattr(worker, "worker", worker))
    for layer, own in _kept.pop("linear", ()):
        layer.cpu_linear = own
    for parameter, before in _kept.pop("base", ()):
        parameter.data.copy_(before)
    held = [tensor.clone() for tensor in slf_faults._held(engine)]
    engine._slf_previous = _kept.get("slots")
    if fault in OF_THE_BASE:
        _kept["base"] = [(parameter, parameter.detach().clone()) for parameter in engine.inner_model.parameters()]
        OF_THE_BASE[fault](engine)
    else:
        getattr(slf_faults, fault)(engine)
    _kept["slots"] = held
