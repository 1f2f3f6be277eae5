"""`sfumato quantize`: a checkpoint in fewer bits, streamed, in bounded memory; cut off, it goes on where it was."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from sfumato.checkpoints.convert import check_target
from sfumato.cli import options as opt
from sfumato.cli import text as texts
from sfumato.cli.convert import run
from sfumato.errors import InputError
from sfumato.quant import recipes


def command(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, .gguf file, or nano.")],
    to: Annotated[str, typer.Option(help=f"A recipe: {', '.join(recipes.RECIPES)}.")] = "int4",
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
    recipe = recipes.named(to)
    target = opt.out_path(f"{Path(model).stem}-{recipe.name}" if output is None else output, "--output")
    check_target(target.expanduser(), recipe.name, force)  # before the samples are read, which takes long
    seen = learnt(model, recipe, read_samples(calibrate)) if calibrate else None
    run(model, recipe.name, target, force, as_json, seen)


def read_samples(path: Path) -> list[str | list[dict[str, Any]]]:
    """Texts and conversations of a file. InputError for a line that is neither, or no text at all."""
    content = texts.read(str(path))
    if path.suffix != ".jsonl":
        found: list[Any] = [part.strip() for part in content.split("\n\n") if part.strip()]
    else:
        found = []
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip():
                continue
            value = opt.read_json(line, f"{path}, line {number}")
            one = value.get("messages", value.get("text")) if isinstance(value, dict) else None
            if not isinstance(one, str | list):
                raise InputError(f'{path}, line {number} has neither a "text" nor "messages"; give one of them')
            found.append(one)
    if not found:
        raise InputError(f"{path} holds no text; give some dozens of prompts with their answers")
    return found


def learnt(model: str, recipe: recipes.Recipe, samples: list[str | list[dict[str, Any]]]) -> dict[str, Tensor]:
    """What `quant.calibrate` learns of these samples."""
    from sfumato.llm import LLM
    from sfumato.quant import calibrate

    llm = LLM.load(model, ops="fused", quantize=None)
    most = llm.model.config.max_position
    ids = [llm.encode(sample).tokens[:most] for sample in samples]

    def tell(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(
                f"\rreading samples: {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True
            )

    return calibrate.learnt(llm.model, recipe, ids, progress=tell)
