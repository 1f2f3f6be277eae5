"""`sfumato rm`: remove a model from the hub's cache, and nothing else."""

from __future__ import annotations

import shutil
import sys
from typing import Annotated

import typer

from sfumato.cli import hub
from sfumato.cli.loading import known_models
from sfumato.cli.output import harmless
from sfumato.errors import InputError, SfumatoError
from sfumato.system.embedded import EMBEDDED


def command(
    model: Annotated[
        str, typer.Argument(help="Its id, as `sfumato list` shows it.", autocompletion=known_models, metavar="ID")
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a model from the hub's cache, with all its revisions. Folders and files of yours are never touched.

    Example: sfumato rm google/diffusiongemma-26B-A4B-it
    """
    if model in EMBEDDED:
        raise InputError(f"{model} is inside the package, and cannot be removed")
    entry = hub.cached_model(model)
    size = hub.in_words(entry.size_bytes)
    if not yes:
        if not sys.stdin.isatty():
            raise InputError(f"{model} has {size}; give --yes to remove it without being asked")
        print(harmless(f"{entry.folder}: {size}"))
        if input("Remove it? [y/N] ").strip().lower() not in ("y", "yes"):
            raise typer.Exit(1)
    try:
        shutil.rmtree(entry.folder)
    except OSError as error:
        raise SfumatoError(f"cannot remove {entry.folder}: {error.strerror or error}; remove it by hand") from None
    shutil.rmtree(entry.folder.parent / ".locks" / entry.folder.name, ignore_errors=True)
    print(harmless(f"removed {model}, {size}"))
