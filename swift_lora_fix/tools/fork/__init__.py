"""Fork a run: a folder from which a new run starts with another run's adapter, checked before and while it is written.

    source.py     which folder: the newest complete checkpoint, and why others are passed over
    base.py       whether adapter and base model belong together, from safetensors headers alone
    precision.py  the adapter's values: usable at all, cast, and what the cast lost
    make.py       the new folder, its provenance, and the arguments to go on with
    atomic.py     all of the folder or nothing

torch is loaded when everything that can be judged without it has been found right.
"""

from __future__ import annotations

from .make import Fork, fork

__all__ = ["Fork", "fork"]
