"""The model that a command works with: loaded here, or behind a URL (`--api`); that way torch is never imported.

Which one, the command's flags say, else the user's settings, else it is nano. A server of the settings file is for
commands that name neither a model nor a server: what is named by a flag or by SFUMATO_MODEL is loaded here.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sfumato.cli import files
from sfumato.cli.flags import Group, flag, group_of
from sfumato.cli.options import names_of_flag
from sfumato.cli.settings import read_settings
from sfumato.cli.view import visible
from sfumato.errors import InputError
from sfumato.options import LOAD_OPTIONS, LoadOptions
from sfumato.presets import PRECISION
from sfumato.remote import Remote
from sfumato.system.embedded import EMBEDDED
from sfumato.templates.interface import LanguageModel

if TYPE_CHECKING:
    from sfumato.llm import LLM


def known_models(incomplete: str) -> list[str]:
    """The models that the shell offers: those inside the package, and what the hub's cache holds."""
    from sfumato.cli.hub import cached_ids

    return [name for name in (*EMBEDDED, *cached_ids()) if name.startswith(incomplete)]


ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Checkpoint folder, .gguf file, hub id, or nano; with --api, a model there. "
        "Default: SFUMATO_MODEL, else that of `sfumato config`, else nano.",
        autocompletion=known_models,
    ),
]


WHICH = "Which model"
"""The panel of --help with the flags below."""


@dataclass(frozen=True)
class ApiFlags:
    """Which model: one loaded here, or that of a server."""

    model: ModelName = None
    api: Annotated[
        str | None,
        typer.Option("--api", metavar="URL", help="Use the model of this server, not one loaded here."),
    ] = None
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Its key; others on this machine can see it."),
    ] = None
    api_key_file: Annotated[str | None, typer.Option(metavar="FILE", help="A file that holds the key.")] = None


def positional(group: Group, name: str = "model") -> Group:
    """The group with MODEL as an argument too, first or after -m; both, and different, are an InputError."""
    declaration = typer.Argument(metavar="[MODEL]", help="The same as --model.", autocompletion=known_models)

    def make(place: str | None, **values: Any) -> object:
        if place is not None and values[name] not in (None, place):
            raise InputError(f"MODEL is {place} and --model is {values[name]}; give one of them")
        return group.make(**values | ({} if place is None else {name: place}))

    return Group((flag("place", Annotated[str | None, declaration], None), *group.parameters), make)


@dataclass(frozen=True)
class ModelFlag:
    """Which model, for a command that loads one here."""

    model: ModelName = None

    @property
    def name(self) -> str:
        """The model that is named, here or in the settings, else nano."""
        return self.model or read_settings().model or "nano"


API, MODEL = group_of(ApiFlags, WHICH), group_of(ModelFlag, WHICH)
"""The flags of commands that a server can serve too, and of those that load a model here."""


def connect_or_load(api: ApiFlags, load: LoadOptions) -> LanguageModel:
    """The model behind a URL, or one loaded here; InputError for an option of the one that came with the other."""
    settings = read_settings()
    url, name, key_file = api.api, api.model, api.api_key_file
    if url is None and name is None:
        url, name = settings.api, settings.model
        key_file = settings.values.get("api_key_file") if url and api.api_key is None and key_file is None else key_file
    if url is None:
        if api.api_key is not None or api.api_key_file is not None:
            raise InputError("an API key is given without --api; give the server's URL too")
        return load_model(replace(load, model=name or "nano"))
    usual = replace(LoadOptions(), **settings.load)
    for option in LOAD_OPTIONS:
        if getattr(load, option) not in (getattr(usual, option), ""):
            flag_name = names_of_flag(option)[0]
            more = "; give -m NAME for an adapter of the server's" if option == "adapters" else ""
            more = "; a preset may set it too" if option in PRECISION else more
            raise InputError(f"{flag_name} is for a model loaded here; leave it out with --api{more}")
    key = api.api_key
    if key_file is not None:
        if key is not None:
            raise InputError("--api-key and --api-key-file are given together; give one of them")
        key = files.read(key_file).strip()
    remote = Remote(url, key, name)
    if remote.is_key_exposed:
        print(f"sfumato: the API key goes to {url} unencrypted; use https if the server has it", file=sys.stderr)
    return remote


def load_model(load: LoadOptions, is_in_full: bool = False) -> LLM:
    """Load a model, perhaps with its weights `in_full`; notices and a bar of progress go to stderr."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from sfumato.checkpoints.checkpoint import in_full
    from sfumato.checkpoints.detect import open_checkpoint
    from sfumato.checkpoints.locate import resolve
    from sfumato.llm import LLM

    console = Console(stderr=True, highlight=False)
    columns = ("loading", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)

        def notice(text: str) -> None:
            console.print(visible(text, "dim"), soft_wrap=True)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if is_in_full:
            checkpoint = in_full(open_checkpoint(resolve(load.model)))
            return LLM.of(checkpoint, load, notice=notice, progress=progress)
        llm = LLM.open(load, notice=notice, progress=progress)
    if load.adapters:
        llm.defaults["adapter"] = next(iter(load.adapters))
    return llm
