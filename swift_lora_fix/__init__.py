"""LoRA sync for ms-swift's GRPO and kin, done right: the vLLM engine serves exactly the trainer's policy.

How data flows, one way::

    frameworks/  the hooks into ms-swift, and the port that reads its trainer (trainer.py: what a port must offer)
    session.py   the state machine of one run: the stages of a sync, in order
    policy/      the trainer's LoRA tensors and PEFT's scalings, only read: adapter.py; which file they came from:
                 origin.py; base and adapter merged in float32, for fused mode: merging.py
    engine/      how they get into vLLM: the unmerged base once (weights/base.py), then at each sync the adapter
                 (slots/writer.py), or in fused mode the merged weights (weights/fused.py)
    server/      the same for rollout servers: one folder a side
    proof/       before rollouts: compare what the engine holds and answers with the trainer; examiner.py runs it
    metrics.py   reports and timings, into ms-swift's own metrics

Beside it: scope.py (which trainers are served, and in which mode), auto.py (the mode by measurement), install/
(patching, and which release has which defect), arming.py (when, and who asked), tools/ (doctor, verify, report, fork),
and memory/, adapters from memory for any vLLM program.

Importing this package arms it: the hooks go in when ms-swift's rollout module is loaded. The import itself loads
neither torch nor vLLM nor ms-swift. ``SWIFT_LORA_FIX=off`` keeps everything out.
"""

from __future__ import annotations

from . import errors
from .arming import Status, apply, arm, is_console_script, remove, status

__version__ = "0.1.0"
__all__ = ["Status", "apply", "errors", "remove", "status", "__version__"]

if not is_console_script():
    arm()
