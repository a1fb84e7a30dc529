"""The benchmarks: one module for each ``scripts/bench_NAME``, and the plugins that measure inside a real run.

``python -m bench.sync``, ``bench.transports``, ``bench.generate`` and ``bench.memory``; each has ``--help``. The run
driver, the tiny models and the CPU shims are those of the tests (``tests/support``).
"""

from pathlib import Path

PLUGINS = Path(__file__).resolve().parent / "plugins"
