"""ops/__init__.py: the survey of implementations says what `load` does."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from sfumato import ops


def test_a_survey_says_what_load_does_and_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def obstacle(dtype: torch.dtype | None, packed: Any = ()) -> str:
        warnings.warn("the compiler failed", stacklevel=2)
        return "the compiler failed"

    monkeypatch.setattr("sfumato.ops.cpu.obstacle", obstacle)
    standings = {one.name: one for one in ops.survey("cpu", torch.bfloat16)}
    assert standings["cpu"] == ("cpu", "the compiler failed", False)
    assert [name for name, one in standings.items() if one.is_auto] == ["fused"]
