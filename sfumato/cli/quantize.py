"""`sfumato quantize`: write a checkpoint in fewer bits, streamed, in bounded memory, and resumable."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli import files, loading
from sfumato.cli import options as opt
from sfumato.cli.convert import run
from sfumato.errors import InputError
from sfumato.options import LoadOptions
from sfumato.quant import recipes

if TYPE_CHECKING:
    from torch import Tensor


def recipe_names(incomplete: str) -> list[str]:
    """The recipes that the shell offers."""
    return [name for name in recipes.RECIPES if name.startswith(incomplete)]


def command(
    model: Annotated[
        str, typer.Argument(help="Checkpoint folder, hub id, .gguf file, or nano.", autocompletion=loading.known_models)
    ],
    to: Annotated[
        str, typer.Option(help=f"A recipe: {', '.join(recipes.RECIPES)}.", autocompletion=recipe_names)
    ] = "int4",
    output: Annotated[str | None, typer.Option("--output", "-o", help="The folder to write.")] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Sample texts with their answers: JSON lines with "text" or "messages", or text with blank lines '
            "between. The model is loaded in full precision for it.",
        ),
    ] = None,
    force: opt.Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="A record instead of a sentence.")] = False,
) -> None:
    """Write a checkpoint in fewer bits; it loads like any other, without a flag. docs/quantisation.md compares recipes.

    Takes some 3 GB of memory whatever the model's size, except to calibrate. Run it again after an interruption and it
    goes on.

    Example: sfumato quantize google/diffusiongemma-26B-A4B-it --to int4 -o diffusiongemma-int4

    Example: sfumato quantize model-Q4_K_M.gguf --to int4 -o diffusiongemma-int4
    """
    from sfumato.checkpoints.convert import check_target  # only now: this costs the import of torch

    recipe = recipes.named(to)
    target = files.out_path(f"{Path(model).stem}-{recipe.name}" if output is None else output, "--output")
    check_target(target.expanduser(), recipe.name, force)  # before the samples are read, which takes long
    calibration = calibration_of(model, recipe, read_samples(calibrate)) if calibrate else None
    run(model, recipe.name, target, force, as_json, calibration)


def read_samples(path: Path) -> list[str | list[dict[str, Any]]]:
    """Texts and conversations of a file. InputError for a line that is neither, or no text at all."""
    content = files.read(str(path))
    samples: list[str | list[dict[str, Any]]] = []
    if path.suffix != ".jsonl":
        samples += [part.strip() for part in content.split("\n\n") if part.strip()]
    else:
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip():
                continue
            value = files.parse_json(line, f"{path}, line {number}")
            sample = value.get("messages", value.get("text")) if isinstance(value, dict) else None
            if not isinstance(sample, str | list):
                raise InputError(f'{path}, line {number} has neither a "text" nor "messages"; give one of them')
            samples.append(sample)
    if not samples:
        raise InputError(f"{path} holds no text; give some dozens of prompts with their answers")
    return samples


def calibration_of(model: str, recipe: recipes.Recipe, samples: list[str | list[dict[str, Any]]]) -> dict[str, Tensor]:
    """What `quant.calibrate` learns of these samples, with the model in full precision."""
    from sfumato.quant import calibrate

    llm = loading.load_model(LoadOptions(model, ops="fused"), is_in_full=True)
    most = llm.model.config.max_position
    ids = [llm.encode(sample).tokens[:most] for sample in samples]

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\rreading samples: {done} of {total}", end=end, file=sys.stderr, flush=True)

    return calibrate.calibration_of(llm.model, recipe, ids, progress=progress)
