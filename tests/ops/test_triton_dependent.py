"""ops/triton/dependent.py: every kernel waits before it touches memory, every launch says whether it may come
early, and below sm_90, under the interpreter and by default none does."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import THIN

pytest.importorskip("triton")

from sfumato.measure.capture import Node, Variant, meta_step
from sfumato.ops import triton
from sfumato.ops.triton import ahead, dependent, tuning
from sfumato.ops.triton.launches import as_if

FOLDER = Path(ahead.__file__).parent
FIRST, KEYWORDS = "enter(PDL)", "overlap"


@pytest.fixture(autouse=True)
def _without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


# ---- the source ------------------------------------------------------------------------------------------------------


def launches(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Each `kernel[grid](...)` of a function under @triton.jit, and that function's name."""
    compiled = set(jitted(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            name = ast.unparse(node.func.value)
            if name in compiled:
                yield name, node


def jitted(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    results = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return {one.name: one for one in results if any("triton.jit" in ast.unparse(each) for each in one.decorator_list)}


def wrong(source: str) -> list[str]:
    """What breaks the chain in this file."""
    tree, results = ast.parse(source), []
    kernels = jitted(tree)
    for name, call in launches(tree):
        body = kernels[name].body
        first = body[1] if ast.get_docstring(kernels[name]) is not None else body[0]
        if ast.unparse(first) != FIRST:
            results.append(f"{name} does not begin with {FIRST}")
        if not any(each.arg is None and ast.unparse(each.value).startswith(f"{KEYWORDS}(") for each in call.keywords):
            results.append(f"a launch of {name} lacks **{KEYWORDS}(device)")
    return results


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_every_kernel_waits_first(file: Path) -> None:
    assert wrong(file.read_text()) == []


@pytest.mark.parametrize(
    ("body", "more", "count"),
    [
        ("    enter(PDL)\n", ", **overlap(x.device)", 0),
        ('    """Says what."""\n    enter(PDL)\n', ", **overlap(x.device)", 0),
        ("    n = tl.program_id(0)\n    enter(PDL)\n", ", **overlap(x.device)", 1),
        ("    if PDL:\n        enter(PDL)\n", ", **overlap(x.device)", 1),
        ("    enter(PDL)\n", ", PDL=False", 1),
        ("    pass\n", "", 2),
    ],
)
def test_what_breaks_the_chain(body: str, more: str, count: int) -> None:
    source = f"@triton.jit\ndef _one(x_ptr, PDL):\n{body}    tl.store(x_ptr, 0)\ndef one(x):\n    _one[(1,)](x{more})\n"
    assert len(wrong(source)) == count


def test_every_kernel_is_seen() -> None:
    """The walk above finds a launch of each kernel that is compiled ahead of time."""
    launched = {
        f"{file.stem}.{name}" for file in FOLDER.glob("*.py") for name, _ in launches(ast.parse(file.read_text()))
    }
    compiled = {f"{op}.{each.kernel.__name__}" for op, some in ahead.specials(90).items() for each in some}
    assert len(compiled) > 25
    assert compiled == launched


# ---- when ------------------------------------------------------------------------------------------------------------


def test_off_by_default() -> None:
    assert dependent.overlap("sm_90") == {"PDL": False, "launch_pdl": False}


def test_from_sm_90_on() -> None:
    with tuning.using("pdl", ON=1):
        assert [arch for arch in ahead.ARCHS if dependent.is_on(f"sm_{arch}")] == [90, 100, 120]
        assert dependent.overlap("sm_90") == {"PDL": True, "launch_pdl": True}


def test_the_interpreter_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with tuning.using("pdl", ON=1):
        assert not dependent.is_on("sm_90")


def nodes(recipe: str, is_encoding: bool) -> list[Node]:
    stepped, _ = meta_step(THIN, triton.record(), Variant(recipe, 1, is_encoding))
    assert not stepped.refusals
    return [node for node in stepped.nodes if node.is_kernel]


@pytest.mark.parametrize(("arch", "on"), [(90, True), (80, False)])
@pytest.mark.parametrize(("recipe", "is_encoding"), [("int4", True), ("fp8", False)])
def test_all_of_a_step_or_nothing(arch: int, on: bool, recipe: str, is_encoding: bool) -> None:
    with as_if(arch), tuning.using("pdl", ON=1):
        results = nodes(recipe, is_encoding)
    assert len(results) > 300
    assert {(node.sizes["PDL"], node.sizes["launch_pdl"]) for node in results} == {(on, on)}


def test_the_launch_takes_it() -> None:
    """The keyword reaches what Triton's launcher reads."""
    with as_if(90):
        with tuning.using("pdl", ON=1):
            on = next(node for node in nodes("", False) if node.name == "_noise").launch.compiled()
        off = next(node for node in nodes("", False) if node.name == "_noise").launch.compiled()
    assert on.metadata.launch_pdl and "griddepcontrol" in on.asm["ptx"]
    assert not off.metadata.launch_pdl and "griddepcontrol" not in off.asm["ptx"]


# ---- what it compiles to ---------------------------------------------------------------------------------------------

CHILD = """
import json, re, sys
from sfumato.ops.triton import ahead, tuning

arch, found, seen = int(sys.argv[1]), [], set()
access = re.compile(r"^\\s*(@!?%\\w+ )?((ld|st|atom|red|prefetch)\\b\\S*\\.global|cp\\.\\S*async|multimem)", re.M)
with tuning.using("pdl", ON=1):
    for op, each in ahead.specials(arch).items():
        for special in each:
            if special.kernel in seen:
                continue
            seen.add(special.kernel)
            made = ahead.compiled(special, arch)
            ptx = made.asm["ptx"]
            body = ptx[ptx.index(".entry") :]
            waits = [found.start() for found in re.finditer(r"griddepcontrol\\.wait", body)]
            lets = [found.start() for found in re.finditer(r"griddepcontrol\\.launch_dependents", body)]
            touched, branch = access.search(body), re.search(r"^\\s*(@!?%\\w+ )?bra\\b", body, re.M)
            code = ahead.disassembled(made.asm["cubin"])[0]
            memory = re.compile(r"^(@!?U?P\\w+ )?(LD|LDG|ST|STG|ATOM|ATOMG|RED|REDG|LDGSTS|UTMALDG|UBLKCP)\\b")
            found.append({
                "name": f"{op} {special.name}", "waits": waits, "lets": lets,
                "touched": touched and touched.start(), "branch": branch and branch.start(),
                "machine": [next((i for i, one in enumerate(code) if re.search(what, one)), None)
                            for what in ("ACQBULK", "PREEXIT", memory)],
            })
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "arch", [90, pytest.param(100, marks=pytest.mark.slow), pytest.param(120, marks=pytest.mark.slow)]
)
def test_the_wait_stands_before_all_memory(arch: int, tmp_path: Path) -> None:
    """Once a kernel, since it begins alike for all sizes: one wait, on every path, before anything is read or written,
    in what Triton writes and in what the assembler makes of it."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(arch)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert child.returncode == 0, child.stderr
    rows: list[dict[str, Any]] = json.loads(child.stdout)
    assert len(rows) > 25
    for row in rows:
        (waits,), (lets,) = row["waits"], row["lets"]
        assert waits < lets < row["touched"], row
        assert row["branch"] is None or lets < row["branch"], row
        wait, let, memory = row["machine"]
        assert wait < let and wait < memory, row
