"""Breaks what the engine serves, one fault a step, after the sync of that step; then syncs many times without a fault.

``$SLF_FAULTS`` names the faults, comma-separated, in the order of the steps from 1 on (``none`` for a step without).
In the step after the last fault come ``$SLF_CLEAN_SYNCS`` syncs with a new policy each, every one of them examined;
at least ``$SLF_CLEAN_MINIMUM``, and no more once ``$SLF_CLEAN_SECONDS`` are over. Then comes one fault under each
setting of ``SWIFT_LORA_FIX_ON_MISMATCH``, and the run ends. One JSON line for each to ``$SLF_FAULTS_FILE``. Load it
after the plugin under test.
"""

import json
import os
import time

import wrapt

MODULES = ("swift.rlhf_trainers.rollout_mixin", "swift.trainers.rlhf_trainer.rollout_mixin")
FAULTS = os.environ.get("SLF_FAULTS", "").split(",")


def _record(**fields):
    with open(os.environ["SLF_FAULTS_FILE"], "a") as file:
        file.write(json.dumps(fields) + "\n")


def _slots(trainer, side):
    """(module name, [slot buffers]) of LoRA side ``a`` or ``b``, in the engine's order."""
    for name, module in trainer.engine.inner_model.named_modules():
        buffers = getattr(module, f"lora_{side}_stacked", None)
        if buffers is not None:
            yield name, list(buffers)


def _all_slots(trainer):
    return [buffer for side in "ab" for _, buffers in _slots(trainer, side) for buffer in buffers]


def _layer_b(trainer):
    return [buffer for _, buffers in _slots(trainer, "b") for buffer in buffers]


def _folded(trainer):
    """In fused mode where each weight lies in the engine, and what it should hold, each valid until the next; with
    LoRA slots there is none."""
    from swift_lora_fix import session

    own = session.session_of(getattr(trainer, "session_key", trainer))  # TRL's is its generation
    return iter(()) if own is None or own.writer.weights is None else own.writer.weights.placed(0, 1)


def _held(trainer):
    """Where the policy lies: the slots, or the weights that it is folded into."""
    return _all_slots(trainer) + [placed.destination for placed in _folded(trainer)]


def double_count_in_place(trainer):
    for buffer in _layer_b(trainer):
        buffer.mul_(2)
    for placed in _folded(trainer):
        placed.destination.copy_(2 * placed.rounded.float() - placed.plain.float())


def double_count_in_the_base(trainer):
    """What ms-swift 3.12 to 4.0.1 do: base and LoRA merged go to the engine, and the LoRA is there as well."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    model.merge_adapter()
    merged = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    model.unmerge_adapter()
    if not _all_slots(trainer):  # nothing but the base is there to hold it twice
        merged = {name: 2 * value - base[name] for name, value in merged.items()}
    _push(trainer, merged, base)


def another_model(trainer):
    import torch

    base = {n: p for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters() if "lora_" not in n}
    other = {n: torch.randn_like(p) * p.float().std() if p.dim() > 1 else p.clone() for n, p in base.items()}
    _push(trainer, other, {n: p.detach().clone() for n, p in base.items()})


def _push(trainer, values, base):
    """Send ``values`` as the base, by ms-swift's own full move; the trainer ends with ``base``."""
    import torch

    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = dict(model.named_parameters())
    shadows = (trainer.model, "merge_adapter"), (trainer.model, "unmerge_adapter"), (trainer, "_move_adapter_to_vllm")
    for target, name in shadows:
        vars(target)[name] = lambda *args, **kwargs: None
    try:
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].data.copy_(value)
            trainer._move_full_model_to_vllm()
    finally:
        for target, name in shadows:
            del vars(target)[name]
        with torch.no_grad():
            for name, value in base.items():
                parameters[name].data.copy_(value)


def removed(trainer):
    if not _all_slots(trainer):
        return  # an engine without LoRA layers has none
    for adapter in list(trainer.engine.engine.list_loras()):
        trainer.engine.engine.remove_lora(adapter)


def zeroed(trainer):
    for buffer in _all_slots(trainer):
        buffer.zero_()
    for placed in _folded(trainer):
        placed.destination.copy_(placed.plain)


def stale(trainer):
    for tensor, before in zip(_held(trainer), trainer._slf_previous, strict=True):
        tensor.copy_(before)


def one_module_doubled(trainer):
    for buffer in _layer_b(trainer)[-1:]:
        buffer.mul_(2)
    for placed in _folded(trainer):
        if "layers.1" in placed.source and "down_proj" in placed.source:
            placed.destination.copy_(2 * placed.rounded.float() - placed.plain.float())


def one_layer_from_another(trainer):
    for side in "ab":
        layers = [buffers for name, buffers in _slots(trainer, side) if name.endswith("down_proj")]
        for target, source in zip(*layers[:2]):
            target.copy_(source)
    layers = [placed.destination for placed in _folded(trainer) if "down_proj" in placed.source]
    if layers:
        layers[0].copy_(layers[1])


def not_a_number(trainer):
    (_layer_b(trainer) or _held(trainer))[0].view(-1)[0] = float("nan")


def _one_ulp(parameter):
    import torch

    bits = parameter.data.view(torch.int16).view(-1)  # .data: no version counter tells
    bits[bits.numel() // 2] += 1


def base_by_one_ulp(trainer):
    part = "down_proj" if _all_slots(trainer) else "embed_tokens"  # of a weight that no adapter is folded into
    names = [n for n, p in trainer.engine.inner_model.named_parameters() if part in n and p.dim() == 2]
    _one_ulp(dict(trainer.engine.inner_model.named_parameters())[names[0]])


def trainer_base_by_one_ulp(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    _one_ulp(next(p for n, p in model.named_parameters() if "lora_" not in n and p.dim() == 2))


def scaling_changed(trainer):
    from peft.tuners.lora import LoraLayer

    for module in trainer.accelerator.unwrap_model(trainer.model).modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= 1.5


def cache_not_reset(trainer):
    """From now on until the next sync is done: the resets around this step's gate, and that of the next sync. The gate
    of the next step sees it, as the policy is turned around until then: cached keys and values of one small step before
    stay within the noise."""
    engine = trainer.engine.engine
    trainer._slf_reset = engine.reset_prefix_cache
    engine.reset_prefix_cache = lambda *args, **kwargs: None


def _jump(trainer):
    """Not to a larger LoRA, which larger logits and their rounding would come with."""
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(-0.5)


def none(trainer):
    pass


def _perturb(trainer, torch, generator):
    with torch.no_grad():
        for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(noise * parameter.std() * 0.03)


def _clean(trainer, infer, requests, config):
    """Many syncs, a new policy each: none of them may raise."""
    import torch

    from swift_lora_fix import session

    os.environ["SWIFT_LORA_FIX_ON_MISMATCH"] = "raise"
    generator = torch.Generator().manual_seed(7)
    verdicts = []
    ends = time.monotonic() + float(os.environ["SLF_CLEAN_SECONDS"])
    for number in range(int(os.environ["SLF_CLEAN_SYNCS"])):
        if number >= int(os.environ["SLF_CLEAN_MINIMUM"]) and time.monotonic() > ends:
            break
        _perturb(trainer, torch, generator)
        trainer._move_model_to_vllm(skip_async_check=True)
        _rollouts(trainer, infer, requests, config)
        verdicts.append(_verdict(session.session_of(trainer)))
    _record(fault="clean", verdicts=verdicts)


def _verdict(held):
    """A row about the last sync of a session: see ``tests.support.faults.verdicts``."""
    seen = held.examination
    v = seen.verdict
    seconds = [seen.audit_seconds, seen.base_audit_seconds, seen.gate_seconds, held.last_seconds]
    told = [v.ratio, v.is_distinguishable]
    return [v.distance.mean, v.distance.max, v.noise, v.control_base, v.control_double, *seconds, *told]


def _rollouts(trainer, infer, requests, config):
    """As ms-swift's ``_fast_infer`` with the fix: what is judged later is judged, and what a repair asks for done."""
    from swift_lora_fix import session

    outputs = infer(requests[:1], config)
    if session.session_of(trainer).after_rollout():
        trainer._move_model_to_vllm(skip_async_check=True)
        outputs = infer(requests[:1], config)
        session.session_of(trainer).after_rollout()
    return outputs


def _policies(trainer, infer, requests, config):
    from swift_lora_fix import errors

    for policy in ("warn", "repair", "raise"):
        os.environ["SWIFT_LORA_FIX_ON_MISMATCH"] = policy
        trainer._move_model_to_vllm(skip_async_check=True)
        zeroed(trainer)
        try:
            answers = len(_rollouts(trainer, infer, requests, config))
            _record(fault="policy", policy=policy, answers=answers)
        except errors.PolicyMismatchError as error:
            _record(fault="policy", policy=policy, cause=error.finding.cause, error=str(error))


def _install(module):
    mixin = module.RolloutTrainerMixin

    @wrapt.patch_function_wrapper(mixin, "_move_model_to_vllm")
    def sync(wrapped, trainer, args, kwargs):
        reset = vars(trainer).pop("_slf_reset", None)
        if reset is not None:
            _jump(trainer)
        result = wrapped(*args, **kwargs)
        if reset is not None:
            trainer.engine.engine.reset_prefix_cache = reset
        step = trainer.state.global_step
        if getattr(trainer, "_slf_step", None) != step and 1 <= step <= len(FAULTS):
            trainer._slf_step = step
            # as the sync left them, before a fault; a sleeping engine could not be asked before the next sync
            held = [tensor.clone() for tensor in _held(trainer)] if "stale" in FAULTS[step - 1 : step + 1] else []
            globals()[FAULTS[step - 1]](trainer)
            trainer._slf_previous = held
            _record(step=step, fault=FAULTS[step - 1])
        return result

    @wrapt.patch_function_wrapper(mixin, "_engine_infer")
    def infer(wrapped, trainer, args, kwargs):
        requests = args[0] if args else kwargs["infer_requests"]
        config = args[1] if len(args) > 1 else kwargs["request_config"]
        outputs = wrapped(*args, **kwargs)
        infos = [dict(output.rollout_infos) for output in outputs]
        _record(step=trainer.state.global_step, fault="", tags=infos[:1])
        if trainer.state.global_step == len(FAULTS) + 1:
            _clean(trainer, wrapped, requests, config)
            _policies(trainer, wrapped, requests, config)
            raise SystemExit(0)
        return outputs


if "SLF_FAULT_ORDER" not in os.environ:  # else somebody else says when (slf_ordered_faults.py, slf_server_faults.py)
    for _name in MODULES:
        wrapt.register_post_import_hook(_install, _name)
