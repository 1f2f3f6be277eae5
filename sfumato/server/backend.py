"""What the routes need of whatever runs the model: jobs in, events out. `Worker` is one; tests pass a fake.

Nothing here imports torch, nor the web framework.
"""

from __future__ import annotations

import traceback
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sfumato.events import Decisions, Edited, Event, Filled, Scored, TokenCount
from sfumato.model.loaded import AdapterList, AdapterSize
from sfumato.model.purpose import Purpose
from sfumato.templates.requests import AdapterQuery, Query

Result = Filled | Edited | Decisions | Scored | TokenCount | AdapterList
"""What a job ends with that is no answer."""

Outcome = Event | Result | Exception
"""What comes of a job: events or a result, or the error that ends it."""


@dataclass(frozen=True)
class Job:
    """One query to the model, and its name everywhere: in the worker, in the engine and in its events."""

    id: str
    """No other job of the server ever has it. It begins with the id of the HTTP request."""
    query: Query | AdapterQuery

    @property
    def request(self) -> str:
        """The id of the HTTP request, as logs have it."""
        return self.id.partition("/")[0].partition(NUMBER)[0]


NUMBER = "~"
"""What stands in a job's id between a request's id that a client chose and the number that makes it unique."""


@dataclass(frozen=True)
class ModelCard:
    """What a client may know of the loaded model."""

    name: str
    canvas_length: int
    max_position: int
    vocab_size: int
    is_diffusion: bool
    has_chat: bool
    parameters: int
    dtype: str
    ops: str
    quantised: str | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    """The checkpoint's own values of options that a request leaves open."""
    preset: Mapping[str, Any] = field(default_factory=dict)
    """The server's values of options that a request leaves open; they go before the checkpoint's."""
    purpose: Purpose | None = None
    """What the model is for, where it is for one thing alone."""
    adapters: tuple[AdapterSize, ...] = ()
    """Those that are loaded, by name."""
    adapter: str | None = None
    """Of these, the one that a request asks for; None: the model as it is."""


@dataclass(frozen=True)
class Stats:
    """Figures of the worker at one moment; those that count only grow, over restarts too."""

    queue: int = 0
    rows: int = 0
    rows_max: int = 0
    steps: int = 0
    canvases: int = 0
    tokens: int = 0
    passes: int = 0
    tokens_per_pass: float = 0.0
    """Of the answers that ended lately."""
    prefix_hits: int = 0
    prefix_tokens: int = 0
    cache_bytes: int = 0
    prefix_bytes: int = 0
    adapters: int = 0
    adapter_bytes: int = 0
    """What the factors of adapters take, beside the weights."""
    memory_bytes: int = 0
    restarts: int = 0
    stalled: float = 0.0
    """Seconds for which the job that has been prepared for longest has been prepared."""


def where(error: BaseException, depth: int = 8) -> str:
    """The kind of an error and the last places it came through; not its words, which may be a prompt's."""
    frames = traceback.extract_tb(error.__traceback__)[-depth:]
    return " < ".join([type(error).__name__, *(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))])


class Backend(Protocol):
    """Runs jobs. WorkerError while there is no worker, or when it ends under a job."""

    async def start(self) -> None:
        """Return when the model is loaded; raise what keeps it from loading."""
        ...

    async def stop(self, drain_seconds: float) -> None:
        """Take no more jobs, wait so long for those under way, then end."""
        ...

    async def card(self) -> ModelCard:
        """The loaded model's card."""
        ...

    def run(self, job: Job) -> AsyncGenerator[Event | Result, None]:
        """Draft (if options.drafts), Commit and Done for `Chat` and `Complete`; for the others drafts and one `Result`.

        InputError, CapacityError and BusyError come before any event. Closing the iterator cancels the job: its row is
        free within one step."""
        ...

    async def change_adapters(self, job: Job) -> ModelCard:
        """Carry out an `AdapterQuery` in every process that runs the model; the card with what is loaded then.

        InputError, CapacityError."""
        ...

    def is_ready(self) -> bool:
        """Whether jobs are taken."""
        ...

    def stats(self) -> Stats:
        """The worker's figures, as it last sent them."""
        ...
