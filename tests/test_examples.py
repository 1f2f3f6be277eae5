"""examples/: each runs with nano, and keeps its form. What nano writes means nothing and is not looked at."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from jsonschema import validate

pytest.importorskip("llguidance")
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def output_of(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> str:
    module.main(["nano"])
    return capsys.readouterr().out


def test_infill_keeps_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    module = example("infill")
    output = output_of(module, capsys)
    assert output.startswith(module.BEFORE)
    text, _, note = output.partition("\n# written: ")
    assert text.endswith(module.BEHIND) and " tokens in " in note


def test_rewrite_changes_nothing_but_the_spans(capsys: pytest.CaptureFixture[str]) -> None:
    module = example("rewrite")
    output = output_of(module, capsys)
    lines = output.splitlines()
    assert lines[:2] == ["--- a/notice.txt", "+++ b/notice.txt"]
    first, second, third = module.TEXT.splitlines()
    assert [line[1:] for line in lines if line.startswith(" ")] == [first, third]
    assert f"-{second}" in lines
    (new,) = (line for line in lines[2:] if line.startswith("+"))
    assert new.startswith("+Send me your ") and new.endswith(" to write.")
    assert " proposals beforehand, and bring " in new


def test_extract_gives_a_record_of_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    module = example("extract")
    record = json.loads(output_of(module, capsys))
    validate(record, module.SCHEMA)
    assert list(record) == list(module.SCHEMA["properties"])


def test_decide_answers_every_question_or_says_that_it_was_not_asked(capsys: pytest.CaptureFixture[str]) -> None:
    module = example("decide")
    lines = output_of(module, capsys).splitlines()
    assert [line for line in lines if not line.startswith("  ")] == module.TEXTS
    answers = [line.split(maxsplit=1) for line in lines if line.startswith("  ")]
    assert [name for name, _ in answers] == [f"{name}:" for name in module.QUESTIONS] * len(module.TEXTS)
    values = [answer.partition(" (sure by ")[0] for _, answer in answers]
    for text, team, refund, tone, reason in zip(module.TEXTS, *(values[at::4] for at in range(4)), strict=True):
        assert team in module.QUESTIONS["team"].options and tone in ("0", "1", "2", "3")
        assert reason in text if refund == "true" else reason == "not asked"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_each_is_short_and_says_how_it_is_run(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60 and f"python examples/{path.name} [MODEL]" in text
