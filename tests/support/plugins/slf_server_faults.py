"""In a rollout server: breaks what its engine serves, as the trainer orders it (slf_ordered_faults.py).

The order is in ``$SLF_FAULT_ORDER``: a number and the fault's name. It is carried out before the server's next answers,
in vLLM's own worker (slf_worker_faults.py).
"""

import json
import os
import weakref

import slf_worker_faults
import wrapt

_done = weakref.WeakKeyDictionary()  # of each engine, the order carried out last


def _carry_out(engine):
    path = os.environ.get("SLF_FAULT_ORDER", "")
    if not os.path.exists(path):
        return
    with open(path) as file:
        number, fault = json.load(file)
    if _done.get(engine) == number:
        return
    _done[engine] = number
    vars(engine.engine).pop("reset_prefix_cache", None)
    if fault == "cache_not_reset":
        engine.engine.reset_prefix_cache = lambda *args, **kwargs: None
        fault = "none"
    engine.engine.collective_rpc(slf_worker_faults.in_worker, args=(fault,))


def _install(module):
    @wrapt.patch_function_wrapper(module.GRPOVllmEngine, "infer")
    def infer(wrapped, engine, args, kwargs):
        _carry_out(engine)
        return wrapped(*args, **kwargs)


wrapt.register_post_import_hook(_install, "swift.infer_engine.grpo_vllm_engine")
