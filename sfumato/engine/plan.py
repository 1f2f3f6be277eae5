"""What a caller wants of an engine, apart from running it: requests with their readers, and plans of several.

A plan is a generator, so that whoever has an engine can carry it out: `LLM` for one caller, `jobs.Jobs` for many.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TypeVar

from sfumato.engine.request import Inspect, Request, Row
from sfumato.events import Done
from sfumato.model.config import ModelConfig
from sfumato.text.reader import Reader

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Ask:
    """A request of the engine, and what makes text of its tokens."""

    request: Request
    reader: Reader
    is_answer: bool = False
    """Whether its events are what the caller wants. If not, only its drafts are shown, and the plan's result counts."""
    inspect: Inspect | None = None
    """Takes every read-out of its row."""

    def row(self, config: ModelConfig, id: str, name: str = "the prompt") -> Row:
        """The row of its request, which is then called so: see `Row.of`."""
        return Row.of(replace(self.request, id=id, name=name), config, self.reader.push, self.inspect)


Plan = Generator[list[Ask], list[Done], Result]
"""Yields requests that run together, is sent what each of them ended with, in their order, and returns a result."""
