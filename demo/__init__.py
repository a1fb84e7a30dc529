"""``scripts/demo``, as ``python -m demo``: ms-swift's issue 8233 on this machine, without and with the plugin.

The run driver, the tiny models and the bounds are those of the tests (``tests/support``).
"""
