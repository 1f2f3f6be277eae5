"""`sfumato quantize`: a checkpoint in fewer bits, streamed, in bounded memory; cut off, it goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfumato.cli.convert import run
from sfumato.quant import recipes


def command(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, .gguf file, or nano.")],
    to: Annotated[str, typer.Option(help=f"A recipe: {', '.join(recipes.RECIPES)}.")] = "int4",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder to write.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A record instead of a sentence.")] = False,
) -> None:
    """Write a checkpoint in fewer bits; it loads like any other, without a flag. docs/quantisation.md compares recipes.

    Takes about 3 GB of memory whatever the model's size. Run it again after an interruption and it goes on.

    Example: sfumato quantize google/diffusiongemma-26B-A4B-it --to int4 -o diffusiongemma-int4

    Example: sfumato quantize model-Q4_K_M.gguf --to int4 -o diffusiongemma-int4
    """
    recipe = recipes.named(to)
    run(model, recipe.name, output or Path(f"{Path(model).stem}-{recipe.name}"), as_json)
