"""A reward for runs that need gradients but no meaning."""

import os


def _rewards():
    try:
        from swift.rewards import ORM, orms
    except ImportError:
        from swift.plugin.orm import ORM, orms

    class Spread(ORM):
        """A number from the completion's text and the rank; by position where all texts are alike (random weights of a
        real vocabulary decode to nothing). No state: a resumed run gets the rewards of an uninterrupted one."""

        def __init__(self, *args, **kwargs):
            super().__init__()

        def __call__(self, completions, **kwargs):
            rank = int(os.environ.get("RANK", "0"))
            if len(set(map(str, completions))) == 1:
                return [(i + rank) / (len(completions) + rank) for i in range(len(completions))]
            return [(sum(map(ord, str(c))) * (7 + 4 * rank) % 97) / 97.0 for c in completions]

    orms["slf_spread"] = Spread


_rewards()
