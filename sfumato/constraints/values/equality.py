"""When two JSON values are one: 1 and 1.0 are, 1 and true are not, and the order of keys says nothing."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any


def canonical(value: Any) -> Hashable:
    """A hashable value that is equal for equal JSON values, and for no others."""
    if isinstance(value, bool):
        return ("boolean", value)
    if isinstance(value, list):
        return ("array", *map(canonical, value))
    if isinstance(value, dict):
        return ("object", frozenset((name, canonical(inner)) for name, inner in value.items()))
    return value  # type: ignore[no-any-return]  # text, a number or None: none is a tuple


def kinds_of(value: Any) -> str:
    """The kind of a value, one of `facets.KINDS`."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "whole"
    if isinstance(value, float):
        return "whole" if value.is_integer() else "fraction"
    return {str: "string", list: "array", dict: "object", type(None): "null"}[type(value)]
