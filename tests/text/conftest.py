"""Fixtures for the tests of sfumato/text."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from chats import NANO


@pytest.fixture(scope="module")
def oracle() -> Any:
    """transformers' tokenizer of nano's files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(NANO)
