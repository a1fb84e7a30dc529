"""LoRA sync for ms-swift's GRPO and kin, done right: the vLLM engine serves exactly the trainer's policy.

How data flows, one way::

    adapter.py   the trainer's LoRA tensors and PEFT's scalings, read and never written
    origin.py    where they came from, checked against the file at the first sync
    engine/      how they land in vLLM: base.py (unmerged base, once), writer.py (adapter, each sync)
                 or, in fused mode, merging.py (base and adapter in one, in float32) and engine/fused.py
    sync.py      the stages of one sync in order;  state.py: what is known between two syncs
    proof/       before rollouts: what the engine holds and what it answers, against the trainer
    metrics.py   reports and timings, into ms-swift's own metrics
    scope.py     which trainers this is for, and in which mode;  choice.py: the mode by measurement
    releases.py  which release has which defect
    frameworks/  the thin hooks into ms-swift;  install/: how a library is patched;  arming.py: when, and who asked

Beside it: cli/ (doctor, verify, report, fork), and memory/, adapters from memory for any vLLM program.

Importing this package arms it: the hooks go in when ms-swift's rollout module is loaded. It loads neither torch nor
vLLM nor ms-swift by itself. ``SWIFT_LORA_FIX=off`` keeps everything out.
"""

from __future__ import annotations

from . import errors
from .arming import Status, apply, arm, is_console_script, remove, status

__version__ = "0.1.0"
__all__ = ["Status", "apply", "errors", "remove", "status", "__version__"]

if not is_console_script():
    arm()
