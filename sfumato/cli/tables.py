"""Tables on the screen: rows beside one another where the terminal is wide enough, else one below the other.

Where a column would be squeezed to a few letters, each row becomes its first cell and, below it, a line for every other
cell: the column's name and the cell.
"""

from __future__ import annotations

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

RULE = box.Box("    \n    \n ── \n    \n    \n    \n    \n    \n", ascii=True)
"""A line below the head and nothing else. It is called ASCII, so that rich draws no frame in its place where the
encoding lacks the line: there the stream writes a stand-in."""
_READABLE = 18
"""Columns that a wrapped text needs at least, if it is not shorter."""
_FRAME = 2
"""Columns that a table takes beside its cells."""


class FittingTable:
    """A table, or its rows as records where it does not fit."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = self.table.columns
        needed = _FRAME + sum(self._needed(console, options, column) for column in columns)
        if needed <= options.max_width:
            yield self.table
            return
        for row in zip(*(column.cells for column in columns), strict=True):
            if (first := _text(console, row[0])).plain or not any(_text(console, cell).plain for cell in row):
                yield first
            for column, cell in zip(columns[1:], row[1:], strict=True):
                text = _text(console, cell)
                if text.plain:
                    name = Text(str(column.header), style="dim")
                    yield Padding(Text(" ").join((name, text)) if name.plain else text, (0, 0, 0, 2))

    def _needed(self, console: Console, options: ConsoleOptions, column: Column) -> int:
        """Columns of the screen: for all of a cell that is not wrapped, for a readable part of one that is."""
        cells = [column.header, *column.cells] if self.table.show_header else [*column.cells]
        wide = options.update(max_width=1000)
        natural = max((Measurement.get(console, wide, cell).maximum for cell in cells), default=0)
        return self.table.padding[1] + (natural if column.no_wrap else min(natural, _READABLE))


def _text(console: Console, cell: RenderableType) -> Text:
    return console.render_str(cell) if isinstance(cell, str) else cell if isinstance(cell, Text) else Text(str(cell))
