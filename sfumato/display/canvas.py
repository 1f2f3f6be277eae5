"""A canvas that denoises in a notebook: one output cell, redrawn in place at every step.

IPython is imported here alone, and only where a notebook runs, so that it is no dependency.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from sfumato.display.html import canvas_html, framed, status_html
from sfumato.errors import InputError
from sfumato.events import Commit, Done, Draft, Event


def is_notebook() -> bool:
    """Whether this process is a notebook's kernel, rather than a terminal or a program."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


class Output:
    """A place in the notebook's output that is drawn again and again, as HTML and as plain text for what shows none.

    `take_away` empties it."""

    def __init__(self) -> None:
        self._display: Any = import_module("IPython.display")
        self._handle: Any = None

    def draw(self, html: str, plain: str) -> None:
        """Show this in the place of what is there."""
        frame = {"text/html": html, "text/plain": plain}
        if self._handle is None:
            self._handle = self._display.display(frame, raw=True, display_id=True)
        else:
            self._handle.update(frame, raw=True)

    def take_away(self) -> None:
        """Show nothing."""
        if self._handle is not None:
            self.draw("", "")


class CanvasDisplay:
    """Draws the events of an answer: what is committed, then the canvas, then a line of figures.

    InputError where no notebook runs."""

    def __init__(self, output: Callable[[], Output] = Output) -> None:
        if not is_notebook():
            raise InputError(
                "there is no notebook to draw in; in a program use stream(…, drafts=True), in a terminal `sfumato chat`"
            )
        self._output = output()
        self._text = ""

    def show(self, event: Event) -> None:
        """Draw what has become of the answer with this event."""
        if isinstance(event, Draft):
            canvas = canvas_html(event.pieces[: event.end], event.entropies, event.accepted, self._text)
            self._output.draw(canvas + status_html(_status(event)), self._text + event.text)
        elif isinstance(event, Commit):
            self._text += event.text
            self._output.draw(framed(self._text), self._text)
        elif isinstance(event, Done):
            self._output.draw(framed(event.text) + status_html(_ending(event)), event.text)


def _status(draft: Draft) -> str:
    mean = sum(draft.entropies) / max(1, len(draft.entropies))
    accepted = f"{sum(draft.accepted)}/{len(draft.accepted)} accepted"
    return f"canvas {draft.canvas + 1} · step {draft.step} · {accepted} · entropy {mean:.3f} nats"


def _ending(done: Done) -> str:
    calls = "".join(f" · calls {call.get('name')}" for call in done.tool_calls)
    cut = "" if done.finish_reason == "stop" else " · cut at the length limit"
    return f"{done.usage.summary} · seed {done.seed}{calls}{cut}"
