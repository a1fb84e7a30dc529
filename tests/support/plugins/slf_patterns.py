"""Gives each LoRA that ms-swift makes a rank and an alpha of its own for some modules; its command line has no flag.

``$SLF_PATTERNS`` (JSON) has others.
"""

import json
import os

import wrapt

PATTERNS = json.loads(
    os.environ.get("SLF_PATTERNS") or '{"rank_pattern": {"q_proj": 4, "down_proj": 2}, "alpha_pattern": {"v_proj": 5}}'
)


@wrapt.when_imported("swift.tuners.peft")  # its LoraConfig has an __init__ of its own
def _patch(module):
    @wrapt.patch_function_wrapper(module.LoraConfig, "__init__")
    def with_patterns(wrapped, instance, args, kwargs):
        return wrapped(*args, **{**kwargs, **{n: p for n, p in PATTERNS.items() if not kwargs.get(n)}})
