"""Shared by all suites."""

from __future__ import annotations

import signal

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # a suite that is told to end (``timeout``) ends its runs, too: they have sessions of their own
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config.addinivalue_line("markers", "needs(*runs): the real runs that a test looks at; started once, shared")
