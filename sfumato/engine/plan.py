"""What a method asks of an engine, apart from running it: requests with their readers, and plans of several."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

from sfumato.engine.request import Request
from sfumato.events import Done
from sfumato.text.reader import Reader

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Ask:
    """A request of the engine, and what makes text of its tokens."""

    request: Request
    reader: Reader
    is_shown: bool = True
    """Whether the caller sees its drafts; not those of a search on the way."""


Plan = Generator[list[Ask], list[Done], T]
"""What a method of `LLM` does, apart from running it: yields requests that run together, is sent what they ended with,
and returns the method's result. So whoever has an engine, for one caller or for many, can carry it out."""
