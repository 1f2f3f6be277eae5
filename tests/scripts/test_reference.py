"""scripts/reference.py: the pages say what the code says, and the tour is as short as it promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import sfumato
from sfumato import errors
from sfumato.options import LOAD_OPTIONS, OPTIONS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "reference.py"
TOUR = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
NUMBERED = re.findall(r"^(\d+)\. \*\*`([\w/.]+)`\*\* \(([\d,]+) lines\)", TOUR, re.MULTILINE)


def test_the_pages_are_what_the_code_says() -> None:
    check = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True)
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")


def test_the_page_has_every_public_name() -> None:
    headings = set(re.findall(r"^### (\w+)$", PAGE, re.MULTILINE))
    assert set(sfumato.__all__) <= headings
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
