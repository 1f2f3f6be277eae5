"""scripts/counts.py: what it counts, on small sources and on the working tree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from scripts import counts  # noqa: E402

SOURCE = (
    '''"""A module."""

import triton


class Large:
    """Two methods."""

    def one(self, a: int) -> int:
        found = a
        return found

    def _two(self, b, c, d, e, f, g, h, *, i):
        self.told_twice = b


@triton.jit
def kernel(a, b, c, d, e, f, g, h, i):
    pass


def long(given_x):
'''
    + "    pass\n" * 61
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in counts.FOLDERS:
        (tmp_path / folder).mkdir()
    (tmp_path / "sfumato" / "__init__.py").write_text('"""The package."""\n')
    (tmp_path / "sfumato" / "one.py").write_text(SOURCE)
    (tmp_path / "tests" / "test_one.py").write_text("def test():\n    wanted, founder = 1, 2\n")
    return tmp_path


def test_counts(root: Path) -> None:
    result = counts.count(root)
    assert result.root_files == ["one.py"]
    assert result.long_functions == ["sfumato/one.py:22 long (62)"]
    assert result.many_parameters == ["sfumato/one.py:13 _two (8)"]
    assert result.class_methods == (2, "Large, sfumato/one.py")
    assert result.class_lines == (9, "Large, sfumato/one.py")
    assert result.file_lines == (83, "sfumato/one.py")
    assert [place.split()[1] for place in result.without_docstring] == ["one", "kernel", "long"]
    assert sorted(place.split()[1] for place in result.vague_names) == ["found", "given_x", "told_twice", "wanted"]


def test_classes_of_one_name(root: Path) -> None:
    (root / "sfumato" / "two.py").write_text("class Large:\n    pass\n")
    assert counts.count(root).shared_class_names == ["sfumato/two.py:1 Large"]


def test_the_working_tree(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "counts.py"), "--json", str(tmp_path / "counts.json")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("|  | working tree |\n")
    table = json.loads((tmp_path / "counts.json").read_text())["working tree"]
    modules = ("__main__", "declarations", "errors", "events", "llm", "options", "presets", "questions")
    assert {f"{name}.py" for name in modules} == set(table["root_files"])


def test_an_unknown_revision() -> None:
    with pytest.raises(SystemExit, match="git knows no revision 'nothing'"):
        counts.count_revision("nothing")
