"""Which format a path holds, and its checkpoint, opened by the reader of that format.

A new format is one more file of `formats`, and its reader in `READERS`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato.checkpoints import unreadable
from sfumato.checkpoints.checkpoint import Checkpoint, FormatReader
from sfumato.checkpoints.copies import without_copies
from sfumato.checkpoints.formats import awq, bitsandbytes, compressed, fp8, gemma4, gptq, mlx, modelopt, released
from sfumato.checkpoints.formats.gguf_model import open_gguf
from sfumato.checkpoints.names import released_spellings
from sfumato.checkpoints.shards import INDEX, SINGLE, short
from sfumato.errors import CheckpointError
from sfumato.model.config import GEMMA4, read_generation_config, read_json

_QUANTIZATION = ("quantization_config", "quantization")
"""Where config.json says how weights are quantised; MLX's tools write both."""
READERS = (
    released.READER,
    compressed.READER,
    fp8.READER,
    modelopt.READER,
    awq.READER,
    gptq.READER,
    bitsandbytes.READER,
    mlx.READER,
)
"""The readers of folders, asked from the last on: ours, the first, reads whatever says nothing of a quantization."""


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder or a .gguf file, every tensor once and under its released name.

    Headers are read and checked; weights are not, but for an `lm_head` that is held against the embedding.
    CheckpointError where the format is unknown, or something in it is not as the format has it."""
    return without_copies(_opened(path))


def _opened(path: Path) -> Checkpoint:
    if path.is_file():
        if path.suffix.lower() != ".gguf" and (what := unreadable.sentence(path)):
            raise CheckpointError(what)
        if what := unreadable.begins_oddly(path):
            raise CheckpointError(what)
        return open_gguf(path)
    if not has_weights(path) and (what := unreadable.sentence(path)):
        raise CheckpointError(what)
    config = _described(read_json(path / "config.json"))
    read_generation_config(path)  # refused early, if at all
    checkpoint = _reader(path, config).open(path, config)
    names = released_spellings(checkpoint.entries)
    entries = {names[name]: replace(entry, name=names[name]) for name, entry in checkpoint.entries.items()}
    if config.get("model_type") == GEMMA4:
        entries = gemma4.released(entries)
    return replace(checkpoint, entries=entries)


def has_weights(folder: Path) -> bool:
    """Whether a folder has config.json and what our readers look for: weights in one file, or their index."""
    there = [os.path.exists(folder / name) for name in ("config.json", SINGLE, INDEX)]  # in a folder of others: False
    return there[0] and any(there[1:])


def _described(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with what it says of a quantisation where readers look for it.

    Tools that quantise the text model alone say it in text_config; and null says nothing."""
    config = {key: value for key, value in config.items() if value is not None or key not in _QUANTIZATION}
    text = config.get("text_config")
    if isinstance(text, dict) and not any(key in config for key in _QUANTIZATION):
        config |= {key: text[key] for key in _QUANTIZATION if text.get(key) is not None}
    if isinstance(text, dict):
        config["text_config"] = {key: value for key, value in text.items() if key not in _QUANTIZATION}
    return config


def _reader(path: Path, config: dict[str, Any]) -> FormatReader:
    quantization = config.get("quantization_config", config.get("quantization"))
    if not isinstance(quantization, dict | None):
        raise CheckpointError(f"{path / 'config.json'}: quantization_config is {short(quantization)}; it is no object")
    for reader in reversed(READERS):
        if reader.reads(path, quantization or {}):
            return reader
    names = [reader.name for reader in READERS]
    raise CheckpointError(
        f"{path / 'config.json'}: quant_method is {short((quantization or {}).get('quant_method'))}; readable are "
        f"{', '.join(names[:-1])} and {names[-1]}"
    )
