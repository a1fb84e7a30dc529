"""The first rollouts that another thread makes (--async_generate) fail, as where a server is gone. Load it before the
plugin under test."""

import threading

import wrapt

MODULES = ("swift.rlhf_trainers.rollout_mixin", "swift.trainers.rlhf_trainer.rollout_mixin")


def _install(module):
    @wrapt.patch_function_wrapper(module.RolloutTrainerMixin, "_engine_infer")
    def infer(wrapped, trainer, args, kwargs):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("the rollouts in the background failed")
        return wrapped(*args, **kwargs)


for _name in MODULES:
    wrapt.register_post_import_hook(_install, _name)
