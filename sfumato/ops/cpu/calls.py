"""Calls of the compiled library: how Python's values become C's."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float, c_int, c_long, c_void_p
from typing import Any

import torch
from torch import Tensor

from sfumato.ops.cpu import build

NUMBER_TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes of inputs and outputs, as the library numbers them."""

_FUNCTIONS: dict[str, Callable[..., Any]] = {}


def call(name: str, *arguments: Any) -> None:
    """Call a function of the library; the thread count that torch is set to comes last."""
    function = _FUNCTIONS.get(name)
    if function is None:
        entry = getattr(build.library(), name)
        entry.restype = None
        function = _FUNCTIONS[name] = entry
    function(*map(_argument, arguments), c_int(torch.get_num_threads()))


def pointer(x: Tensor | None) -> int | None:
    """Where a tensor lies; None is C's null."""
    return None if x is None else x.data_ptr()


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return c_void_p(value.data_ptr())
    if isinstance(value, float):
        return c_float(value)
    return c_long(value) if isinstance(value, int) else value
