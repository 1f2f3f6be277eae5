"""scripts/reference.py: the pages say what the code says, and the tour is as short as it promises."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sfumato
from sfumato import errors
from sfumato.options import LOAD_OPTIONS, OPTIONS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sfumato"
SCRIPT = ROOT / "scripts" / "reference.py"
TOUR = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
NUMBERED = re.findall(r"^(\d+)\. \*\*`([\w/.]+)`\*\* \(([\d,]+) lines\)", TOUR, re.MULTILINE)


def test_the_pages_are_what_the_code_says() -> None:
    check = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True)
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")


def test_the_page_has_every_public_name() -> None:
    headings = set(re.findall(r"^### (\w+)$", PAGE, re.MULTILINE))
    assert set(sfumato.__all__) - {"Event"} <= headings  # which is no class
    assert "`Event` is any of the first three" in PAGE
    assert {name for name, value in vars(errors).items() if isinstance(value, type)} <= headings
    for name in (*OPTIONS, *LOAD_OPTIONS):
        assert f"| `{name}` |" in PAGE
    for name in ("load", "connect", "complete", "chat", "stream", "fill", "infill", "edit", "decide"):
        assert len(re.findall(rf"^(?:LLM\.)?{name}\(", PAGE, re.MULTILINE)) >= 1, name


def test_the_tour_is_short() -> None:
    assert [int(number) for number, _, _ in NUMBERED] == list(range(1, len(NUMBERED) + 1))
    names = [name for _, name, _ in NUMBERED]
    assert len(set(names)) == len(names) <= 14
    assert sum(int(lines.replace(",", "")) for _, _, lines in NUMBERED) <= 5000
    for name in names:
        assert (ROOT / "sfumato" / name).is_file(), name


PASSED_ON = {"templates/requests.py", "engine/request.py"}
"""What the files of the way down pass on, and what therefore stands before those that use it."""


def imports_of(name: str) -> set[str]:
    """The files of the package that a file imports, and those that they import, and so on."""
    reached: set[str] = set()
    waiting = [name]
    while waiting:
        for node in ast.walk(ast.parse((PACKAGE / waiting.pop()).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sfumato"):
                base = node.module.replace(".", "/").removeprefix("sfumato").strip("/")
                files = {f"{base}.py", *(f"{base}/{alias.name}.py".lstrip("/") for alias in node.names)}
                new = {file for file in files if (PACKAGE / file).is_file()} - reached
                reached |= new
                waiting += new
    return reached


def wrong_places(down: list[str], up: list[str]) -> list[str]:
    """What breaks the tour's order: down, a file that calls back; up, a file that needs a later one."""
    both = [*down, *up]
    sentences = []
    for place, name in enumerate(both):
        imports = imports_of(name)
        if name in down:
            wrong = [file for file in down[:place] if file in imports and file not in PASSED_ON]
            wrong += [file for file in down[place:] if file in imports and name in PASSED_ON]
        else:
            wrong = [file for file in both[place:] if file in imports]
        sentences += [f"{name} needs {file}" for file in wrong]
    return sentences


def test_the_tour_goes_down_and_comes_up() -> None:
    down, up = (re.findall(r"^\d+\. \*\*`([\w/.]+)`", part, re.MULTILINE) for part in TOUR.split("\n**Up.**"))
    assert [*down, *up] == [name for _, name, _ in NUMBERED] and down and up
    assert wrong_places(down, up) == []
    assert [file for file in down[1:] if file not in imports_of("llm.py")] == []
    assert wrong_places(["engine/stepper.py", "engine/engine.py"], []) == ["engine/engine.py needs engine/stepper.py"]
    assert wrong_places([], ["sampling/step.py", "sampling/rules.py"]) == ["sampling/step.py needs sampling/rules.py"]


def test_what_lies_beside_the_tour_is_there() -> None:
    beside = TOUR.partition("lie beside the path")[2].partition("\n## ")[0]
    names = re.findall(r"`([\w/]+\.py)`", beside)
    assert len(names) == 9 and not {*names} & {name for _, name, _ in NUMBERED}
    assert [name for name in names if not (PACKAGE / name).is_file()] == []


def test_the_glossary_is_short() -> None:
    _, _, rest = TOUR.partition("## Glossary")
    words = re.findall(r"^\| ([\w -]+) \| [^|]+ \|$", rest.partition("\n## ")[0], re.MULTILINE)[2:]
    assert 12 <= len(words) <= 25 and len(set(words)) == len(words)


@pytest.mark.parametrize("change", ["a default", "a page"])
def test_a_page_that_is_out_of_date_is_seen(change: str, tmp_path: Path) -> None:
    for name in ("docs", "sfumato", "scripts", "tests/test_layering.py", "README.md", "CONTRIBUTING.md"):
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(ROOT / name)
    changed = tmp_path / ("sfumato/options.py" if change == "a default" else "docs/sampler.md")
    text = changed.read_text(encoding="utf-8")
    folder = changed.parent
    files = list(folder.resolve().iterdir())
    folder.unlink()
    folder.mkdir()
    for file in files:
        if file.name != changed.name:
            (folder / file.name).symlink_to(file)
    changed.write_text(text.replace("top_k: Annotated[", "top_kk: Annotated[").replace("| `top_k` |", "| `topk` |"))
    script = tmp_path / "reference.py"
    source = SCRIPT.read_text(encoding="utf-8").replace(
        "Path(__file__).resolve().parents[1]", f"Path({str(tmp_path)!r})"
    )
    script.write_text(source)
    check = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert check.returncode == 1 and "docs/sampler.md is not what the code says" in check.stderr
