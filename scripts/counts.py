#!/usr/bin/env python3
"""Count what makes the code easy or hard to read: long functions, large classes, vague names, missing docstrings.

    scripts/counts.py                    the working tree
    scripts/counts.py abeda48 HEAD       two revisions, side by side
    scripts/counts.py --types            with the errors of mypy --strict, which takes a while

Everything is read from the sources, nothing is imported. A function's lines run from `def` to its end, its docstring
included. Kernels, which `triton.jit` compiles, are not counted as functions.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "sfumato"
FOLDERS = (PACKAGE, "tests", "benchmarks", "scripts", "examples")
"""Where names are looked at; all else is counted in the package alone."""
MOST_LINES, MOST_PARAMETERS = 60, 7
VAGUE = frozenset("found told given seen made heard said asked thrown handed begun taken lost wanted".split())
"""Verbs in the past, which do not say what a value is."""
WORKING_TREE = "working tree"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Counts:
    """The counts of one state of the sources; the names of what is counted stand beside, as FILE:LINE NAME."""

    root_files: list[str] = field(default_factory=list)
    long_functions: list[str] = field(default_factory=list)
    many_parameters: list[str] = field(default_factory=list)
    class_methods: tuple[int, str] = (0, "")
    class_lines: tuple[int, str] = (0, "")
    file_lines: tuple[int, str] = (0, "")
    without_docstring: list[str] = field(default_factory=list)
    shared_class_names: list[str] = field(default_factory=list)
    vague_names: list[str] = field(default_factory=list)
    type_errors: int | None = None

    def table(self) -> dict[str, str]:
        """The counts in words, by what they count."""
        rows = {
            "files at the root of the package, beside __init__": str(len(self.root_files)),
            f"functions over {MOST_LINES} lines outside kernels": str(len(self.long_functions)),
            f"functions with more than {MOST_PARAMETERS} parameters": str(len(self.many_parameters)),
            "largest class, methods": "{} ({})".format(*self.class_methods),
            "largest class, lines": "{} ({})".format(*self.class_lines),
            "largest file, lines": "{} ({})".format(*self.file_lines),
            "class names that two classes share": str(len(self.shared_class_names)),
            "public names without a docstring": str(len(self.without_docstring)),
            "vague names": str(len(self.vague_names)),
        }
        if self.type_errors is not None:
            rows["errors of mypy --strict"] = str(self.type_errors)
        return rows


def count(root: Path, types: bool = False) -> Counts:
    """The counts of the sources under a folder; with `types`, of mypy's errors too."""
    counts = Counts()
    classes: dict[str, list[str]] = {}
    counts.root_files = sorted(path.name for path in (root / PACKAGE).glob("*.py") if path.stem != "__init__")
    for path in sources(root):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(root).as_posix()
        tree = ast.parse(text)
        counts.vague_names += [f"{name}:{line} {vague}" for line, vague in vague_names(tree)]
        if not name.startswith(f"{PACKAGE}/"):
            continue
        counts.file_lines = max(counts.file_lines, (len(text.splitlines()), name))
        counts.without_docstring += [f"{name}:{line} {public}" for line, public in without_docstring(tree)]
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                _count_class(counts, node, name)
                classes.setdefault(node.name, []).append(f"{name}:{node.lineno} {node.name}")
            elif isinstance(node, Function) and not is_kernel(node):
                _count_function(counts, node, name)
    counts.shared_class_names = [place for places in classes.values() if len(places) > 1 for place in places[1:]]
    if types:
        counts.type_errors = type_errors(root)
    return counts


def sources(root: Path) -> Iterator[Path]:
    """The Python files of a checkout."""
    for folder in FOLDERS:
        yield from sorted((root / folder).rglob("*.py"))


def _count_class(counts: Counts, node: ast.ClassDef, name: str) -> None:
    methods = sum(isinstance(part, Function) for part in node.body)
    counts.class_methods = max(counts.class_methods, (methods, f"{node.name}, {name}"))
    counts.class_lines = max(counts.class_lines, (lines_of(node), f"{node.name}, {name}"))


def _count_function(counts: Counts, node: Function, name: str) -> None:
    place = f"{name}:{node.lineno} {node.name}"
    if lines_of(node) > MOST_LINES:
        counts.long_functions.append(f"{place} ({lines_of(node)})")
    if len(parameters(node)) > MOST_PARAMETERS:
        counts.many_parameters.append(f"{place} ({len(parameters(node))})")


def lines_of(node: ast.ClassDef | Function) -> int:
    """The lines of a class or function, from its first to its last; decorators stand before."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def parameters(node: Function) -> list[str]:
    """The names of a function's parameters, without self, cls, *args and **kwargs."""
    names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def is_kernel(node: Function) -> bool:
    """Whether `triton.jit`, or a decorator made from it, compiles this function."""
    return any(re.search(r"\bjit\b|\bkernel\b", ast.unparse(decorator)) for decorator in node.decorator_list)


def without_docstring(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of a module's public classes, functions and methods that have no docstring, and of itself."""
    if ast.get_docstring(tree) is None:
        yield 1, "module"
    for node in tree.body:
        yield from _undocumented(node)


def _undocumented(node: ast.stmt) -> Iterator[tuple[int, str]]:
    if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or node.name.startswith("_"):
        return
    is_overload = any("overload" in ast.unparse(decorator) for decorator in node.decorator_list)
    if ast.get_docstring(node) is None and not is_overload:
        yield node.lineno, node.name
    if isinstance(node, ast.ClassDef):
        for part in node.body:
            yield from _undocumented(part)


def vague_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of every variable, parameter, attribute, function and class that is called by a vague word."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                pass
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                pass
            case _:
                continue
        if name.strip("_").lower().split("_")[0] in VAGUE:
            yield node.lineno, name


def type_errors(root: Path) -> int:
    """How many errors mypy finds in package, tests, benchmarks and scripts, strict whatever the revision asks for."""
    folders = [folder for folder in FOLDERS if (root / folder).is_dir()]
    command = [sys.executable, "-m", "mypy", "--strict", "--explicit-package-bases", "--no-error-summary", *folders]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if run.returncode > 1:
        raise SystemExit(f"mypy cannot run: {(run.stderr or run.stdout).strip()}")
    return sum(": error:" in line for line in run.stdout.splitlines())


def count_revision(revision: str, types: bool = False) -> Counts:
    """The counts of a git revision, or of the working tree."""
    if revision == WORKING_TREE:
        return count(ROOT, types)
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", revision], capture_output=True)
    if archive.returncode:
        raise SystemExit(f"git knows no revision {revision!r}: {archive.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
        return count(Path(folder), types)


def show(columns: dict[str, Counts]) -> str:
    """The counts as a Markdown table, a column a revision."""
    tables = {revision: counts.table() for revision, counts in columns.items()}
    rows = [["", *tables]]
    rows += [[label, *(table[label] for table in tables.values())] for label in next(iter(tables.values()))]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs="*", default=[WORKING_TREE], help="git revisions; none: the working tree")
    parser.add_argument("--types", action="store_true", help="count mypy's errors too")
    parser.add_argument("--names", action="store_true", help="list what is counted")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, names included")
    arguments = parser.parse_args()
    columns = {revision: count_revision(revision, arguments.types) for revision in arguments.revisions}
    print(show(columns))
    if arguments.names:
        for counts in columns.values():
            lists = (counts.long_functions, counts.many_parameters, counts.without_docstring, counts.vague_names)
            print("\n".join(place for places in lists for place in places))
    if arguments.json:
        arguments.json.write_text(json.dumps({name: vars(counts) for name, counts in columns.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
