"""Help in plain lines, for terminals that are narrow or lack characters; on a narrow one each flag has its own line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sfumato.cli.output import encodable

NARROW = 64
"""Columns below which the columns of a table of flags would be a few letters wide."""
_INDENT = 4


def write_plainly(command: Any, width: int) -> None:
    """Let a click command, and those below it, lay out its help in so many columns, for any width."""
    context = command.context_class
    if not issubclass(context.formatter_class, PlainHelp):
        formatter = type("PlainFormatter", (PlainHelp, context.formatter_class), {"columns": width})
        command.context_class = type("PlainContext", (context,), {"formatter_class": formatter})
    for one in getattr(command, "commands", {}).values():
        write_plainly(one, width)


class PlainHelp:
    """What such a formatter does otherwise than click's: that keeps flags in a column of 30, and writes in UTF-8."""

    columns: int

    def __init__(self, **_: Any) -> None:
        super().__init__(width=self.columns)  # type: ignore[call-arg]

    def write_dl(self: Any, rows: Sequence[tuple[str, str]], *places: Any, **named: Any) -> None:
        """Write terms and what they mean."""
        if self.columns >= NARROW:
            super().write_dl(rows, *places, **named)  # type: ignore[misc]
            return
        for term, meaning in rows:
            self.write_text(term)
            self.current_indent += _INDENT
            self.write_text(meaning)
            self.current_indent -= _INDENT

    def getvalue(self: Any) -> str:
        """The text, in characters that the terminal has."""
        return encodable(super().getvalue())  # type: ignore[misc]
