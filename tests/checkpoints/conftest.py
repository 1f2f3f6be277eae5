"""A small model and its checkpoint folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_checkpoints import make

from sfumato.checkpoints.save import save
from sfumato.model.network import Model


@pytest.fixture
def model() -> Model:
    return make()


@pytest.fixture
def folder(tmp_path: Path, model: Model) -> Path:
    save(model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"
