"""For ms-swift: ``--external_plugins "$(swift-lora-fix plugin)"``.

It is alone in its folder, because ms-swift puts that folder first on ``sys.path``. ms-swift also runs it

- in each dataloader worker: there importing the package, which arms it lazily, is enough;
- in every command that loads the arguments of a checkpoint trained with it (``swift export``, ``infer``, ...): there is
  no trainer to look after, and perhaps no vLLM. Nothing is imported.
"""

import multiprocessing
import os
import sys

_FOR = ("rlhf", "rollout")  # ms-swift's commands with a trainer of rollouts, or an engine for one


def _is_another_command() -> bool:
    """Whether this process is one of ms-swift's other commands: ``swift/cli/export.py`` is ``swift export``."""
    folder, name = os.path.split(os.path.abspath(sys.argv[0]))
    is_command = folder.endswith((os.path.join("swift", "cli"), os.path.join("swift", "cli", "_megatron")))
    return is_command and os.path.splitext(name)[0] not in _FOR


if not _is_another_command():
    import swift_lora_fix

    if multiprocessing.parent_process() is None:
        swift_lora_fix.apply()
