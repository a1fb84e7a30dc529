"""A reward for runs that need gradients but no meaning."""

import os
import zlib


def _rewards():
    try:
        from swift.rewards import ORM, orms
    except ImportError:
        from swift.plugin.orm import ORM, orms

    class Spread(ORM):
        """Each completion's place in an order that the texts and the rank decide (the position, where texts are alike:
        random weights of a real vocabulary decode to nothing). No two are the same: a tie is a step without a gradient.
        No state: a resumed run gets the rewards of an uninterrupted one."""

        def __init__(self, *args, **kwargs):
            super().__init__()

        def __call__(self, completions, **kwargs):
            rank = os.environ.get("RANK", "0")
            marks = [(zlib.crc32(f"{rank} {text}".encode()), i) for i, text in enumerate(completions)]
            return [sorted(marks).index(mark) / len(marks) for mark in marks]

    orms["slf_spread"] = Spread


_rewards()
