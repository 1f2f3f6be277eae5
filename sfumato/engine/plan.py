"""What a caller wants of an engine, apart from running it: requests with their readers, and plans of several.

A plan is a generator, so that whoever has an engine can carry it out: `LLM` for one caller, `jobs.Jobs` for many. Both
go on with a plan by `advance` alone. One that changes the model ends with a `Change`. This module deliberately lacks
queries: a planner makes plans of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from sfumato.engine.reads import Readings
from sfumato.engine.request import Inspect, Request, Row
from sfumato.engine.scores import PromptScores
from sfumato.errors import InputError
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
    scores: PromptScores | None = None
    """Takes the log-probabilities of its row's prompt."""

    readings: Readings | None = None
    """Takes what its row's reads show."""

    def row(self, config: ModelConfig, id: str, name: str = "the prompt") -> Row:
        """The row of its request, which is then called so: see `Row.of`."""
        request = replace(self.request, id=id, name=name)
        return Row.of(request, config, self.reader.push, self.inspect, self.scores, self.readings)


Plan = Generator[list[Ask], list[Done], Result]
"""Yields requests that run together, is sent what each of them ended with, in their order, and returns a result.

It may return before it yields anything. It never yields an empty list."""


@dataclass(frozen=True, eq=False)
class Change:
    """What a plan ends with that changes the model, instead of a result."""

    carry_out: Callable[[], Any]
    """Called while no pass is under way; gives the result."""


@dataclass(frozen=True, eq=False)
class PlanEnd(Generic[Result]):
    """The end of a plan, and its result."""

    result: Result


def advance(plan: Plan[Result], endings: list[Done] | None = None) -> list[Ask] | PlanEnd[Result]:
    """What a plan asks for next, at least one request; or its end, which can come at once.

    `endings` is what the last requests ended with, in their order; None begins the plan. InputError for a plan that
    asks for nothing and does not end."""
    try:
        asks = next(plan) if endings is None else plan.send(endings)
    except StopIteration as stop:
        return PlanEnd(stop.value)
    if not asks:
        plan.close()
        raise InputError("there are 0 prompts to run; give at least one")
    return asks
