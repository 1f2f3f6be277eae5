"""`Options` as data: each option's type, range and meaning, for the requests' fields and for GET /v1/options.

The words are the docstrings in options.py, read from its source, so that there is one text of each.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import Field

from sfumato import options as declared
from sfumato.options import Options

NARROWER = {"temperature": (0.0, 2.0)}
"""Ranges of requests that are not those of `Options`: an OpenAI client's temperature ends at 2."""


@dataclass(frozen=True)
class Option:
    name: str
    type: Literal["integer", "number", "boolean", "string", "array", "object"]
    default: Any
    minimum: float | None
    maximum: float | None
    choices: list[str] | None
    doc: str


@cache
def options() -> dict[str, Option]:
    """Every option by its name, in the order of `Options`."""
    hints, docs = get_type_hints(Options), _docs()
    ranges = {name: (low, high) for name, low, high, _ in declared._RANGES} | NARROWER
    found = {}
    for field in dataclasses.fields(Options):
        kinds = [kind for kind in get_args(hints[field.name]) or (hints[field.name],) if kind is not type(None)]
        if get_origin(hints[field.name]) is tuple:
            kinds = [hints[field.name]]
        low, high = ranges.get(field.name, (None, None))
        choices = [str(one) for one in get_args(kinds[0])] if get_origin(kinds[0]) is Literal else None
        found[field.name] = Option(
            field.name,
            _TYPES.get(get_origin(kinds[0]) or kinds[0], "string"),
            list(field.default) if isinstance(field.default, tuple) else field.default,
            low,
            None if high == declared._BIG else high,
            choices,
            docs.get(field.name, ""),
        )
    return found


def field(name: str, **more: Any) -> Any:
    """The field of a request that sets this option; what is left out, or null, leaves the option as it is."""
    option = options()[name]
    bounds: dict[str, Any] = {}
    if option.minimum is not None:
        bounds = {"ge": option.minimum, "le": declared._BIG if option.maximum is None else option.maximum}
    return Field(None, **{"description": option.doc or None, **bounds, **more})


_TYPES: dict[Any, Any] = {int: "integer", float: "number", bool: "boolean", tuple: "array", dict: "object"}


def _docs() -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(Options))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for before, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            assert isinstance(before.target, ast.Name)
            found[before.target.id] = " ".join(str(after.value.value).split())
    return found
