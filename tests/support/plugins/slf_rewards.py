"""A reward for runs that need gradients but no meaning."""

import os


def _rewards():
    try:
        from swift.rewards import ORM, orms
    except ImportError:
        from swift.plugin.orm import ORM, orms

    class Spread(ORM):
        """A reward that differs between completions (and ranks), so that gradients are not zero."""

        def __init__(self, *args, **kwargs):
            super().__init__()

        def __call__(self, completions, **kwargs):
            rank = int(os.environ.get("RANK", "0"))
            return [(sum(map(ord, str(c))) * (7 + 4 * rank) % 97) / 97.0 for c in completions]

    orms["slf_spread"] = Spread


_rewards()
