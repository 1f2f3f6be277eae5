"""`sfumato info`: what a model holds, what it needs, and what hardware could reach at best; from config.json alone.

Arithmetic over the config, no weights: parameters, bytes by recipe and context, the GPUs that have room for them, and
the floor that a GPU's memory bandwidth and arithmetic set under the time of one step. `bench` measures against the same
figures. A floor lacks activations, kernels and everything else that only makes a step slower: it is no forecast.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sfumato.cli.info_report import operations, report
from sfumato.cli.info_screen import show
from sfumato.measure.work import detected_gpu, named_gpu
from sfumato.model.config import ModelConfig


def command(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a config.json, a hub id, or nano.")],
    gpu: Annotated[str | None, typer.Option(help="A GPU by name, like H200 or 'RTX 4090'. Default: this one.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of context to reckon with. Default: 8192.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same figures as JSON.")] = False,
) -> None:
    """Parameters, what each recipe needs, where it fits, and which operations can run on this machine.

    For a GPU also the floor that it sets under one denoising step. Works from config.json alone: no weights are read,
    or fetched from the hub.

    Example: sfumato info google/diffusiongemma-26B-A4B-it

    Example: sfumato info path/to/config.json --gpu "RTX 4090" --context 32768 --json
    """
    config, name = read_config(model)
    chosen = named_gpu(gpu) if gpu is not None else detected_gpu()
    figures = report(config, context or min(8192, config.max_position), chosen, name)
    figures["operations"] = operations()
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        show(figures)


def read_config(model: str) -> tuple[ModelConfig, str]:
    """The config of a config.json, a folder, "nano" or a hub id (of which no weights are fetched), and its name."""
    path = Path(model)
    if path.is_file():
        return ModelConfig.from_file(path), str(path)
    if not path.is_dir():
        from sfumato.checkpoints.locate import resolve  # only now: this costs the import of torch

        return ModelConfig.from_file(resolve(model, weights=False) / "config.json"), model
    return ModelConfig.from_file(path / "config.json"), path.resolve().name
