"""Fork a run: a folder from which a new run starts with another run's adapter, checked before and while it is written.

    source.py     which folder: the newest complete checkpoint, and why others are passed over
    base.py       whether adapter and base model belong together, from safetensors headers alone
    precision.py  the adapter's values: usable at all, cast, and what the cast lost
    make.py       the new folder, all of it or nothing, and its provenance
    facts.py      what was made, and the arguments to go on with
    view.py       prints that

torch is loaded only after everything that can be checked without it.
"""

from __future__ import annotations

from .facts import Fork
from .make import fork

__all__ = ["Fork", "fork"]
