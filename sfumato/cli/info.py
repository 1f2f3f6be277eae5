"""`sfumato info`: what a model holds, what it needs, and what hardware could reach at best.

Where there are files of weights, their headers say the format and what tensors are stored as, and a part of one weight
of each kind what it is held as. The rest is arithmetic over the config: parameters, bytes by recipe and context, the
GPUs that have room for them, and the floor that a GPU's memory bandwidth and arithmetic set under the time of one step.
`bench` measures against the same figures. A floor lacks activations, kernels and everything else that only makes a step
slower: it is no forecast.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sfumato.cli import flags, loading
from sfumato.system.embedded import EMBEDDED

if TYPE_CHECKING:
    from sfumato.checkpoints.checkpoint import Checkpoint
    from sfumato.model.config import ModelConfig


@flags.takes(source=loading.positional(loading.MODEL))
def command(
    *,
    source: loading.ModelFlag,
    gpu: Annotated[str | None, typer.Option(help="A GPU by name, like H200 or 'RTX 4090'. Default: this one.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of context to reckon with. Default: 8192.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same figures as JSON.")] = False,
) -> None:
    """Parameters, what each recipe needs, where it fits, and which operations can run on this machine.

    For a GPU also the floor that it sets under one denoising step. Of a folder or a .gguf file the format too, and
    what it takes in memory as it is; a config.json, which may be named alone, is enough for the rest, and nothing is
    fetched from the hub.

    Of a folder with an adapter (LoRA): the model that it was made for, its rank, what it changes, its size.

    Example: sfumato info google/diffusiongemma-26B-A4B-it

    Example: sfumato info path/to/config.json --gpu "RTX 4090" --context 32768 --json
    """
    # Only now: these cost the import of torch.
    from sfumato.cli.info_report import adapter_facts, file_report, operations, report
    from sfumato.cli.info_screen import show, show_adapter
    from sfumato.measure.work import detected_gpu, named_gpu

    if (facts := adapter_facts(Path(source.name))) is not None:
        print(json.dumps({"adapter": facts}, indent=2)) if as_json else show_adapter(source.name, facts)
        return
    config, name, checkpoint = describe(source.name)
    chosen = named_gpu(gpu) if gpu is not None else detected_gpu()
    figures = report(config, context or min(8192, config.max_position), chosen, name)
    if checkpoint is not None:
        figures["file"] = file_report(checkpoint)
    figures["operations"] = operations()
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        show(figures)


def describe(model: str) -> tuple[ModelConfig, str, Checkpoint | None]:
    """The config of a model, its name, and its checkpoint, opened, where the files of weights are here.

    A config.json alone has none, nor has a folder with nothing else in it or a hub id that is not in the cache."""
    from sfumato.model.config import ModelConfig

    path = Path(model)
    if path.is_file() and path.suffix == ".json":
        return ModelConfig.from_file(path), str(path), None
    # Only now: these cost the import of torch.
    from sfumato.checkpoints.contents import config_of
    from sfumato.checkpoints.detect import has_weights, open_checkpoint
    from sfumato.checkpoints.locate import resolve

    place = resolve(path if path.exists() else model, weights=False)
    is_local = path.exists() or model in EMBEDDED
    name = path.resolve().name if path.is_dir() else model
    if place.is_dir() and (place / "config.json").exists() and not (is_local and has_weights(place)):
        return ModelConfig.from_file(place / "config.json"), name, None
    checkpoint = open_checkpoint(place)
    return config_of(checkpoint), name, checkpoint
