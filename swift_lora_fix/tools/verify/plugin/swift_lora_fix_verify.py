"""Only for the runs of ``swift-lora-fix verify``: measures each sync, and gives no reward. Load it after the fix."""

from swift_lora_fix.tools.verify import observer


def _no_reward():
    try:
        from swift.rewards import ORM, orms
    except ImportError:
        from swift.plugin.orm import ORM, orms

    class NoReward(ORM):
        def __call__(self, completions, **kwargs):
            return [0.0] * len(completions)

    orms["swift_lora_fix_none"] = NoReward


_no_reward()
observer.keep_weights_on_a_cpu()
observer.install()
