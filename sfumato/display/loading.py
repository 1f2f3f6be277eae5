"""The bar of a model that loads: a line on a terminal's stderr, or an output of a notebook; nothing anywhere else.

It appears only where loading takes a while, and is gone afterwards. ASCII alone, so that any terminal can show it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from sfumato.display.canvas import Output, is_notebook
from sfumato.display.html import status_html

PATIENCE = 0.4
"""Seconds after which the bar appears."""
INTERVAL = 0.1
"""Seconds between two drawings."""
WIDTH = 24
"""Signs of the bar."""


class LoadingBar:
    """Called with (bytes loaded, bytes in all); `close` takes it away."""

    def __init__(self, draw: Callable[[str], None], take_away: Callable[[], None]) -> None:
        self._draw, self._take_away = draw, take_away
        self._began, self._drawn = time.monotonic(), 0.0

    def __call__(self, loaded: int, total: int) -> None:
        """Draw how far it is, where it is time to."""
        now = time.monotonic()
        if now - self._began < PATIENCE or (now - self._drawn < INTERVAL and loaded < total):
            return
        self._drawn = now
        self._draw(bar_of(loaded, total, now - self._began))

    def close(self) -> None:
        """Take the bar off the screen, if it is there."""
        if self._drawn:
            self._take_away()


def loading_bar(stream: TextIO | None = None) -> LoadingBar | None:
    """The bar for where this process runs: a notebook, or a terminal at `stream` (None: stderr). None: neither."""
    if is_notebook():
        output = Output()
        return LoadingBar(lambda text: output.draw(status_html(text), text), output.take_away)
    terminal = sys.stderr if stream is None else stream
    if terminal is None or terminal.closed or not terminal.isatty():
        return None

    def draw(text: str) -> None:
        terminal.write("\r" + text)
        terminal.flush()

    return LoadingBar(draw, lambda: draw("\x1b[2K"))


def bar_of(loaded: int, total: int, seconds: float) -> str:
    """`loading [######------------------]  25%  3.8 of 15.3 GB  12 s left`, for an even pace."""
    share = min(1.0, loaded / total) if total else 0.0
    filled = round(share * WIDTH)
    left = f"  {seconds * (1 - share) / share:3.0f} s left" if 0 < share < 1 else ""
    bar = "#" * filled + "-" * (WIDTH - filled)
    return f"loading [{bar}] {share:4.0%}  {loaded / 1e9:.1f} of {total / 1e9:.1f} GB{left}"
