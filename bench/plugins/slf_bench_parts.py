"""Times each training step and its parts, stock's or ours: one JSON line a step to ``$SLF_BENCH_FILE``.

sync: ms-swift's ``_move_model_to_vllm``, whatever it calls. generation: its ``_engine_infer``, all calls of the step.
The rest of a step is scoring, training, and the engine's sleep. examined: whether the gate looked in this step.
"""

import json
import os
import sys
import time

import wrapt
from slf_bench_step import MODULES

PARTS = {"_move_model_to_vllm": "sync", "_engine_infer": "generation"}
spent = dict.fromkeys(PARTS.values(), 0.0)


def _now():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _install(module):
    for method, part in PARTS.items():

        @wrapt.patch_function_wrapper(module.RolloutTrainerMixin, method)
        def timed(wrapped, trainer, args, kwargs, part=part):
            start = _now()
            try:
                return wrapped(*args, **kwargs)
            finally:
                spent[part] += _now() - start


for name in MODULES:
    wrapt.register_post_import_hook(_install, name)


@wrapt.when_imported("transformers.trainer")
def _patch(module):
    class Clock(module.TrainerCallback):
        def __init__(self, trainer):
            self.trainer, self.last = trainer, None

        def on_step_end(self, args, state, control, **kwargs):
            now, before = _now(), self.last
            parts = dict(spent)
            spent.update(dict.fromkeys(spent, 0.0))
            self.last = now
            if before is not None:  # the first step starts the engine's kernels as well
                ours = sys.modules.get("swift_lora_fix.session")  # to import it would arm it
                run = ours and ours.session_of(self.trainer)
                examined = bool(run) and run.examination.verdict is not None
                line = {"step": state.global_step, "seconds": now - before, "examined": examined, **parts}
                with open(os.environ["SLF_BENCH_FILE"], "a") as file:
                    file.write(json.dumps(line) + "\n")

    @wrapt.patch_function_wrapper(module.Trainer, "train")
    def train(wrapped, trainer, args, kwargs):
        trainer.add_callback(Clock(trainer))
        return wrapped(*args, **kwargs)
