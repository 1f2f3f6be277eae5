"""From a `RunSpec` to what a run needs: the model with what is trained, sources of examples, items to check on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfumato import ops
from sfumato.checkpoints.checkpoint import in_full
from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.load import load
from sfumato.checkpoints.locate import resolve
from sfumato.errors import InputError
from sfumato.model.adapters import new_adapter
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model
from sfumato.model.trainable import trainable_
from sfumato.options import LoadOptions
from sfumato.tasks import task as tasks
from sfumato.text.template import ChatTemplate
from sfumato.text.tokenizer import Tokenizer
from sfumato.training.checkpointing import checkpoint_
from sfumato.training.data import (
    Dataset,
    MixedSource,
    ReadingProgress,
    Source,
    SudokuSource,
    held_out_of,
    open_data,
)
from sfumato.training.recipe import FULL, LORA, TrainingRecipe
from sfumato.training.spec import NEW, DataSpec, RunSpec
from sfumato.training.state import latest
from sfumato.training.task_source import TaskSource
from sfumato.training.train import recipe_of

CountProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Base:
    """The checkpoint that a run begins from."""

    folder: Path
    tokenizer: Tokenizer
    template: ChatTemplate
    config: ModelConfig
    fingerprint: str
    """Of its config and the sizes of its files."""


@dataclass(frozen=True)
class Sources:
    """What is trained on, and what is not."""

    train: Source
    held_out: Source | None
    items: dict[str, list[str]]
    """Items of each task that is checked."""
    examples: int | None
    """How many there are to train on; None: endless."""


def base_of(model: str) -> Base:
    """Open the config, tokenizer and template of a model. InputError for a file that training cannot begin from."""
    folder = resolve(model.removesuffix(NEW))
    if folder.is_file():
        raise InputError(
            f"{folder} is a GGUF, and training begins from a folder; write one: sfumato convert {folder} --to bf16 "
            "-o FOLDER"
        )
    tokenizer = Tokenizer.from_folder(folder)
    template = ChatTemplate.from_folder(folder, tokenizer.special)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
    config = ModelConfig.from_file(folder / "config.json")
    return Base(folder, tokenizer, template, config, digest.hexdigest()[:16])


def new_recipe(spec: RunSpec, base: Base) -> TrainingRecipe:
    """The recipe of the run in the folder, or a new one, with the changes that were asked for."""
    if latest(spec.folder) is not None:
        return replace(recipe_of(spec.folder), **spec.changes)
    own = {"leave_one_out": base.config.is_leave_one_out}
    return TrainingRecipe(**{**(FULL if spec.lora is None else LORA), **own, **spec.changes})


def with_steps(recipe: TrainingRecipe, spec: RunSpec, examples: int | None) -> TrainingRecipe:
    """The recipe with as many steps as epochs ask for, where neither says how many."""
    if examples is None or "steps" in spec.changes or (spec.epochs is None and latest(spec.folder) is not None):
        return recipe
    epochs = 3.0 if spec.epochs is None else spec.epochs
    return replace(recipe, steps=max(1, math.ceil(epochs * examples / recipe.batch)))


def model_of(spec: RunSpec, base: Base, recipe: TrainingRecipe, device: str) -> Model:
    """The model with the parameters that are trained, and no others, requiring gradients."""
    model = _trainable(spec, base, recipe, device)
    if spec.lora is None:
        model.config = replace(model.config, is_leave_one_out=recipe.leave_one_out)
    elif model.config.is_leave_one_out != recipe.leave_one_out:
        kind = "a leave-one-out model" if model.config.is_leave_one_out else "no leave-one-out model"
        raise InputError(
            f"leave_one_out is {recipe.leave_one_out} and {spec.model} is {kind}, which factors cannot change, since "
            "all rows of a batch are sampled alike; leave it out, or train all weights"
        )
    return checkpoint_(model) if spec.checkpointing else model


def _trainable(spec: RunSpec, base: Base, recipe: TrainingRecipe, device: str) -> Model:
    if spec.is_new:
        model = Model(base.config, ops.load("fused")).to(device)
        model.init_(recipe.seed, std=0.05)
        return model if recipe.init == "plain" else quiet_(model)
    checkpoint = open_checkpoint(base.folder)
    if spec.lora is None:
        model = load(in_full(checkpoint), LoadOptions(device=device, dtype="float32", ops="fused"))
        return model.requires_grad_(True)
    options = LoadOptions(device=device, dtype=recipe.precision, ops="fused", quantize=spec.quantize)
    model = load(checkpoint, options)
    lora = spec.lora
    assert lora.alpha is not None
    return trainable_(model, new_adapter(model, lora.rank, lora.alpha, lora.targets, lora.is_rs, recipe.seed))


@torch.no_grad()
def quiet_(model: Model) -> Model:
    """Make random blocks add little to what they read, and look at all alike.

    Norms behind a block give its sum the size of one, whatever its weights: at a quarter, the embedding is not drowned.
    Queries and keys of half the size make scores of about one nat. Matrices before norms learn relative to their size:
    at an eighth, eight times as fast as the embedding at the same rate."""
    for name, parameter in model.named_parameters():
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            parameter.fill_(0.25)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.fill_(0.5)
        elif name.startswith("layers.") and parameter.ndim >= 2 and "router" not in name:
            parameter.mul_(0.12)
    return model


def identity_of(spec: RunSpec, base: Base, sources: Sources) -> dict[str, Any]:
    """What a run is besides its recipe: it goes on with the same alone."""
    lora = None if spec.lora is None else asdict(spec.lora)
    return {
        "model": {"name": spec.model, "fingerprint": base.fingerprint},
        "lora": lora,
        "quantize": spec.quantize,
        "data": sources.train.describe(),
    }


def sources_of(
    spec: RunSpec,
    base: Base,
    recipe: TrainingRecipe,
    progress: CountProgress | None = None,
    reading: ReadingProgress | None = None,
) -> Sources:
    """Open the data and make the tasks' sources."""
    parts: dict[str, tuple[Source, Source | None]] = {}
    for name in spec.data.tasks:
        parts[name] = _task_sources(name, spec, base, recipe, progress)
    examples = None
    if spec.data.files:
        dataset = dataset_of(spec.data, base, recipe.seed, reading, has_looks=spec.looks.every != 0)
        parts["data"] = dataset.train, dataset.held_out
        examples = len(dataset.train)
    shares = spec.data.shares()
    if not parts:
        raise InputError("there is nothing to train on; give --data FILE or --task NAME")
    train = _mixed([(parts[name][0], shares[name]) for name in parts], base, recipe)
    held = [(held_out, shares[name]) for name, (_, held_out) in parts.items() if held_out is not None]
    items = {} if spec.looks.every == 0 else {name: _items(name, spec, base, recipe) for name in spec.looks.tasks}
    return Sources(
        train,
        _mixed(held, base, recipe) if held else None,
        items,
        None if examples is None else round(examples / shares["data"]),
    )


def _mixed(parts: Sequence[tuple[Source, float]], base: Base, recipe: TrainingRecipe) -> Source:
    """One source of several."""
    return parts[0][0] if len(parts) == 1 else MixedSource(parts, recipe.seed, base.tokenizer.pad_id)


def dataset_of(
    data: DataSpec, base: Base, seed: int, reading: ReadingProgress | None = None, has_looks: bool = True
) -> Dataset:
    """The files, with a part held out where that was asked for, or where there are looks at several records.

    InputError as `open_data`, and for a limit of length above the model's context."""
    limit = data.limit(base.config.max_position)

    def opened(held_out: float | Path | None) -> Dataset:
        return open_data(
            data.files,
            base.tokenizer,
            base.template,
            max_tokens=limit,
            seed=seed,
            held_out=held_out,
            progress=reading,
        )

    if data.held_out is not None:
        return opened(held_out_of(data.held_out))
    whole = opened(None)
    has_several = len(np.unique(whole.train.index.entries["content"])) > 1
    return opened(held_out_of(None)) if has_several and has_looks else whole


def _task_sources(
    name: str, spec: RunSpec, base: Base, recipe: TrainingRecipe, progress: CountProgress | None
) -> tuple[Source, Source | None]:
    """What is trained on of a task, and what is not."""
    task = tasks.named(name)
    if name == "sudoku":
        source = SudokuSource(base.tokenizer, base.template, pool=spec.data.pool, progress=progress)
        return source, _held_out_sudoku(base)
    canvases = base.config.canvas_length, recipe.short_canvases
    train, held_out = (
        TaskSource(task, base.tokenizer, base.template, recipe.seed, held, canvases, recipe.drafts)
        for held in (False, True)
    )
    return train, held_out


def _held_out_sudoku(base: Base) -> SudokuSource:
    return SudokuSource(base.tokenizer, base.template, seed=20261122, pool=60, clues=(30, 39))


def _items(name: str, spec: RunSpec, base: Base, recipe: TrainingRecipe) -> list[str]:
    """Items of a task that are not trained on."""
    task, count = tasks.named(name), spec.looks.items
    if name == "sudoku":
        puzzles, _ = _held_out_sudoku(base).stream.sample(count, 35, 0)
        return ["".join(map(str, row)) for row in puzzles]
    return TaskSource(task, base.tokenizer, base.template, recipe.seed, is_held_out=True).items(count, 0)
