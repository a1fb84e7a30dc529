"""Makes the LoRA large: after each optimizer step seeded noise is added to it, before a checkpoint is saved.

How large a LoRA a few steps of training make is luck: rewards that are tied give no gradient at all, and where rounding
is another, other tokens are sampled. The noise is the same in every environment, on every processor and on every rank.
A parameter that is small yet gets noise of its full size, one that is large a tenth of it, so that each step has a
policy of its own and the LoRA stays as large. ``SLF_FREEZE=1`` (slf_probe.py) freezes this as well.
"""

import os
import zlib

import wrapt

# Standard deviations, by part of the parameter's name. PEFT starts with B at zero; for embeddings, with A.
SIZES = {"lora_B": 0.1, "lora_embedding_A": 0.005, "modules_to_save": 0.05}


def _noise(name, step, shape, size):
    """Uniform, from 24 random bits each: no arithmetic that a processor could round in its own way."""
    import torch

    name = name[name.index("base_model") :]  # whatever the model is wrapped in
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    return (torch.rand(shape, generator=generator) - 0.5) * (12**0.5 * size)


def _whole(parameter):
    """What all ranks together hold."""
    if hasattr(parameter, "ds_id"):  # ZeRO-3: its optimizer has a copy, which the next step goes on from
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _write(parameter, whole):
    if hasattr(parameter, "ds_id"):
        import torch
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, whole)
        part = parameter.ds_tensor
        part.data.copy_(whole.flatten().narrow(0, part.numel() * torch.distributed.get_rank(), part.numel()))
        if parameter.numel() == whole.numel():  # so small that every rank keeps it whole as well
            parameter.data.copy_(whole)
    elif hasattr(parameter, "full_tensor"):  # FSDP2
        from torch.distributed.tensor import distribute_tensor

        parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))
    else:
        parameter.copy_(whole)


def _grow(model, step):
    import torch

    grown = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = next((size for part, size in SIZES.items() if part in name), None)
            if size is None or not parameter.requires_grad:
                continue
            whole = _whole(parameter)
            is_small = float(whole.float().pow(2).mean()) ** 0.5 < size / 4
            _write(parameter, whole + _noise(name, step, whole.shape, size if is_small else size / 10).to(whole))
            grown += 1
    if not grown:
        raise RuntimeError("premise: no trained parameter of an adapter was found that noise could be added to")


@wrapt.when_imported("transformers.trainer")
def _patch(module):
    class Grow(module.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            _grow(model, state.global_step)

    @wrapt.patch_function_wrapper(module.Trainer, "train")
    def train(wrapped, trainer, args, kwargs):
        if not os.environ.get("SLF_FREEZE"):
            trainer.add_callback(Grow())
        return wrapped(*args, **kwargs)
