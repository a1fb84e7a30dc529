"""When the benchmark plugins measure: after the sync of step ``$SLF_BENCH_STEP``; then the run is ended."""

import os

import wrapt

MODULES = ("swift.rlhf_trainers.rollout_mixin", "swift.trainers.rlhf_trainer.rollout_mixin")


def measure_with(bench):
    """Have ``bench(sync, trainer)`` called there; ``sync`` makes one more sync."""

    def install(module):
        @wrapt.patch_function_wrapper(module.RolloutTrainerMixin, "_move_model_to_vllm")
        def sync(wrapped, trainer, args, kwargs):
            result = wrapped(*args, **kwargs)
            if trainer.state.global_step == int(os.environ.get("SLF_BENCH_STEP", "2")):
                bench(wrapped, trainer)
                raise SystemExit(0)
            return result

    for name in MODULES:
        wrapt.register_post_import_hook(install, name)
