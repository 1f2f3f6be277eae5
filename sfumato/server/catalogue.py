"""`Options` as data: each option's type, range and meaning, for the requests' fields and for GET /v1/options.

All of it is derived from `sfumato.options`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import Field

from sfumato import options as declared
from sfumato.options import BIG, OPTIONS

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
    return {name: _entry(option) for name, option in OPTIONS.items()}


def _entry(option: declared.Option) -> Option:
    about = option.about
    low, high = NARROWER.get(option.name, (about.minimum, about.maximum))
    default = list(option.default) if isinstance(option.default, tuple) else option.default
    return Option(
        option.name,
        _TYPES.get(option.kind, "string"),
        default,
        low,
        None if high == BIG else high,
        list(option.choices) or None,
        about.sentence,
    )


def field(name: str, **more: Any) -> Any:
    """The field of a request that sets this option; what is left out, or null, leaves the option as it is."""
    option = options()[name]
    bounds: dict[str, Any] = {}
    if option.minimum is not None:
        bounds = {"ge": option.minimum, "le": BIG if option.maximum is None else option.maximum}
    return Field(None, **{"description": option.doc or None, **bounds, **more})


_TYPES: dict[Any, Any] = {int: "integer", float: "number", bool: "boolean", tuple: "array", dict: "object"}
