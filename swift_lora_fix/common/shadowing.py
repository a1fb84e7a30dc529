"""Attributes of one object, replaced for a while: the class and all other objects keep theirs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def shadowed(target: Any, **replacements: Callable[..., Any]) -> Iterator[None]:
    """Replace methods of one object; the class and all other objects keep theirs."""
    attributes = vars(target)
    taken = [name for name in replacements if name in attributes]
    if taken:
        raise AssertionError(f"{type(target).__name__} already shadows {taken}")
    attributes.update(replacements)
    try:
        yield
    finally:
        for name in replacements:
            del attributes[name]


@contextlib.contextmanager
def holding(target: Any, *names: str, **values: Any) -> Iterator[None]:
    """Set attributes of an object to ``values``. At the end these and ``names`` are restored, or deleted if new."""
    attributes = vars(target)
    kept = {name: attributes[name] for name in (*names, *values) if name in attributes}
    attributes.update(values)
    try:
        yield
    finally:
        attributes.update(kept)
        for name in {*names, *values} - set(kept):
            attributes.pop(name, None)


def do_nothing(*args: Any, **kwargs: Any) -> None:
    return None
