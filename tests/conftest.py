"""Shared by all suites."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*runs): the real runs that a test looks at; started once, shared")
