"""`sfumato pull`: fetch a model from the hub into its cache, where every command then finds it by its id."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated

import typer

from sfumato.cli import hub
from sfumato.cli.output import harmless
from sfumato.errors import InputError
from sfumato.system.embedded import EMBEDDED


def command(
    model: Annotated[str, typer.Argument(help="A hub id: owner/name, or owner/name:Q4_K_M for one of its GGUF files.")],
    as_json: Annotated[bool, typer.Option("--json", help="A record instead of a sentence.")] = False,
) -> None:
    """Fetch a model from the Hugging Face hub, with a bar of progress; what is here already is not fetched again.

    Other commands fetch what they lack themselves. An interrupted download goes on where it stopped.

    Example: sfumato pull google/diffusiongemma-26B-A4B-it
    """
    if model in EMBEDDED:
        raise InputError(f"{model} is inside the package; there is nothing to fetch")
    if os.path.exists(os.path.expanduser(model)):
        raise InputError(f"{model} is a file or folder here; give a hub id, owner/name")
    if not hub.HUB_ID.fullmatch(model):
        raise InputError(f"{model} is no hub id; give owner/name, or owner/name:Q4_K_M for one of its GGUF files")

    from sfumato.checkpoints.locate import resolve  # only now: this costs the import of torch

    path = resolve(model)
    size = sum(file.stat().st_size for file in files_of(path))
    if as_json:
        print(json.dumps({"id": model, "path": str(path), "size_bytes": size}))
    else:
        print(harmless(f"{model}: {hub.in_words(size)} in {path}\nsfumato run {model}"))


def files_of(path: Path) -> list[Path]:
    """The files of a checkpoint: all of a folder, or a GGUF file with the other parts that it is split into."""
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file()]
    part = re.fullmatch(r"(.*-)\d{5}(-of-\d{5}\.gguf)", path.name)
    return [path] if part is None else sorted(path.parent.glob(f"{part[1]}?????{part[2]}"))
