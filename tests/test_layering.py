"""Who may import whom: walks the imports of every file in sfumato/ and holds DESIGN's row table and its fences.

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

# Only from lower rows, or from one's own folder. events lies under its neighbours of row 0, because it holds the
# error family, which every room may raise; masks, because an attention operation takes one; files, because ops/cpu
# keeps a library.
ROWS = [
    {"events", "masks"},
    {"files"},
    {"arguments", "config", "ops", "sudoku", "forms", "confined", "template"},
    {"cache", "dice", "diffusion", "tokenizer"},
    {"model", "chat", "search"},
    {"calls", "constrain"},
    {"quant", "adapters", "offload"},
    {"interop"},
    {"step"},
    {"guided", "recorded"},
    {"rows"},
    {"engine", "weights"},
    {"reader", "run"},
    {"batch", "edit", "convert", "remote"},
    {"llm"},
    {"jobs", "measure"},
    {"server", "finetune", "evals"},
    {"cli"},
]
ROW = {room: number for number, rooms in enumerate(ROWS) for room in rooms}

# Rooms that know less than their row would let them.
KNOWS_ONLY = {"model": {"config", "masks", "cache", "ops"}}

# Back ends of one operation: each stands alone, and ops/__init__ chooses among them.
BACK_ENDS = {"sfumato.ops.triton", "sfumato.ops.cpu", "sfumato.ops.fused", "sfumato.ops.reference"}

# Third-party packages, and the only places that may import them.
FENCES = {
    "triton": {"ops.triton"},
    "tokenizers": {"tokenizer"},
    "jinja2": {"template"},
    "safetensors": {"weights", "adapters", "convert", "interop", "quant"},
    "fastapi": {"server"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "prometheus_client": {"server"},
    "ray": {"server"},
    "transformers": {"interop"},
    "gguf": {"interop"},
    "mlx": {"interop"},
    "lm_eval": {"evals"},
    "llguidance": {"constrain", "forms", "search"},
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
    room = module.split(".")[1]
    if room not in ROW:
        return [f"{module} belongs to no room: DESIGN's table has no {room!r}"]
    found = []
    for line, name in imported_names(tree, module):
        reason = complaint(module, room, name)
        if reason:
            found.append(f"{module}, line {line}: imports {name}: {reason}")
    return found


def complaint(module: str, room: str, name: str) -> str | None:
    """Why `module` in `room` may not import `name`; None if it may."""
    top, *rest = name.split(".")
    if top != "sfumato":
        places = FENCES.get(top)
        if places is None or any(is_within(module, f"sfumato.{place}") for place in places):
            return None
        return f"{top} is only for {', '.join(sorted(places))}"

    target = rest[0] if rest else ""
    if target == "__version__":
        return None
    if target == room:
        mine = next((end for end in BACK_ENDS if is_within(module, end)), None)
        other = next((end for end in BACK_ENDS if is_within(name, end)), None)
        return "back ends never import one another" if mine and other and mine != other else None
    if target not in ROW:
        return "from within, import the room that defines it, by its name"
    if room in KNOWS_ONLY and target not in KNOWS_ONLY[room]:
        return f"{room} knows {', '.join(sorted(KNOWS_ONLY[room]))} and nothing else"
    if ROW[target] >= ROW[room]:
        return f"{target} is not below {room}"
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
        ("sfumato.model", "from sfumato.engine import generate", "knows cache, config"),
        ("sfumato.model", "from sfumato.tokenizer import Tokenizer", "knows cache, config"),
        ("sfumato.cache", "from sfumato import diffusion", "diffusion is not below cache"),
        ("sfumato.cache", "from . import diffusion", "diffusion is not below cache"),
        ("sfumato.cache", "from .model import Model", "model is not below cache"),
        ("sfumato.cache", "def f():\n    import sfumato.model", "line 2"),
        ("sfumato.cache", "if TYPE_CHECKING:\n    from sfumato.model import Model", "line 2"),
        ("sfumato.cache", "import importlib\nimportlib.import_module('sfumato.model')", "model is not below"),
        ("sfumato.cache", "import_module('.model', 'sfumato')", "model is not below"),
        ("sfumato.engine", "from sfumato.weights import load", "weights is not below engine"),
        ("sfumato.events", "from sfumato.config import ModelConfig", "config is not below events"),
        ("sfumato.config", "from sfumato import ops", "ops is not below config"),
        ("sfumato.sudoku", "import sfumato.diffusion as d", "diffusion is not below sudoku"),
        ("sfumato.quant.apply", "from ..adapters import attach_", "adapters is not below quant"),
        ("sfumato.server.app", "import os, sfumato.cli", "cli is not below server"),
        ("sfumato.server.__init__", "from ..finetune import train", "finetune is not below server"),
        ("sfumato.engine", "import sfumato", "by its name"),
        ("sfumato.engine", "from sfumato import Options", "by its name"),
        ("sfumato.engine", "from sfumato import *", "by its name"),
        ("sfumato.engine", "from sfumato.utils import first", "by its name"),
        ("sfumato.utils", "", "belongs to no room"),
        ("sfumato.nano.make", "", "belongs to no room"),
        ("sfumato.ops.triton.attention", "from sfumato.ops import reference", "back ends"),
        ("sfumato.ops.triton.attention", "from ..cpu.experts import run", "back ends"),
        ("sfumato.ops.reference", "from sfumato.ops.triton import attention", "back ends"),
        ("sfumato.ops.cpu.__init__", "from ..reference import attend", "back ends"),
        ("sfumato.ops.__init__", "import triton", "triton is only for ops.triton"),
        ("sfumato.ops.reference", "import triton.language as tl", "triton is only for ops.triton"),
        ("sfumato.chat", "from tokenizers import Tokenizer", "tokenizers is only for tokenizer"),
        ("sfumato.chat", "import jinja2", "jinja2 is only for template"),
        ("sfumato.engine", "from safetensors.torch import load_file", "safetensors is only for"),
        ("sfumato.cli.serve", "def f():\n    import uvicorn", "uvicorn is only for server"),
        ("sfumato.cli.serve", "from fastapi import FastAPI", "fastapi is only for server"),
        ("sfumato.llm", "from starlette.responses import Response", "starlette is only for server"),
        ("sfumato.weights", "__import__('transformers')", "transformers is only for interop"),
        ("sfumato.weights", "from gguf import GGUFReader", "gguf is only for interop"),
        ("sfumato.ops.cpu.gemm", "import mlx.core", "mlx is only for interop"),
        ("sfumato.cli.eval", "import lm_eval", "lm_eval is only for evals"),
        ("sfumato.__init__", "import torch", "when sfumato is imported"),
        ("sfumato.__init__", "from .events import Options", "when sfumato is imported"),
        ("sfumato.__init__", "try:\n    from sfumato.llm import LLM\nexcept ImportError:\n    pass", "line 2"),
    ],
)
def test_a_forbidden_import_is_seen(module: str, source: str, reason: str) -> None:
    found = violations(source, module)
    assert len(found) == 1
    assert reason in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sfumato.config", "from sfumato.events import CheckpointError"),
        ("sfumato.model", "import torch\nfrom sfumato import ops\nfrom .cache import KVCache"),
        ("sfumato.llm", "from sfumato.engine import generate\nfrom sfumato.tokenizer import Tokenizer"),
        ("sfumato.quant.apply", "from .formats import pack\nfrom sfumato.quant import recipes"),
        ("sfumato.ops.__init__", "def load():\n    from .triton import attention\n    from . import reference, cpu"),
        ("sfumato.ops.triton.attention", "import triton\nfrom .matmul import dot\nfrom sfumato.ops import Ops"),
        ("sfumato.tokenizer", "from tokenizers import Tokenizer"),
        ("sfumato.interop.gguf", "import gguf, safetensors"),
        ("sfumato.cli.__init__", "from sfumato import __version__, llm"),
        ("sfumato.__init__", "from typing import Any\nif TYPE_CHECKING:\n    from sfumato.llm import LLM"),
        ("sfumato.__init__", "def __getattr__(name):\n    from sfumato.llm import LLM"),
    ],
)
def test_a_permitted_import_passes(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_import_sfumato_imports_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules); import sfumato; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names) - {'sfumato'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")
