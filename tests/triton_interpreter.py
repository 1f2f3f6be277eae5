"""How a test module runs kernels under Triton's interpreter.

The interpreter is chosen while triton is imported, for the whole process, and would slow or break whatever else uses
triton there. So the tests of a module run in one child process, and the parent's tests look up the result of each:

    pytest.importorskip("triton")
    import triton_interpreter
    ...tests as usual, on CPU tensors...
    triton_interpreter.in_a_child(globals())  # the last line

With TRITON_INTERPRET=1 in the environment they run where they are: for a debugger, or `pytest -k`.

The interpreter of Triton 3.6 keeps bfloat16 as 16-bit integers: it cuts where a GPU rounds, and its `tl.dot` multiplies
the integers. Both are put right below, float32 products that depend on a row's place in its tile, and bounds of loops
that were loaded, which a newer numpy refuses. Arithmetic
between bfloat16 tensors is still wrong there: cast to float32 first.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest

IS_ON = os.environ.get("TRITON_INTERPRET") == "1"
SECONDS = 600


def in_a_child(module: dict[str, Any]) -> None:
    """Make each test of this module a look at its result in the child."""
    if not IS_ON:
        for name, value in list(module.items()):
            if name.startswith("test_") and callable(value):
                module[name] = _looked_up(value, module["__file__"])


def _looked_up(test: Callable[..., None], file: str) -> Callable[..., None]:
    @functools.wraps(test)
    def look_up(*args: object, **kwargs: object) -> None:
        name = os.environ["PYTEST_CURRENT_TEST"].rsplit(" ", 1)[0].split("::", 1)[1]
        outcomes, output = _outcomes(file)
        verdict, text = outcomes.get(name, ("failed", output))
        if verdict == "skipped":
            pytest.skip(text)
        if verdict == "failed":
            pytest.fail(f"under the interpreter:\n{text}", pytrace=False)

    return look_up


@functools.cache
def _outcomes(file: str) -> tuple[dict[str, tuple[str, str]], str]:
    """Name → (passed, skipped or failed, its text), and all that the child printed."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [sys.executable, "-m", "pytest", file, "-q", "-p", "no:cacheprovider", f"--junitxml={report.name}"]
        if "--slow" in sys.argv:
            command.append("--slow")
        child = subprocess.run(
            command,
            env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
        try:
            cases = ElementTree.parse(report.name).iter("testcase")
        except ElementTree.ParseError:
            return {}, child.stdout
        return {case.get("name", ""): _verdict(case) for case in cases}, child.stdout


def _put_right() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot, patch = builder.cast_impl, builder.create_dot, interpreter._patch_lang_tensor

    def widened(bits: Any) -> Any:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def narrowed(values: Any) -> Any:
        """To the nearest, ties to even; what is not a number stays so."""
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        nearest = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)

    def new_cast(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return cast(self, src, dst_type)
        values = widened(src.data) if source == tl.bfloat16 else src.data
        if target == tl.bfloat16:
            return handle(narrowed(values), target)
        return handle(values.astype(interpreter._get_np_dtype(target)), target)

    def new_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        a, b = (handle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        a, b = (handle(x.data.astype(np.float32), tl.float32) if x.dtype.scalar == tl.float16 else x for x in (a, b))
        if {a.data.dtype, b.data.dtype, d.data.dtype} == {np.dtype(np.float32)}:
            # numpy's library sums a row in an order that depends on where it stands, a GPU's units do not.
            product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
            return handle((product + d.data).astype(np.float32), d.dtype.scalar)
        return dot(self, a, b, d, *options)

    def new_patch(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    builder.cast_impl, builder.create_dot, interpreter._patch_lang_tensor = new_cast, new_dot, new_patch


def _hasten() -> None:
    """Make once, or for each launch, what the interpreter makes for each call or each value: half its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, np_dtype, type_of_values = interpreter._patch_lang, interpreter._get_np_dtype, tl.core._type_for_tuple_values
    of_scalar, of_shape = functools.cache(np_dtype), dict[tuple[int, ...], Any]()

    def new_patch(kernel: Any) -> Any:
        """The language as a launch needs it, Triton's own functions included."""
        scope = patch(kernel)
        interpreter._patch_builtin(tl.core, interpreter.interpreter_builder, scope)
        interpreter._patch_lang_core(tl.core, scope)
        return scope

    def new_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A function within a kernel, whose launch has changed the language."""
        return self.rewrite()(*args, **kwargs)

    def new_type_of_values(values: Any, fields: Any = None) -> Any:
        if fields is not None or any(type(value) is not int for value in values):
            return type_of_values(values, fields)
        key = tuple(values)
        return of_shape.get(key) or of_shape.setdefault(key, type_of_values(values))

    def new_np_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        return np_dtype(scalar) if isinstance(scalar, tl.pointer_type) else of_scalar(scalar)

    interpreter._patch_lang, interpreter.InterpretedFunction.__call__ = new_patch, new_call
    tl.core._type_for_tuple_values, interpreter._get_np_dtype = new_type_of_values, new_np_dtype


if IS_ON:
    _put_right()
    _hasten()


def _verdict(case: ElementTree.Element) -> tuple[str, str]:
    for tag, verdict in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        element = case.find(tag)
        if element is not None:
            return verdict, element.text or element.get("message") or ""
    return "passed", ""
