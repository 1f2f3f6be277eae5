"""Whose format a path holds, and its checkpoint, opened by the reader of that format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfumato.checkpoints.checkpoint import Checkpoint
from sfumato.checkpoints.formats.released import METHOD, open_released
from sfumato.checkpoints.shards import short
from sfumato.errors import CheckpointError
from sfumato.model.config import GEMMA4, read_generation_config, read_json


def open_checkpoint(path: Path) -> Checkpoint:
    """A folder or a .gguf file. Headers are read and checked, weights are not.

    CheckpointError where the format is unknown, or something in it is not as the format has it."""
    if path.is_file():
        from sfumato.checkpoints.formats.gguf_model import open_gguf

        return open_gguf(path)
    config = read_json(path / "config.json")
    read_generation_config(path)  # refused early, if at all
    found = _reader(path, config)(path, config)
    if config.get("model_type") != GEMMA4:
        return found
    from dataclasses import replace

    from sfumato.checkpoints.formats.gemma4 import released

    return replace(found, entries=released(found.entries))


def _reader(path: Path, config: dict[str, Any]) -> Any:
    quantization = config.get("quantization_config", config.get("quantization"))
    if not isinstance(quantization, dict | None):
        raise CheckpointError(f"{path / 'config.json'}: quantization_config is {short(quantization)}; it is no object")
    if not quantization:
        if (path / "hf_quant_config.json").exists():
            from sfumato.checkpoints.formats.modelopt import open_modelopt

            return open_modelopt
        return open_released
    method = quantization.get("quant_method")
    if method == METHOD:
        return open_released
    if method == "compressed-tensors":
        from sfumato.checkpoints.formats.compressed import open_compressed

        return open_compressed
    if method == "modelopt":
        from sfumato.checkpoints.formats.modelopt import open_modelopt

        return open_modelopt
    if method == "awq":
        from sfumato.checkpoints.formats.awq import open_awq

        return open_awq
    if method is None and "bits" in quantization:
        from sfumato.checkpoints.formats.mlx import open_mlx

        return open_mlx
    raise CheckpointError(
        f"{path / 'config.json'}: quant_method is {short(method)}; readable are sfumato, compressed-tensors, modelopt, "
        "awq and mlx"
    )
