"""The model that a command works with: loaded here, or behind a URL (`--api`); that way torch is never imported."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sfumato.cli import files
from sfumato.cli.view import visible
from sfumato.errors import InputError
from sfumato.options import LOAD_OPTIONS, LoadOptions
from sfumato.remote import Remote
from sfumato.templates.interface import LanguageModel

if TYPE_CHECKING:
    from sfumato.llm import LLM


@dataclass(frozen=True)
class ApiFlags:
    """Which model: one loaded here, or that of a server."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Checkpoint folder, hub id, or nano (the default); with --api, a model there."
        ),
    ] = None
    api: Annotated[
        str | None, typer.Option("--api", metavar="URL", help="Use the model of this server, not one loaded here.")
    ] = None
    api_key: Annotated[str | None, typer.Option(metavar="KEY", help="Its key; others on this machine can see it.")] = (
        None
    )
    api_key_file: Annotated[str | None, typer.Option(metavar="FILE", help="A file that holds the key.")] = None


def connect_or_load(api: ApiFlags, load: LoadOptions) -> LanguageModel:
    """The model behind a URL, or one loaded here; InputError for an option of the one that came with the other."""
    if api.api is None:
        if api.api_key is not None or api.api_key_file is not None:
            raise InputError("an API key is given without --api; give the server's URL too")
        return load_model(load if api.model is None else replace(load, model=api.model))
    for name, option in LOAD_OPTIONS.items():
        if getattr(load, name) not in (option.default, ""):
            raise InputError(f"--{name.replace('_', '-')} is for a model loaded here; leave it out with --api")
    key = api.api_key
    if api.api_key_file is not None:
        if key is not None:
            raise InputError("--api-key and --api-key-file are given together; give one of them")
        key = files.read(api.api_key_file).strip()
    remote = Remote(api.api, key, api.model)
    if remote.is_key_exposed:
        print(f"sfumato: the API key goes to {api.api} unencrypted; use https if the server has it", file=sys.stderr)
    return remote


def load_model(load: LoadOptions) -> LLM:
    """Load a model; notices and a bar of progress go to stderr."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from sfumato.llm import LLM

    console = Console(stderr=True, highlight=False)
    columns = ("loading", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)
        return LLM.open(
            load,
            notice=lambda text: console.print(visible(text, "dim"), soft_wrap=True),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
