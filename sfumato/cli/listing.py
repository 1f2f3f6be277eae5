"""`sfumato list`: the models that are here."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sfumato.cli import hub
from sfumato.cli.tables import FittingTable
from sfumato.cli.view import visible


def command(as_json: Annotated[bool, typer.Option("--json", help="A list of records.")] = False) -> None:
    """List the models of the package and of the hub's cache that Sfumato can read: format, size on disk, date.

    Example: sfumato list
    """
    models = [*hub.embedded(), *hub.cached_models()]
    if as_json:
        records = [
            {
                "id": model.id,
                "format": model.format,
                "size_bytes": model.size_bytes,
                "date": model.date.isoformat(timespec="seconds"),
                "is_whole": model.is_whole,
                "path": str(model.folder),
            }
            for model in models
        ]
        print(json.dumps(records, indent=2))
        return
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for column, side in (("model", "left"), ("format", "left"), ("size", "right"), ("date", "left")):
        table.add_column(column, justify=side, overflow="fold")  # type: ignore[arg-type]
    for model in models:
        form = model.format if model.is_whole else "configuration only"
        cells = (model.id, form, hub.in_words(model.size_bytes), _day(model.date))
        table.add_row(*map(visible, cells))
    Console(highlight=False).print(FittingTable(table))


def _day(date: datetime) -> str:
    return date.strftime("%Y-%m-%d %H:%M")
