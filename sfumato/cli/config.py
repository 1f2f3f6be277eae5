"""`sfumato config`: where the user's defaults stand, and what applies to a command that is given nothing."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sfumato.cli import settings
from sfumato.cli.tables import FittingTable
from sfumato.cli.view import visible
from sfumato.options import FALLBACK_DEFAULTS, LOAD_OPTIONS, OPTIONS
from sfumato.presets import SAMPLING


def command(as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False) -> None:
    """Show the path of your config.toml, each value that applies, and where it comes from.

    The file holds model, api and api_key_file, and the sections [load] and [options]. A flag is stronger than
    SFUMATO_MODEL, that than the file, and that than the default.

    Example: sfumato config
    """
    user = settings.read_settings()
    rows = effective(user)
    if as_json:
        values = {name: {"value": value, "from": source} for name, value, source in rows}
        print(json.dumps({"path": str(user.path), "exists": user.path.exists(), "values": values}, indent=2))
        return
    console = Console(highlight=False)
    console.print(visible(f"{user.path}{'' if user.path.exists() else '  (not there)'}"), soft_wrap=True)
    table = Table(box=None, padding=(0, 3, 0, 0), show_header=False)
    for name, value, source in rows:
        shown = "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        table.add_row(*(visible(text, "dim" if source == DEFAULT else "") for text in (name, shown, source)))
    console.print(FittingTable(table))


DEFAULT = "default"
"""The source of a value that nobody has set."""


def effective(user: settings.UserSettings) -> list[tuple[str, Any, str]]:
    """(key, value, where it comes from) of every key; None: nothing, or the checkpoint decides."""
    file = "config.toml"
    rows: list[tuple[str, Any, str]] = []
    for name in settings.PLACES:
        value = user.values.get(name)
        rows.append((name, value, DEFAULT if value is None else file))
    if user.variable is not None:
        rows[0] = ("model", user.variable, settings.VARIABLE)
        rows[1] = ("api", None, f"{settings.VARIABLE} is stronger")
    elif user.model is None and user.api is None:
        rows[0] = ("model", "nano", DEFAULT)
    for name in settings.LOADING:
        value, default = user.load.get(name), LOAD_OPTIONS[name].default
        if value is not None and name == "memory_limit":
            value = value / settings.GIGABYTE
        rows.append((f"load.{name}", default if value is None else value, DEFAULT if value is None else file))
    for name in SAMPLING:
        value, default = user.options.get(name), OPTIONS[name].default
        if value is None:
            value = "the checkpoint's" if name in FALLBACK_DEFAULTS else None if default == () else default
        rows.append((f"options.{name}", value, DEFAULT if name not in user.options else file))
    return rows
