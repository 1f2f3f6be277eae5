"""sfumato/: who may import whom. Walks the imports of every file and holds the table of rows and its fences.

Every import counts, wherever it stands: in a function, under TYPE_CHECKING, or as `import_module("a.literal.name")`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "sfumato").rglob("*.py"))

# Only from lower rows, or from one's own folder; the table of docs/tour.md is written from this. `system` is what the
# operating system gives, locks and child processes with limits, which every folder may need; `display` is what is shown
# without the command line. The lowest row's folders may import one another.
ROWS = [
    {"errors", "declarations", "options", "presets", "questions", "events", "system", "display"},
    {"ops", "tasks"},
    {"model"},
    {"sampling", "quant", "text"},
    {"checkpoints", "constraints"},
    {"engine"},
    {"templates"},
    {"remote"},
    {"llm"},
    {"evals", "measure"},
    {"training"},
    {"server"},
    {"cli"},
    {"__main__"},
]
ROW = {folder: number for number, folders in enumerate(ROWS) for folder in folders}

# Folders that know less than their row would let them.
KNOWS_ONLY = {"model": {"errors", "options", "ops"}}

# Back ends of one operation: each stands alone, and ops/__init__ chooses among them.
BACK_ENDS = {"sfumato.ops.triton", "sfumato.ops.cpu", "sfumato.ops.fused", "sfumato.ops.reference"}

# Third-party packages, and the only places that may import them.
FENCES = {
    "triton": {"ops.triton"},
    "tokenizers": {"text"},
    "jinja2": {"text"},
    "safetensors": {"checkpoints", "model.adapters"},
    "fastapi": {"server"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "prometheus_client": {"server"},
    "backports": {"server.http"},
    "ray": {"server"},
    "transformers": {"checkpoints.formats"},
    "gguf": {"checkpoints.formats"},
    "mlx": {"checkpoints.formats"},
    "peft": {"checkpoints.formats"},
    "PIL": {"model.vision"},
    "pyarrow": {"training.data"},
    "lm_eval": {"evals"},
    "llguidance": {"constraints"},
    "IPython": {"display"},
    "prompt_toolkit": {"cli.lines"},
}


def module_name(path: Path) -> str:
    """sfumato/ops/__init__.py → sfumato.ops.__init__: the last part is always the file's own."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def absolute(name: str, level: int, module: str) -> str:
    """A relative import's full name; `level` is its number of leading dots."""
    if level == 0:
        return name
    package = module.split(".")[:-level]
    return ".".join([*package, name] if name else package)


def imported_names(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything imported; `from a import b` is a.b, as b may be a module."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=name, names=names, level=level):
                base = absolute(name or "", level, module)
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                bare = name.lstrip(".")
                yield node.lineno, absolute(bare, len(name) - len(bare), module)


def is_within(name: str, place: str) -> bool:
    return name == place or name.startswith(place + ".")


def violations(source: str, module: str) -> list[str]:
    """What a file's imports break, one sentence each; `module` is its name as `module_name` gives it."""
    tree = ast.parse(source)
    if module == "sfumato.__init__":
        return list(face_violations(tree))
    folder = module.split(".")[1]
    if folder not in ROW:
        return [f"{module} belongs to no folder: ROWS has no {folder!r}"]
    sentences = []
    for line, name in imported_names(tree, module):
        reason = complaint(module, folder, name)
        if reason:
            sentences.append(f"{module}, line {line}: imports {name}: {reason}")
    return sentences


def complaint(module: str, folder: str, name: str) -> str | None:
    """Why `module` in `folder` may not import `name`; None if it may."""
    top, *rest = name.split(".")
    if top != "sfumato":
        places = FENCES.get(top)
        if places is None or any(is_within(module, f"sfumato.{place}") for place in places):
            return None
        return f"{top} is only for {', '.join(sorted(places))}"

    target = rest[0] if rest else ""
    if target == "__version__":
        return None
    if target == folder:
        mine = next((end for end in BACK_ENDS if is_within(module, end)), None)
        other = next((end for end in BACK_ENDS if is_within(name, end)), None)
        return "back ends never import one another" if mine and other and mine != other else None
    if target not in ROW:
        return "from within, import the folder that defines it, by its name"
    if folder in KNOWS_ONLY and target not in KNOWS_ONLY[folder]:
        return f"{folder} knows {', '.join(sorted(KNOWS_ONLY[folder]))} and nothing else"
    if ROW[target] > ROW[folder] or ROW[target] == ROW[folder] > 0:
        return f"{target} is not below {folder}"
    return None


def face_violations(tree: ast.AST) -> Iterator[str]:
    """sfumato/__init__.py: what runs at import is the standard library's; the rest is imported when first used."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.FunctionDef() | ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=[]):
                continue
            case ast.Import() | ast.ImportFrom():
                for line, name in imported_names(node, "sfumato.__init__"):
                    if name.split(".")[0] not in sys.stdlib_module_names | {"__future__"}:
                        yield f"sfumato.__init__, line {line}: imports {name} when sfumato is imported"
            case _:
                yield from face_violations(node)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_file_imports_only_what_it_may(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), module_name(path)) == []


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("sfumato.model.network", "from sfumato.engine import run", "knows errors, ops, options"),
        ("sfumato.model.network", "from sfumato.text.tokenizer import Tokenizer", "knows errors, ops, options"),
        ("sfumato.text.reader", "from sfumato import engine", "engine is not below text"),
        ("sfumato.quant.apply", "from .. import engine", "engine is not below quant"),
        ("sfumato.quant.apply", "from ..engine.run import Run", "engine is not below quant"),
        ("sfumato.text.reader", "def f():\n    import sfumato.engine.run", "line 2"),
        ("sfumato.text.reader", "if TYPE_CHECKING:\n    from sfumato.engine.run import Run", "line 2"),
        ("sfumato.text.reader", "import importlib\nimportlib.import_module('sfumato.llm')", "llm is not below text"),
        ("sfumato.text.reader", "import_module('..llm', 'sfumato.text')", "llm is not below text"),
        ("sfumato.engine.run", "from sfumato.templates.layout import Slot", "templates is not below engine"),
        ("sfumato.events", "from sfumato.model.config import ModelConfig", "model is not below events"),
        ("sfumato.ops.masks", "from sfumato.model import config", "model is not below ops"),
        ("sfumato.tasks.sudoku", "import sfumato.sampling.rules as d", "sampling is not below tasks"),
        ("sfumato.server.app", "import os, sfumato.cli", "cli is not below server"),
        ("sfumato.measure.work", "from ..training import train", "training is not below measure"),
        ("sfumato.engine.run", "import sfumato", "by its name"),
        ("sfumato.engine.run", "from sfumato import Options", "by its name"),
        ("sfumato.engine.run", "from sfumato import *", "by its name"),
        ("sfumato.engine.run", "from sfumato.utils import first", "by its name"),
        ("sfumato.utils", "", "belongs to no folder"),
        ("sfumato.nano.make", "", "belongs to no folder"),
        ("sfumato.ops.triton.attention", "from sfumato.ops import reference", "back ends"),
        ("sfumato.ops.triton.attention", "from ..cpu.experts import run", "back ends"),
        ("sfumato.ops.reference", "from sfumato.ops.triton import attention", "back ends"),
        ("sfumato.ops.cpu.__init__", "from ..reference import attend", "back ends"),
        ("sfumato.ops.__init__", "import triton", "triton is only for ops.triton"),
        ("sfumato.ops.reference", "import triton.language as tl", "triton is only for ops.triton"),
        ("sfumato.engine.run", "from tokenizers import Tokenizer", "tokenizers is only for text"),
        ("sfumato.engine.run", "import jinja2", "jinja2 is only for text"),
        ("sfumato.engine.run", "from safetensors.torch import load_file", "safetensors is only for"),
        ("sfumato.cli.serve", "def f():\n    import uvicorn", "uvicorn is only for server"),
        ("sfumato.cli.serve", "from fastapi import FastAPI", "fastapi is only for server"),
        ("sfumato.llm", "from starlette.responses import Response", "starlette is only for server"),
        ("sfumato.checkpoints.load", "__import__('transformers')", "transformers is only for checkpoints.formats"),
        ("sfumato.checkpoints.load", "from gguf import GGUFReader", "gguf is only for checkpoints.formats"),
        ("sfumato.ops.cpu.gemm", "import mlx.core", "mlx is only for checkpoints.formats"),
        ("sfumato.model.network", "import PIL.Image", "PIL is only for model.vision"),
        ("sfumato.cli.eval", "import lm_eval", "lm_eval is only for evals"),
        ("sfumato.__init__", "import torch", "when sfumato is imported"),
        ("sfumato.__init__", "from .options import Options", "when sfumato is imported"),
        ("sfumato.__init__", "try:\n    from sfumato.llm import LLM\nexcept ImportError:\n    pass", "line 2"),
    ],
)
def test_a_forbidden_import_is_seen(module: str, source: str, reason: str) -> None:
    (sentence,) = violations(source, module)
    assert reason in sentence


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sfumato.model.config", "from sfumato.errors import CheckpointError"),
        ("sfumato.options", "from sfumato.errors import InputError"),
        ("sfumato.model.network", "import torch\nfrom sfumato import ops\nfrom .cache import KVCache"),
        ("sfumato.llm", "from sfumato.engine.run import generate\nfrom sfumato.text.tokenizer import Tokenizer"),
        ("sfumato.quant.apply", "from .formats import pack\nfrom sfumato.quant import recipes"),
        ("sfumato.ops.__init__", "def load():\n    from .triton import attention\n    from . import reference, cpu"),
        (
            "sfumato.ops.triton.attention",
            "import triton\nfrom .matmul import dot\nfrom sfumato.ops.contract import Ops",
        ),
        ("sfumato.text.tokenizer", "from tokenizers import Tokenizer"),
        ("sfumato.checkpoints.formats.gguf", "import gguf, safetensors"),
        ("sfumato.cli.__init__", "from sfumato import __version__, llm"),
        ("sfumato.__init__", "from typing import Any\nif TYPE_CHECKING:\n    from sfumato.llm import LLM"),
        ("sfumato.__init__", "def __getattr__(name):\n    from sfumato.llm import LLM"),
    ],
)
def test_a_permitted_import_passes(module: str, source: str) -> None:
    assert violations(source, module) == []


def files_of(name: str) -> set[str]:
    """The files that importing this name runs: its own, and the __init__ of the folders that it names."""
    own = {module_name(path) for path in FILES}
    while name not in own and f"{name}.__init__" not in own and "." in name:
        name = name.rpartition(".")[0]
    return {name if name in own else f"{name}.__init__"} & own


def test_no_two_files_need_each_other() -> None:
    """No circle of imports, however long, between files or within a folder; those of a function count too."""
    needs: dict[str, set[str]] = {}
    for path in FILES:
        module = module_name(path)
        if module == "sfumato.__init__":
            continue
        names = [name for _, name in imported_names(ast.parse(path.read_text(encoding="utf-8")), module)]
        needs[module] = set().union(*(files_of(name) for name in names if is_within(name, "sfumato")))
        needs[module] -= {module, "sfumato.__init__"}
    while leaves := {module for module, others in needs.items() if not others & needs.keys()}:
        needs = {module: others for module, others in needs.items() if module not in leaves}
    assert {module: sorted(others & needs.keys()) for module, others in needs.items()} == {}


def test_import_sfumato_imports_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules); import sfumato; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names) - {'sfumato'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")
