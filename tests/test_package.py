"""The public face: the names DESIGN promises, each where it says it lives, and the version."""

from __future__ import annotations

from importlib.metadata import version

import pytest

import sfumato


def test_public_names_resolve() -> None:
    assert set(sfumato.__all__) == {"LLM", "Options", "Completion", "Draft", "Commit", "Done", "Slot", "Usage"}
    for name in sfumato.__all__:
        assert getattr(sfumato, name).__name__ == name
        assert name in dir(sfumato)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Lllm'"):
        sfumato.Lllm  # noqa: B018


def test_version_is_the_installed_one() -> None:
    assert sfumato.__version__ == version("sfumato")
