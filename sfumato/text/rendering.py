"""A checkpoint's jinja template, compiled and rendered in jinja's sandbox: the part that runs in a child process.

A template is somebody else's program. The sandbox keeps it from reaching anything outside itself; the child process
(`confined`) bounds its time and memory, whatever its loops, filters and operators do. So its functions are
called through `confined.ChildPool.run`, by `template` alone. Their errors are one sentence for the user.

Import-light, because a child process starts with it: jinja2 and nothing else.
"""

from __future__ import annotations

import functools
import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sfumato.errors import InputError

MAX_RENDERED = 16 << 20
"""Characters of one prompt, 64 for each token of the longest context."""
TEMPLATES_KEPT = 4
"""Compiled templates that a child process keeps."""


def check(source: str) -> None:
    """InputError where the source is not a jinja template."""
    _compiled(source)


def render(source: str, variables: dict[str, Any]) -> str:
    """The text of a template with these variables. InputError where it refuses, or fails on them."""
    pieces, length = [], 0
    try:
        for piece in _compiled(source).generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_RENDERED:
                raise InputError(f"the chat template was stopped at {MAX_RENDERED} characters of prompt; send less")
    except (InputError, MemoryError):
        raise
    except RecursionError:
        raise InputError("the chat template was stopped: its calls nest too deeply") from None
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template refuses: {_one_line(error)}") from None
    except Exception as error:  # whatever the template's own expressions raise: types, keys, division by zero
        raise InputError(
            f"the chat template fails on these messages: {type(error).__name__}: {_one_line(error)}"
        ) from None
    return "".join(pieces)


def render_all(source: str, variables: list[dict[str, Any]]) -> list[str]:
    """The texts of a template with each of these variables; see `render`."""
    return [render(source, each) for each in variables]


@functools.lru_cache(TEMPLATES_KEPT)
def _compiled(source: str) -> jinja2.Template:
    try:
        return _Sandbox().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template is no jinja: {error.message} in line {error.lineno}") from None
    except (RecursionError, SyntaxError, ValueError, OverflowError) as error:
        raise InputError(f"the chat template cannot be compiled: {type(error).__name__}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with transformers' settings and functions."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag])
        self.filters["tojson"] = _to_json
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's part for trainers; here it is what it encloses."""

    tags = {"generation"}  # noqa: RUF012 — the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
