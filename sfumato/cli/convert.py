"""`sfumato convert`: write a checkpoint in another format, for Sfumato or for other programs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sfumato.checkpoints.targets import TARGETS
from sfumato.cli import files
from sfumato.cli import options as opt
from sfumato.cli.loading import known_models
from sfumato.cli.output import harmless
from sfumato.cli.view import visible

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = "; ".join(f"{name}: {what}" for name, what in TARGETS.items())


def targets(incomplete: str) -> list[str]:
    """The formats that the shell offers."""
    return [name for name in TARGETS if name.startswith(incomplete)]


def command(
    model: Annotated[
        str, typer.Argument(help="Checkpoint folder, hub id, .gguf file, or nano.", autocompletion=known_models)
    ],
    to: Annotated[str, typer.Option(help=f"{FORMATS}.", autocompletion=targets)],
    output: Annotated[str, typer.Option("--output", "-o", help="The folder to write; for GGUF a file.")],
    adapter: Annotated[
        str | None, typer.Option(metavar="DIR", help="An adapter (LoRA) of this model, to merge in on the way.")
    ] = None,
    force: opt.Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="A record instead of a sentence.")] = False,
) -> None:
    """Read a checkpoint in any known format and write it in another: safetensors, GGUF, MLX, compressed-tensors.

    Known are the released layout, Sfumato's own, GGUF, compressed-tensors (FP8, NVFP4), modelopt NVFP4, MLX affine and
    AWQ. Weights in fewer bits are unpacked, and packed anew for the other format. After an interruption, run it again
    and it goes on. With --adapter the result is the tuned model.

    Example: sfumato convert google/diffusiongemma-26B-A4B-it --to mlx-4bit -o diffusiongemma-mlx

    Example: sfumato convert diffusiongemma-Q8_0.gguf --to bf16 -o diffusiongemma

    Example: sfumato convert google/diffusiongemma-26B-A4B-it --adapter tuned/adapter --to int4 -o tuned/int4
    """
    run(model, to, files.out_path(output, "--output"), force, as_json, adapter=adapter)


def run(
    model: str,
    to: str,
    output: Path,
    force: bool,
    as_json: bool,
    calibration: Mapping[str, Tensor] | None = None,
    adapter: str | None = None,
) -> None:
    """Convert, with progress on stderr and the result on stdout. `calibration`: what samples say of each weight."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    from sfumato.checkpoints import convert  # only now: these cost the import of torch
    from sfumato.measure.work import size

    console = Console(stderr=True, highlight=False)
    columns = ("writing", BarColumn(), DownloadColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    began = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        result = convert.convert(model, to, output, progress, calibration, force, adapter)
    for notice in result.notices:
        console.print(visible(notice, "dim"))
    seconds = time.perf_counter() - began
    if as_json:
        record = {"path": str(result.path), "from": result.source, "to": to, "seconds": round(seconds, 2)}
        record |= {"adapter": adapter} if adapter is not None else {}
        print(json.dumps({**record, "read_bytes": result.read_bytes, "written_bytes": result.written_bytes}))
        return
    merged = f", {adapter} merged in" if adapter is not None else ""
    sizes = f"{size(result.written_bytes)} ({to}) from {size(result.read_bytes)} ({result.source}){merged}"
    print(harmless(f"{result.path}: {sizes}, {seconds:.1f} s"))
