"""The engine's jobs by kind and payload, taken from a query. To be deleted as soon as `engine.jobs` takes queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from sfumato.options import Options
from sfumato.server.backend import Outcome
from sfumato.templates.requests import Query
from sfumato.templates.slots import Slot


class JobsByKind:
    """`loop.Jobs` over jobs that are begun by kind, payload and options."""

    def __init__(self, jobs: Any) -> None:
        self.jobs = jobs

    def begin(self, id: str, query: Query) -> None:
        """Begin a job."""
        self.jobs.begin(id, *_parts(query))

    def is_slow(self, query: Query) -> bool:
        """Whether `begin` may take seconds."""
        return bool(self.jobs.is_slow(*_parts(query)))

    def cancel(self, id: str) -> None:
        """End a job."""
        self.jobs.cancel(id)

    def turn(self) -> Sequence[tuple[str, Outcome]]:
        """One turn."""
        outcomes: list[tuple[str, Outcome]] = self.jobs.turn()
        return outcomes

    @property
    def is_idle(self) -> bool:
        """Whether a turn would do nothing."""
        return bool(self.jobs.is_idle)

    def figures(self) -> object:
        """The batch's figures."""
        figures: object = self.jobs.figures()
        return figures


def _parts(query: Query) -> tuple[str, dict[str, Any], Options]:
    payload = {field.name: getattr(query, field.name) for field in fields(query) if field.name != "options"}
    if "template" in payload:
        pieces = payload["template"]
        payload["template"] = [asdict(piece) if isinstance(piece, Slot) else piece for piece in pieces]
    return type(query).__name__.lower(), payload, query.options
