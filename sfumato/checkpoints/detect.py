"""Which format a path holds, and its checkpoint, opened by the reader of that format.

A new format is one more file of `formats`, and its reader in `READERS`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato.checkpoints.checkpoint import Checkpoint, FormatReader
from sfumato.checkpoints.formats import awq, bitsandbytes, compressed, fp8, gemma4, gptq, mlx, modelopt, released
from sfumato.checkpoints.formats.gguf_model import open_gguf
from sfumato.checkpoints.shards import short
from sfumato.errors import CheckpointError
from sfumato.model.config import GEMMA4, read_generation_config, read_json

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
"""The readers of folders. Ours reads whatever says nothing of a quantization, so that it is asked last."""


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder or a .gguf file. Headers are read and checked, weights are not.

    CheckpointError where the format is unknown, or something in it is not as the format has it."""
    if path.is_file():
        return open_gguf(path)
    config = read_json(path / "config.json")
    read_generation_config(path)  # refused early, if at all
    checkpoint = _reader(path, config).open(path, config)
    if config.get("model_type") != GEMMA4:
        return checkpoint
    return replace(checkpoint, entries=gemma4.released(checkpoint.entries))


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
