"""What a checkpoint holds: configuration, generation values, tokenizer, and tensors by the model's names.

Everything here comes from headers and JSON files; no weight is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sfumato.checkpoints.calibration import Calibration, calibration_beside
from sfumato.checkpoints.checkpoint import Checkpoint, Entry, StoredVocabulary
from sfumato.checkpoints.names import HEAD, VISION, own_name, released_name
from sfumato.checkpoints.shards import short
from sfumato.errors import CheckpointError
from sfumato.model import purpose
from sfumato.model.config import ModelConfig, generation_values, read_generation_config, read_json
from sfumato.model.network import Model
from sfumato.ops import load as load_ops
from sfumato.ops.contract import Ops
from sfumato.text.tokenizer import Tokenizer

GENERATION = "generation_config.json"
TOKENIZER = """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json
    chat_template.jinja chat_template.json""".split()
"""The files of a tokenizer and its chat template, as a checkpoint folder may hold them."""


def config_of(checkpoint: Checkpoint) -> ModelConfig:
    """Its configuration, with the ids that end an answer from generation_config.json where that names any.

    Whether logits have a head of their own its tensors say, not config.json: see `copies`."""
    config = ModelConfig.from_dict(checkpoint.config, str(_config_file(checkpoint)))
    config = replace(config, has_head=HEAD in checkpoint.entries)
    eos_ids = generation_of(checkpoint)[1]
    if eos_ids is None:
        return config
    if max(eos_ids) >= config.vocab_size:
        place = checkpoint.path if checkpoint.path.is_file() else checkpoint.path / GENERATION
        raise CheckpointError(f"{place}: eos_token_id {max(eos_ids)} is not among the {config.vocab_size} tokens")
    return replace(config, eos_ids=eos_ids)


def _config_file(checkpoint: Checkpoint) -> Path:
    return checkpoint.path if checkpoint.path.is_file() else checkpoint.path / "config.json"


def generation_of(checkpoint: Checkpoint) -> tuple[dict[str, Any], tuple[int, ...] | None]:
    """`read_generation_config` of a checkpoint of any format."""
    if checkpoint.path.is_file():
        return generation_values(checkpoint.generation, str(checkpoint.path))
    return read_generation_config(checkpoint.path)


def purpose_of(checkpoint: Checkpoint) -> purpose.Purpose | None:
    """What the checkpoint is for, where a file beside it says so."""
    path = checkpoint.path / purpose.FILE
    return purpose.Purpose.of(read_json(path), str(path)) if path.is_file() else None


def calibration_of(checkpoint: Checkpoint) -> Calibration:
    """How sure its decisions are, where a file beside it says so.

    An adapter that is merged into it has changed that: the adapter's own file counts then."""
    return calibration_beside(checkpoint.merged[-1] if checkpoint.merged else checkpoint.path)


def tokenizer_of(vocabulary: StoredVocabulary) -> Tokenizer:
    """The tokenizer that a file carries within itself."""
    special = {f"{name}_token": vocabulary.tokens[index] for name, index in vocabulary.special.items()}
    return Tokenizer.from_vocabulary(vocabulary.tokens, vocabulary.kinds, vocabulary.merges, special)


def tokenizer_folder(checkpoint: Checkpoint) -> Path:
    """The folder of a tokenizer's files: the checkpoint's own, or the one in which its file lies.

    CheckpointError for a file that has no vocabulary and lies beside none."""
    path = checkpoint.path
    if not path.is_file():
        return path
    if not (path.parent / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{path} has no vocabulary, so that it reads and writes no text; put the model's tokenizer.json, "
            "tokenizer_config.json and chat_template.jinja beside it"
        )
    return path.parent


def blank(config: ModelConfig, ops: Ops) -> Model:
    """A model of names and shapes alone, on the meta device."""
    with torch.device("meta"):
        return Model(config, ops)


def described(checkpoint: Checkpoint) -> Model:
    """The blank model that a checkpoint's configuration describes; CheckpointError for one that cannot exist."""
    config = config_of(checkpoint)
    try:
        return blank(config, load_ops("reference"))
    except RuntimeError as error:  # sizes whose product has no place in 64 bits
        raise CheckpointError(f"{_config_file(checkpoint)} describes a model that is too large to exist") from error


def entries_of(checkpoint: Checkpoint, notice: Callable[[str], None]) -> dict[str, Entry]:
    """Every tensor of the text model by the model's name, as the checkpoint has it.

    CheckpointError where one is missing, misshapen or unknown. `notice` gets a sentence about what is left aside."""
    return match(described(checkpoint), checkpoint, notice)


def match(model: Model, checkpoint: Checkpoint, notice: Callable[[str], None]) -> dict[str, Entry]:
    """`entries_of` for a model that is described already; every other tensor of the checkpoint is accounted for."""
    folder = checkpoint.path
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    matched: dict[str, Entry] = {}
    vision = 0
    for released, entry in checkpoint.entries.items():
        if released.startswith(VISION):
            vision += 1
            continue
        own = own_name(released)
        shape = shapes.get(own or "")
        if own is None or shape is None:
            raise CheckpointError(f"{folder} has an unexpected tensor {short(released)}")
        if entry.shape != shape:
            raise CheckpointError(
                f"{released} in {folder} has the shape {short(list(entry.shape))}; {_config_file(checkpoint).name} "
                f"asks for {list(shape)}"
            )
        matched[own] = entry
    missing = [name for name in shapes if name not in matched]
    if missing:
        others = f" and {len(missing) - 1} other tensors" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder} lacks {released_name(missing[0])}{others}")
    for sentence in checkpoint.notices:
        notice(sentence)
    if vision:
        notice(f"{folder} has {vision} tensors for vision; they are left aside, this engine reads text only")
    return {name: matched[name] for name in shapes}
