"""A reward for runs that need gradients but no meaning."""

import os
import random


def _rewards():
    try:
        from swift.rewards import ORM, orms
    except ImportError:
        from swift.plugin.orm import ORM, orms

    class Spread(ORM):
        """Random, from a seed: it differs between completions and ranks, so that gradients are not zero."""

        def __init__(self, *args, **kwargs):
            super().__init__()
            self.random = random.Random(int(os.environ.get("RANK", "0")))

        def __call__(self, completions, **kwargs):
            return [self.random.random() for _ in completions]

    orms["slf_spread"] = Spread


_rewards()
