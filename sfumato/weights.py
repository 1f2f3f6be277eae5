"""safetensors ↔ Model: one name table, streamed tensor by tensor, checked before a byte is believed; never pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfumato.events import CheckpointError


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file: beside it first, then renamed, so that a reader never sees half a file."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(
        {k: v.detach().contiguous().cpu() for k, v in tensors.items()}, beside, {"format": "pt", **(metadata or {})}
    )
    os.replace(beside, path)


def read_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file; CheckpointError names a file that is none."""
    try:
        with safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
