"""``python -m swift_lora_fix`` is the console script ``swift-lora-fix``."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
