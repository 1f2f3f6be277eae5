"""examples/, and the code of docs/canvas.md, with nano: each runs, and keeps its form. What nano writes means nothing
and is not looked at."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from jsonschema import validate

from sfumato.templates.slots import read_template

pytest.importorskip("llguidance")
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said_by(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> str:
    module.main(["nano"])
    return capsys.readouterr().out


def test_infill_keeps_both_sides(capsys) -> None:
    module = example("infill")
    said = said_by(module, capsys)
    assert said.startswith(module.BEFORE)
    text, _, note = said.partition("\n# written: ")
    assert text.endswith(module.BEHIND) and " tokens in " in note


def test_rewrite_changes_nothing_but_the_spans(capsys) -> None:
    module = example("rewrite")
    said = said_by(module, capsys)
    lines = said.splitlines()
    assert lines[:2] == ["--- a/notice.txt", "+++ b/notice.txt"]
    first, second, third = module.TEXT.splitlines()
    assert [line[1:] for line in lines if line.startswith(" ")] == [first, third]
    assert f"-{second}" in lines
    (new,) = (line for line in lines[2:] if line.startswith("+"))
    assert new.startswith("+Send me your ") and new.endswith(" to write.")
    assert " proposals beforehand, and bring " in new


def test_extract_gives_a_record_of_the_schema(capsys) -> None:
    module = example("extract")
    record = json.loads(said_by(module, capsys))
    validate(record, module.SCHEMA)
    assert list(record) == list(module.SCHEMA["properties"])


def test_decide_gives_a_choice_to_every_question(capsys) -> None:
    module = example("decide")
    lines = said_by(module, capsys).splitlines()
    assert [line for line in lines if not line.startswith("  ")] == module.TEXTS
    answers = [line.split() for line in lines if line.startswith("  ")]
    assert [name for name, _, _ in answers] == [f"{name}:" for name in module.QUESTIONS] * len(module.TEXTS)
    assert all(choice in module.QUESTIONS[name[:-1]] for name, choice, _ in answers)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_each_is_short_and_says_how_it_is_run(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60 and f"python examples/{path.name} [MODEL]" in text


def test_the_page_runs_as_it_stands(capsys) -> None:
    page = (ROOT / "docs" / "canvas.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), names)
    (as_json,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    assert read_template(as_json) == names["template"]
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert pictures and all((ROOT / "docs" / name).stat().st_size < 100_000 for name in pictures)
