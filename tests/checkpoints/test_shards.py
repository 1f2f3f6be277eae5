"""checkpoints/shards.py: one safetensors file, written and read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from small_checkpoints import files

from sfumato.checkpoints.shards import read_tensors, write_tensors
from sfumato.errors import CheckpointError


def test_tensors_file(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).t(), "b": torch.ones((), requires_grad=True)}
    write_tensors(tmp_path / "x", tensors, {"step": "3"})
    read, note = read_tensors(tmp_path / "x")
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert note == {"format": "pt", "step": "3"}
    with pytest.raises(TypeError):
        write_tensors(tmp_path / "x", {"a": torch.ones(1)}, {"step": 3})  # type: ignore[dict-item]
    assert files(tmp_path) == ["x"]
    assert read_tensors(tmp_path / "x")[1]["step"] == "3"
    for path in (tmp_path / "y", tmp_path):
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            read_tensors(path)
