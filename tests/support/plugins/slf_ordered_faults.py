"""Faults where rollout servers hold what is to be broken, and another thread makes the rollouts (--async_generate).

As slf_faults.py, but a fault is ordered (slf_server_faults.py) between a sync and the look that follows it at once.
Then come the clean syncs and the settings of ``SWIFT_LORA_FIX_ON_MISMATCH``, before the rollouts of that step. Each
sync and each rollout is recorded, too, in the order in which they come. Load it after the plugin under test.
"""

import json
import os
import threading

import slf_faults
import wrapt
from slf_faults import FAULTS, MODULES, _record

OF_THE_TRAINER = ("trainer_base_by_one_ulp", "scaling_changed")
OF_THE_BASE = ("double_count_in_the_base", "another_model", "base_by_one_ulp")  # no repair without NCCL
_orders = []


def _order(trainer, fault):
    _orders.append("none" if fault in OF_THE_TRAINER else fault)
    path = os.environ["SLF_FAULT_ORDER"]
    with open(f"{path}.new", "w") as file:
        json.dump([len(_orders), _orders[-1]], file)
    os.replace(f"{path}.new", path)
    for parameter, before in vars(trainer).pop("_slf_base", ()):
        parameter.data.copy_(before)  # a repair would find that the base is no longer the servers'
    if fault == "trainer_base_by_one_ulp":
        model = trainer.accelerator.unwrap_model(trainer.model)
        trainer._slf_base = [(p, p.detach().clone()) for n, p in model.named_parameters() if "lora_" not in n]
    if fault in OF_THE_TRAINER:
        getattr(slf_faults, fault)(trainer)


def _synced(trainer):
    step = trainer.state.global_step
    if not trainer.accelerator.is_main_process:
        return
    _record(step=step, fault="", event="synced")
    fault = vars(trainer).pop("_slf_next", None)
    if fault is None and getattr(trainer, "_slf_step", None) != step and 1 <= step <= len(FAULTS):
        trainer._slf_step, fault = step, FAULTS[step - 1]
        os.environ["SWIFT_LORA_FIX_ON_MISMATCH"] = "warn" if fault in OF_THE_BASE else "repair"
    if fault is not None:
        _order(trainer, fault)
        _record(step=step, fault=fault)


def _clean(trainer, sync):
    """Many syncs, a new policy each: none of them may raise."""
    import torch

    from swift_lora_fix import session

    os.environ["SWIFT_LORA_FIX_ON_MISMATCH"] = "raise"
    generator = torch.Generator().manual_seed(7)
    verdicts = []
    for _ in range(int(os.environ["SLF_CLEAN_SYNCS"])):
        slf_faults._perturb(trainer, torch, generator)
        sync()
        verdicts.append(slf_faults._verdict(session.session_of(trainer)))
    _record(fault="clean", verdicts=verdicts)


def _policies(trainer, sync):
    from swift_lora_fix import errors

    for policy in ("warn", "repair", "raise"):
        os.environ["SWIFT_LORA_FIX_ON_MISMATCH"] = policy
        trainer._slf_next = "zeroed"
        try:
            sync()
            _record(fault="policy", policy=policy)
        except errors.PolicyMismatchError as error:
            _record(fault="policy", policy=policy, cause=error.finding.cause, error=str(error))


def _lost(trainer, sync):
    """What no repair mends: another base, without NCCL; and an adapter that is gone, which the server loads again."""
    from swift_lora_fix import session

    os.environ["SWIFT_LORA_FIX_ON_MISMATCH"] = "repair"
    for fault in ("another_model", "removed"):
        trainer._slf_next = fault
        try:
            sync()
            _record(fault="lost", what=fault, failed=session.session_of(trainer).examination.probes_failed)
        except Exception as error:
            _record(fault="lost", what=fault, error=f"{type(error).__name__}: {error}")


def _install_session(module):
    @wrapt.patch_function_wrapper(module.Session, "synchronize")
    def synchronize(wrapped, session, args, kwargs):
        trainer, step = session.trainer.trainer, session.trainer.step
        comes_after = FAULTS[step - 2] if 2 <= step <= len(FAULTS) + 1 else ""
        if comes_after == "cache_not_reset" and getattr(trainer, "_slf_jumped", None) != step:
            trainer._slf_jumped = step
            slf_faults._jump(trainer)
        result = wrapped(*args, **kwargs)
        _synced(trainer)
        return result


def _install(module):
    mixin = module.RolloutTrainerMixin

    @wrapt.patch_function_wrapper(mixin, "_move_model_to_vllm")
    def sync(wrapped, trainer, args, kwargs):
        result = wrapped(*args, **kwargs)
        if trainer.state.global_step == len(FAULTS) + 1 and os.environ.get("SLF_CLEAN_SYNCS"):
            _clean(trainer, lambda: wrapped(*args, **kwargs))
            _policies(trainer, lambda: wrapped(*args, **kwargs))
            _lost(trainer, lambda: wrapped(*args, **kwargs))
            raise SystemExit(0)
        return result

    @wrapt.patch_function_wrapper(mixin, "_engine_infer")
    def infer(wrapped, trainer, args, kwargs):
        assert threading.current_thread() is not threading.main_thread() or trainer.state.global_step == 0, "no probes"
        _record(step=trainer.state.global_step, fault="", event="rollout")
        outputs = wrapped(*args, **kwargs)
        tags = [dict(output.rollout_infos) for output in outputs]
        _record(step=trainer.state.global_step, fault="", event="made", tags=tags[:1])
        return outputs


wrapt.register_post_import_hook(_install_session, "swift_lora_fix.session")
for _name in MODULES:
    wrapt.register_post_import_hook(_install, _name)
