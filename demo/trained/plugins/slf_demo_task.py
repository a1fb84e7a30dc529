"""The reward of the demonstration, as ms-swift's ``--external_plugins`` takes it: ``--reward_funcs slf_sum``.

Each batch is recorded, one JSON line, in ``$SLF_DEMO_RECORD``. With ``$SLF_DEMO_KILL_AT_STEP`` the process is killed
outright once the batch of that step is recorded.
"""

import json
import os
import signal

from demo.trained.task import record_of


def _rewards():
    from swift.rewards import ORM, orms

    class Sum(ORM):
        """``demo.trained.task.score``, and the record."""

        def __init__(self, *args, **kwargs):
            super().__init__()

        def __call__(self, completions, answer, trainer_state, **kwargs):
            record = record_of(trainer_state.global_step, completions, [int(one) for one in answer])
            with open(os.environ["SLF_DEMO_RECORD"], "a") as file:
                file.write(json.dumps(record) + "\n")
            if os.environ.get("SLF_DEMO_KILL_AT_STEP") == str(record["step"]):
                os.kill(os.getpid(), signal.SIGKILL)
            return record["rewards"]

    orms["slf_sum"] = Sum


_rewards()
