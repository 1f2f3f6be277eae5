"""model/purpose.py: what generation_config.json says of a model that is for one thing alone."""

from __future__ import annotations

from typing import Any

import pytest

from sfumato.errors import CheckpointError
from sfumato.model.purpose import Purpose


def test_a_purpose_is_read_whole() -> None:
    raw = {"purpose": "It counts\nsheep.", "prompt": "Count", "max_tokens": 9}
    assert Purpose.of({"sfumato": raw, "t_min": 1}, "a") == Purpose("It counts sheep.", "Count", 9)
    assert Purpose.of({"sfumato": {"purpose": "It counts."}}, "a") == Purpose("It counts.")
    assert Purpose.of({"t_min": 1}, "a") is None


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        ([], "sfumato is list"),
        ({}, "purpose is missing"),
        ({"purpose": 3}, "sfumato.purpose must be a text"),
        ({"purpose": "x" * 301}, "300 characters"),
        ({"purpose": "x", "prompt": None}, "sfumato.prompt must be a text"),
        ({"purpose": "x", "max_tokens": 0}, "sfumato.max_tokens is 0"),
        ({"purpose": "x", "max_tokens": "9"}, "sfumato.max_tokens is '9'"),
    ],
)
def test_a_wrong_one_is_refused_by_name(raw: Any, part: str) -> None:
    with pytest.raises(CheckpointError, match=r"^a: ") as caught:
        Purpose.of({"sfumato": raw}, "a")
    assert part in str(caught.value)
