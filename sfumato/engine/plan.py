"""What a caller wants of an engine, apart from running it: requests with their readers, and plans of several.

A plan is a generator, so that whoever has an engine can carry it out: `LLM` for one caller, `jobs.Jobs` for many.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

from sfumato.engine.request import Request
from sfumato.events import Done
from sfumato.text.reader import Reader

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Ask:
    """A request of the engine, and what makes text of its tokens."""

    request: Request
    reader: Reader
    is_answer: bool = False
    """Whether its events are what the caller wants. If not, only its drafts are shown, and the plan's result counts."""


Plan = Generator[list[Ask], list[Done], Result]
"""Yields requests that run together, is sent what each of them ended with, in their order, and returns a result."""
