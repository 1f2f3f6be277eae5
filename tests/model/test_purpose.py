"""model/purpose.py: what purpose.json says of a model that is for one thing alone."""

from __future__ import annotations

from typing import Any

import pytest

from sfumato.errors import CheckpointError
from sfumato.model.purpose import Purpose


def test_a_purpose_is_read_whole() -> None:
    raw = {"purpose": "It counts\nsheep.", "prompt": "Count", "max_tokens": 9}
    assert Purpose.of(raw, "a") == Purpose("It counts sheep.", "Count", 9)
    assert Purpose.of({"purpose": "It counts.", "more": 1}, "a") == Purpose("It counts.")


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        ({}, "purpose is missing"),
        ({"purpose": 3}, "purpose must be a text"),
        ({"purpose": "x" * 301}, "300 characters"),
        ({"purpose": "x", "prompt": None}, "prompt must be a text"),
        ({"purpose": "x", "max_tokens": 0}, "max_tokens is 0"),
        ({"purpose": "x", "max_tokens": "9"}, "max_tokens is '9'"),
    ],
)
def test_a_wrong_one_is_refused_by_name(raw: Any, part: str) -> None:
    with pytest.raises(CheckpointError, match=r"^a: ") as caught:
        Purpose.of(raw, "a")
    assert part in str(caught.value)
