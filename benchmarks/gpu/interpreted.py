"""A few Triton kernels under its interpreter, on any machine: the dry run's word for the operations it cannot load.

The interpreter is chosen while triton is imported, so this runs in a process of its own, with TRITON_INTERPRET=1; in
float32, which needs none of the corrections of tests/triton_interpreter.py."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks import ops
from benchmarks.gpu.setting import Row, Setting, tried
from sfumato.ops import load

CASES = ("norms: norm_add", "linear: queries, keys, values, 8 rows")
BOUND = 1e-5


def run(setting: Setting, _: str) -> Iterator[Row]:
    for name in CASES:
        yield tried(name, lambda name=name: check(setting, name))  # type: ignore[misc]


@torch.inference_mode()
def check(setting: Setting, name: str) -> dict[str, Any]:
    from sfumato.ops import triton

    file, _, label = name.partition(": ")
    cases = importlib.import_module(f"benchmarks.ops.{file}").cases("tiny", setting.device)
    case = next(case for case in cases if case.name == label)
    got, exact = (case.ready(each, torch.float32)() for each in (triton.record(), load("reference")))
    error = ops.relative(got, exact)
    return {"ok": error <= BOUND, "error_of_float32": error, "says": f"{label} under the interpreter {error:.0e}"}


def in_a_child(setting: Setting) -> Row:
    """Its rows as one."""
    if find_spec("triton") is None:
        return {"name": "interpreter", "skipped": "triton is not installed"}
    command = [sys.executable, "-m", "benchmarks.gpu", "interpreted", "--dry", "--out", str(setting.out)]
    surroundings = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=max(1.0, setting.left))
    is_right = done.returncode == 0 and done.stdout.count('"ok": true') == len(CASES)
    more = {} if is_right else {"error": (done.stdout + done.stderr)[-2000:]}
    return {"name": "interpreter", "ok": is_right, "says": f"{len(CASES)} kernels interpreted", **more}
