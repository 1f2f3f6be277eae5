"""What a method asks of an engine, apart from running it: requests with their readers, and plans of several."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TypeVar

from sfumato.engine.request import Inspect, Request, Row
from sfumato.events import Done
from sfumato.model.config import ModelConfig
from sfumato.text.reader import Reader

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Ask:
    """A request of the engine, and what makes text of its tokens."""

    request: Request
    reader: Reader
    is_shown: bool = True
    """Whether the caller sees its drafts; not those of a search on the way."""
    inspect: Inspect | None = None
    """Takes every read-out of its row."""

    def row(self, config: ModelConfig, id: str, name: str = "the prompt") -> Row:
        """The row of its request, which is then called so: see `Row.of`."""
        return Row.of(replace(self.request, id=id, name=name), config, self.reader.push, self.inspect)


Plan = Generator[list[Ask], list[Done], T]
"""What a method of `LLM` does, apart from running it: yields requests that run together, is sent what they ended with,
and returns the method's result. So whoever has an engine, for one caller or for many, can carry it out."""
