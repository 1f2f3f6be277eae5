"""Queries that run elsewhere, waited for: one by an `async` function, or many at once.

A model begins a query in a thread of its own and is told whom to tell of each outcome: events, and last the Done, the
result or the error. What waits here calls the query off when it is itself called off. Nothing here imports torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from queue import SimpleQueue
from typing import Any

from sfumato.events import Commit, Completion, Done, Draft
from sfumato.templates.requests import QueryFor, Result

Begin = Callable[[QueryFor[Any], Callable[[Any], None]], Callable[[], None]]
"""Begins a query in another thread, tells its outcomes there, and returns what cancels it."""


async def outcomes_of(begin: Begin, query: QueryFor[Any]) -> AsyncGenerator[Any]:
    """The outcomes of a query, in order; its error is raised. It is cancelled where nobody reads on."""
    loop = asyncio.get_running_loop()
    outcomes: asyncio.Queue[Any] = asyncio.Queue()

    def tell(outcome: Any) -> None:
        with suppress(RuntimeError):  # the loop has closed, so that nobody waits
            loop.call_soon_threadsafe(outcomes.put_nowait, outcome)

    cancel = begin(query, tell)
    try:
        while True:
            outcome = await outcomes.get()
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome
            if not isinstance(outcome, Draft | Commit):
                return
    finally:
        cancel()


async def result_of_query(begin: Begin, query: QueryFor[Result]) -> Result:
    """What a query ends with."""
    last: Any = None
    async with aclosing(outcomes_of(begin, query)) as outcomes:
        async for outcome in outcomes:
            last = outcome
    result: Result = _result(last)
    return result


def results_of(begin: Begin, queries: Sequence[QueryFor[Result]]) -> list[Result]:
    """What several queries end with, in their order, all of them begun at once; the first error ends all."""
    outcomes: SimpleQueue[tuple[int, Any]] = SimpleQueue()

    def listener(place: int) -> Callable[[Any], None]:
        return lambda outcome: outcomes.put((place, outcome))

    cancels = [begin(query, listener(place)) for place, query in enumerate(queries)]
    results: dict[int, Any] = {}
    try:
        while len(results) < len(queries):
            place, outcome = outcomes.get()
            if isinstance(outcome, Exception):
                raise outcome
            if not isinstance(outcome, Draft | Commit):
                results[place] = _result(outcome)
    finally:
        for cancel in cancels:
            cancel()
    return [results[place] for place in range(len(queries))]


def _result(outcome: Any) -> Any:
    return Completion.of(outcome) if isinstance(outcome, Done) else outcome
