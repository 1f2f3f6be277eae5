"""__init__.py: the public names, and the version."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from jinja2.sandbox import SandboxedEnvironment
from packaging.requirements import Requirement

import sfumato
from sfumato import errors, events


def test_public_names_resolve() -> None:
    models = {"LLM", "Remote", "LanguageModel", "Options", "LoadOptions", "Slot"}
    queries = {"Chat", "Complete", "Decide", "Edit", "Fill", "Infill"}
    assert set(sfumato.__all__) >= models | queries
    for name in sfumato.__all__:
        assert name in dir(sfumato)
        assert name == "Event" or getattr(sfumato, name).__name__ == name
    assert sfumato.Event == sfumato.Draft | sfumato.Commit | sfumato.Done


def test_every_event_result_and_error_is_a_public_name() -> None:
    for module in (events, errors):
        own = {
            name for name, kind in vars(module).items() if isinstance(kind, type) and kind.__module__ == module.__name__
        }
        assert own <= set(sfumato.__all__)
    assert sorted(sfumato.__all__, key=lambda name: (not name.isupper(), name)) == sfumato.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Lllm'"):
        sfumato.Lllm  # noqa: B018


def test_version_is_the_installed_one() -> None:
    assert sfumato.__version__ == version("sfumato")


def test_jinja_has_no_way_out_of_its_sandbox() -> None:
    """Before 3.1.6 a checkpoint's chat template could leave it (CVE-2025-27516)."""
    root = Path(__file__).parents[1]
    named = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    (requirement,) = [Requirement(line) for line in named if Requirement(line).name == "jinja2"]
    (exact,) = [line for line in (root / "constraints.txt").read_text().lower().splitlines() if "jinja2==" in line]
    assert not requirement.specifier.contains("3.1.5") and requirement.specifier.contains("3.1.6")
    for pinned in (exact.removeprefix("jinja2=="), version("jinja2")):
        assert requirement.specifier.contains(pinned)
    template = SandboxedEnvironment().from_string("{{ ('<{0.__class__}>' | attr('format'))(1) }}")
    assert template.render() == "<>"
