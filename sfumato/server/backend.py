"""What the routes need of whatever runs the model: jobs in, events out. `worker.Worker` is one; tests pass a fake.

Nothing here imports torch, nor the web framework.
"""

from __future__ import annotations

import traceback
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from sfumato.events import Decision, Edited, Event, Filled
from sfumato.options import Options

Result = Filled | Edited | dict[str, Decision]
"""What a job on a template ends with."""


@dataclass(frozen=True)
class Job:
    """One request to the model. The payload holds the arguments of `LLM`'s method of that kind:

    chat      messages, tools (or None)
    complete  prompt (text or token ids)
    infill    prefix, suffix, length, at_most
    edit      text, instruction, spans, strength
    fill      template (texts and slot objects), prompt (text, messages or None)
    decide    prompt (text or messages), fields, steps
    """

    kind: Literal["chat", "complete", "infill", "edit", "fill", "decide"]
    request: str
    """The request's id, for logs."""
    payload: dict[str, Any]
    options: Options


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

    async def start(self) -> None: ...

    async def stop(self, drain_seconds: float) -> None:
        """Take no more jobs, wait so long for those under way, then end."""
        ...

    async def card(self) -> ModelCard: ...

    def run(self, job: Job) -> AsyncGenerator[Event | Result, None]:
        """Draft (if options.drafts), Commit and Done for chat and complete; for the others drafts and one `Result`.

        InputError, CapacityError and BusyError come before any event. Closing the iterator cancels the job: its row is
        free within one step."""
        ...

    def is_ready(self) -> bool: ...

    def stats(self) -> Stats: ...
