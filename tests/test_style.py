"""sfumato/ and what stands beside it: the rules of names, sizes and places.

A folder is a case of its own, so that what breaks a rule shows where. What ruff and mypy hold is not held again.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sfumato"

BESIDE = ("benchmarks", "examples", "scripts", "tests")
"""The folders with code beside the package."""

PACKAGES = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())
FOLDERS = ["sfumato", *(f"sfumato/{name}" for name in PACKAGES), *BESIDE]

NO_NAMES = {
    *("found", "told", "given", "seen", "made", "heard", "said", "asked", "thrown", "handed", "begun", "taken"),
    *("lost", "wanted"),
}
"""Verbs in the past: no names, as a noun says what a value is."""

LONGEST_FUNCTION = 60
MOST_METHODS = 25
"""About 20 is the aim."""
MOST_PARAMETERS = 7
"""More are a record."""
MANY_PARAMETERS = {
    "sfumato/cli/edit.py command": "typer makes the command line from them",
    "sfumato/cli/infill.py command": "typer makes the command line from them",
    "sfumato/cli/sudoku.py command": "typer makes the command line from them",
    "sfumato/llm.py load": "it spells LoadOptions out for its callers",
    "sfumato/templates/interface.py decide": "it spells Decide out for its callers",
}
"""The functions with more."""
LONGEST_FILE = 550
"""Lines of a file of the package outside ops/triton; about 500 is the aim."""

VARIABLES = {
    "XDG_CACHE_HOME": "where the user keeps caches: a place, no behaviour",
    "PYTHONPATH": "passed on to a child process",
    "OMP_WAIT_POLICY": "OpenMP's own: the user has said how threads wait",
    "GOMP_SPINCOUNT": "the same of GNU's runtime",
    "XDG_CONFIG_HOME": "where the user keeps settings: a place, no behaviour",
    "APPDATA": "the same on Windows",
    "XDG_STATE_HOME": "where the user keeps what programs remember: a place, no behaviour",
    "LOCALAPPDATA": "the same on Windows",
    "VARIABLE": "SFUMATO_MODEL, the command line's alone: which model it takes where none is named",
    "COMPLETE": "the shell's script asks for completions with it",
    "COMP_WORDS": "bash's own: the line to complete",
    "_TYPER_COMPLETE_ARGS": "the same for zsh and fish",
    "TRITON_INTERPRET": "Triton's own, for the tests of kernels: assembly cannot be interpreted",
}
"""The environment variables that the package may read; SFUMATO_MODEL alone is its own, and changes a default."""


def files_of(folder: str) -> list[Path]:
    """The Python files of a case: those at the package's root alone, or all below a folder."""
    here = ROOT / folder
    return sorted(here.glob("*.py") if folder == "sfumato" else here.rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def place(path: Path, node: ast.stmt | ast.expr | ast.arg | ast.pattern | ast.excepthandler) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def names_bound(tree: ast.AST) -> Iterator[tuple[str, ast.stmt | ast.expr | ast.arg | ast.pattern | ast.excepthandler]]:
    """Every name that a file defines: functions, classes, arguments, variables, attributes. Imports keep theirs."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node
            case ast.arg():
                yield node.arg, node
            case ast.Name(ctx=ast.Store()):
                yield node.id, node
            case ast.Attribute(ctx=ast.Store()):
                yield node.attr, node
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)) | ast.ExceptHandler(name=str(name)):
                yield name, node


def is_vague(name: str) -> bool:
    """found, _found, found_tokens; not is_found, as a question may hold any word."""
    return name.strip("_").lower().partition("_")[0] in NO_NAMES


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator).replace("(", ".").split(".") for decorator in node.decorator_list)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("folder", FOLDERS)
def test_names_are_nouns_and_questions(folder: str) -> None:
    vague = [
        f"{place(path, node)} {name}"
        for path in files_of(folder)
        for name, node in names_bound(tree_of(path))
        if is_vague(name)
    ]
    assert vague == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_function_fits_on_a_screen(folder: str) -> None:
    long = [
        f"{place(path, node)} {node.name}: {lines_of(node)} lines"
        for path in files_of(folder)
        for node in functions(tree_of(path))
        if lines_of(node) > LONGEST_FUNCTION and not is_kernel(node)
    ]
    assert long == []


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The names of a function's parameters, without self, cls, *args and **kwargs."""
    names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def test_many_parameters_are_a_record() -> None:
    many = {
        f"{path.relative_to(ROOT).as_posix()} {node.name}"
        for folder in FOLDERS
        for path in files_of(folder)
        for node in functions(tree_of(path))
        if len(parameters(node)) > MOST_PARAMETERS and not is_kernel(node)
    }
    assert many == set(MANY_PARAMETERS)


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder not in BESIDE])
def test_a_file_and_a_class_do_one_thing(folder: str) -> None:
    large = []
    for path in files_of(folder):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LONGEST_FILE and "ops/triton" not in path.as_posix():
            large.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                methods = len({f.name for f in node.body if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))})
                if methods > MOST_METHODS:
                    large.append(f"{place(path, node)} {node.name}: {methods} methods")
    assert large == []


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder not in BESIDE])
def test_what_is_public_has_a_docstring(folder: str) -> None:
    assert [name for path in files_of(folder) for name in undocumented(path)] == []


def undocumented(path: Path) -> Iterator[str]:
    """Public modules, classes, functions and methods without a docstring. An overload has its implementation's."""
    tree = tree_of(path)
    if ast.get_docstring(tree) is None:
        yield f"{path.relative_to(ROOT)}:1"
    scopes: list[ast.Module | ast.ClassDef] = [tree]
    while scopes:
        for node in scopes.pop().body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.name[0] != "_":
                if isinstance(node, ast.ClassDef):
                    scopes.append(node)
                decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
                if ast.get_docstring(node) is None and not decorators & {"overload", "override", "setter"}:
                    yield f"{place(path, node)} {node.name}"


def types_of(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Every class, and every name that a module gives to a type: `Progress = Callable[[int], None]`.

    Not type variables, which are calls, nor constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name, node
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Subscript() | ast.BinOp() | ast.Name()):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), annotation=kind) if "TypeAlias" in ast.unparse(kind):
                pass
            case _:
                continue
        if re.match(r"_*[A-Z]\w*[a-z]", name):
            yield name, node


def test_no_two_types_have_one_name() -> None:
    places = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, node in types_of(tree_of(path)):
            places[name.strip("_")].append(place(path, node))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_the_packages_root_holds_nine_files() -> None:
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    modules = ("__init__", "__main__", "declarations", "errors", "events", "llm", "options", "presets", "questions")
    assert files == {"py.typed", *(f"{name}.py" for name in modules)}
    assert not [path for path in ROOT.glob("sfumato/**/*.py") if path.stem in ("utils", "util", "helpers", "common")]


def variables_read(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Every environment variable that a file asks for, as it is written: a name, or the expression of one."""
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Attribute(attr="environ"), slice=name, ctx=ast.Load()):
                pass
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ"), attr="get" | "pop"), args=[name, *_]):
                pass
            case ast.Call(func=ast.Attribute(attr="getenv"), args=[name, *_]):
                pass
            case ast.Compare(left=name, comparators=[ast.Attribute(attr="environ")]):
                pass
            case _:
                continue
        yield (str(name.value) if isinstance(name, ast.Constant) else ast.unparse(name)), node


def test_no_environment_variable_changes_what_it_does() -> None:
    read = {
        f"{place(path, node)} {name}"
        for path in PACKAGE.rglob("*.py")
        for name, node in variables_read(tree_of(path))
        if name not in VARIABLES
    }
    assert read == set()


TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def test_a_tests_file_has_a_name_of_its_own() -> None:
    assert [name for name, count in Counter(path.name for path in TESTS).items() if count > 1] == []


@pytest.mark.parametrize("folder", sorted({path.parent.relative_to(ROOT).as_posix() for path in TESTS}))
def test_a_test_says_which_file_it_tests(folder: str) -> None:
    """Its docstring begins with it: `sampling/step.py: …`, or a folder, or several; or a file beside the package."""
    silent = []
    for path in (path for path in TESTS if path.parent == ROOT / folder):
        subject, _, rest = (ast.get_docstring(tree_of(path)) or "").partition(":")
        names = [name.strip("`,.") for name in subject.split()]
        is_there = any(
            re.search(r"[./]", name) and ((PACKAGE / name).exists() or (ROOT / name).exists()) for name in names
        )
        if not (is_there and rest):
            silent.append(path.name)
    assert silent == []


def test_modules_of_tests_have_names_of_their_own() -> None:
    """pytest imports them by these names alone, whatever folder they are in."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_tests_do_not_import_one_another() -> None:
    modules = {path.stem for path in TESTS}
    imports = [
        place(path, node)
        for path in TESTS
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if {*alias.name.split("."), *((node.module or "").split(".") if isinstance(node, ast.ImportFrom) else ())}
        & modules
    ]
    assert imports == []


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("found = 1", ["found"]),
        ("def f(_told, seen_before=2): pass", ["_told", "seen_before"]),
        ("for given in x: pass", ["given"]),
        ("self.lost = 1", ["lost"]),
        ("class Made: pass", ["Made"]),
        ("match x:\n    case [*said]: pass", ["said"]),
        ("try: pass\nexcept E as wanted: pass", ["wanted"]),
        ("is_found = lambda thrown: 1", ["thrown"]),
        ("from hypothesis import given\nx.found\ndone = made_up.seen", []),
    ],
)
def test_a_vague_name_is_seen(source: str, names: list[str]) -> None:
    assert sorted(name for name, _ in names_bound(ast.parse(source)) if is_vague(name)) == sorted(names)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("class Draft: pass", ["Draft"]),
        ("Child = Callable[[int], None]\n_Span = int | None\nOther = Draft", ["Child", "_Span", "Other"]),
        ("Text: TypeAlias = str\nOpen: typing.TypeAlias = 'str'", ["Text", "Open"]),
        ("T = TypeVar('T')\nLONG = 1 | 2\nname = x[0]\nTop: int = 1\ndef f():\n    Inner = x[0]", []),
    ],
)
def test_a_name_of_a_type_is_seen(source: str, names: list[str]) -> None:
    assert [name for name, _ in types_of(ast.parse(source))] == names


def test_a_long_function_is_seen_and_a_kernel_is_not() -> None:
    body = "\n    x = 1" * LONGEST_FUNCTION
    sources = {f"def f():{body}": [LONGEST_FUNCTION + 1, False], f"@triton.jit\ndef f():{body}": [61, True]}
    sources |= {f"@triton.jit(do_not_specialize=[])\ndef f():{body}": [61, True]}
    for source, expected in sources.items():
        (node,) = functions(ast.parse(source))
        assert [lines_of(node), is_kernel(node)] == expected


def test_parameters_are_counted_without_self() -> None:
    sources = {"def f(a, /, b, *args, c, **more): pass": "abc", "def f(self, a): pass": "a", "def f(cls): pass": ""}
    for source, expected in sources.items():
        (node,) = functions(ast.parse(source))
        assert parameters(node) == list(expected)


@pytest.mark.parametrize(
    "source", ["os.environ['A']", "os.environ.get('A', 'b')", "os.getenv('A')", "'A' not in environ.environ"]
)
def test_a_variable_read_is_seen(source: str) -> None:
    assert [name for name, _ in variables_read(ast.parse(source))] == ["A"]
