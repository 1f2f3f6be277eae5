"""Work that can stand still between two calls of the library, so that a slow one need not hold up others."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")

Interruptible = Generator[None, None, T]
"""A computation that can be interrupted wherever it yields, which is between any two calls of the library."""


def finish(work: Interruptible[T]) -> T:
    """Run the work to its end; returns its result."""
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
