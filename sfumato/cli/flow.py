"""Text that is printed while it comes, broken between words where a line of the terminal is full.

What stands within a code fence, and a word that no line can hold, is left to the terminal to break. The last line can
be held back, so that a canvas is drawn where it goes on.
"""

from __future__ import annotations

import re

from rich.console import Console
from rich.text import Text

_PARTS = re.compile(r"\n|[^\S\n]+|\S+")
_FENCE = "```"


class TextFlow:
    """Prints texts one behind the other."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._line = Text()
        """The line under way, as far as it is printed."""
        self._is_code = self._is_full = False

    def print(self, text: Text, is_last: bool = True) -> Text:
        """Print a text behind the last one. Where it `is_last` is false, its last line is held back, and returned."""
        text = text.copy()
        text.expand_tabs(8)
        shown, rest, was_code = Text(), Text(), self._is_code
        for match in _PARTS.finditer(text.plain):
            was_code = was_code if self._line else self._is_code
            part = self._broken(text[match.start() : match.end()])
            shown.append_text(part)
        if not is_last and self._line:
            at = shown.plain.rfind("\n") + 1
            shown, rest = shown[:at], shown[at:] + Text(" " * self._is_full)
            self._line, self._is_full, self._is_code = Text(), False, was_code
        self.console.print(shown, end="", soft_wrap=True)
        return rest

    def end(self) -> None:
        """End the line under way, if there is one."""
        if self._line or self._is_full:
            self.console.print()
        self._line, self._is_full = Text(), False

    def _broken(self, part: Text) -> Text:
        """What to print for a line feed, some spaces or a word."""
        if part.plain == "\n":
            self._line, self._is_full = Text(), False
            return part
        is_over = self._line.cell_len + part.cell_len > self.console.width
        if self._is_code or not self._line or not is_over:
            has_break = self._is_full
        elif part.plain.isspace():  # at the end of a row it is not seen
            self._is_full = True
            return Text()
        else:
            has_break = self._is_full or part.cell_len <= self.console.width
        if has_break:
            self._line, self._is_full = Text(), False
        if not self._line and part.plain.startswith(_FENCE):
            self._is_code = not self._is_code
        self._line = self._line + part
        return Text("\n") + part if has_break else part
