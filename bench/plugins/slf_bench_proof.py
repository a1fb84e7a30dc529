"""Times each training step and what the proof did in it: one JSON line a step to ``$SLF_BENCH_FILE``."""

import json
import os
import time

import wrapt


def _now():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@wrapt.when_imported("transformers.trainer")
def _patch(module):
    class Clock(module.TrainerCallback):
        def __init__(self, trainer):
            self.trainer, self.last = trainer, None

        def on_step_end(self, args, state, control, **kwargs):
            from swift_lora_fix import session

            now, before = _now(), self.last
            self.last = now
            if before is None:  # the first step starts the engine's kernels as well
                return
            run = session.session_of(self.trainer)
            seen = run.examination
            line = {
                "step": state.global_step,
                "seconds": now - before,
                "sync": run.last_seconds,
                "audit": seen.audit_seconds,
                "base_audit": seen.base_audit_seconds,
                "gate": seen.gate_seconds,
                "examined": seen.verdict is not None,
                "kinds": sorted(seen.verdicts),
            }
            with open(os.environ["SLF_BENCH_FILE"], "a") as file:
                file.write(json.dumps(line) + "\n")

    @wrapt.patch_function_wrapper(module.Trainer, "train")
    def train(wrapped, trainer, args, kwargs):
        trainer.add_callback(Clock(trainer))
        return wrapped(*args, **kwargs)
