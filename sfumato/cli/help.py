"""Help for narrow terminals: a flag on a line of its own, and what it does below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INDENT = 4


def stack_help(command: Any, width: int) -> None:
    """Let a click command, and those below it, lay out its help in so many columns, for any width."""
    context = command.context_class
    if not issubclass(context.formatter_class, StackedRows):
        formatter = type("StackedFormatter", (StackedRows, context.formatter_class), {"columns": width})
        command.context_class = type("NarrowContext", (context,), {"formatter_class": formatter})
    for one in getattr(command, "commands", {}).values():
        stack_help(one, width)


class StackedRows:
    """What such a formatter does otherwise than click's, which keeps the flags in a column of 30."""

    columns: int

    def __init__(self, **_: Any) -> None:
        super().__init__(width=self.columns)  # type: ignore[call-arg]

    def write_dl(self: Any, rows: Sequence[tuple[str, str]], *_: Any, **__: Any) -> None:
        """Write terms and what they mean."""
        for term, meaning in rows:
            self.write_text(term)
            self.current_indent += INDENT
            self.write_text(meaning)
            self.current_indent -= INDENT
