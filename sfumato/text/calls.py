"""Tool calls out of what stands between `<|tool_call>` and `<tool_call|>`.

Models do not always write calls as they should. So there is a ladder: a block is read by the first rung of `LADDER`
that makes sense of all of it, from the strictest to the most forgiving. What no rung reads is no call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sfumato.text.arguments import arguments_of, read_exactly
from sfumato.text.declared import Declared
from sfumato.text.guided import GuidedReader
from sfumato.text.mending import MendingReader
from sfumato.text.notation import (
    IN_NAME,
    LONGEST_NAME,
    MARK,
    Argument,
    ExactReader,
    Malformed,
    Pairs,
    Quoted,
    Values,
    Word,
    plain,
)

DeclaredTools = Mapping[str, Declared]
"""What each tool declares of its arguments, by its name."""


@dataclass(frozen=True)
class CallBlock:
    """The calls of a block, and the text that stands before and behind them and belongs to none."""

    calls: list[dict[str, Any]]
    before: str = ""
    behind: str = ""


_NAME = rf"{IN_NAME}{{1,{LONGEST_NAME}}}"
_HEAD = re.compile(rf"(?:call\s*:\s*){{1,4}}({_NAME})(?<!:)\s*(?=\{{)")
_PREFIX = r"(?:(?:call|function|tool|tool_call)\s*:\s*|call\s+){0,4}"
_LOOSE_HEAD = re.compile(rf"{_PREFIX}[{MARK}\"']?({_NAME}?)[{MARK}\"']?\s*:?\s*(?=[{{(])", re.IGNORECASE)
_BARE_HEAD = re.compile(rf"({_PREFIX})({_NAME})(?:\Z|\s+(?=[^\s:=]{{1,128}}\s*[:=]))", re.IGNORECASE)
"""A name without brackets: alone, or with arguments behind it."""
_HEAD_WITHIN = re.compile(rf"(?<!\w)call:({_NAME})(?=[{{(])")
_SPACE_OF_NAMES = re.compile(r"(?:default_api|functions|tools)[.:/]")
_RECORD = re.compile(r"\[?\s*\{")
_GAPS, _GAPS_AND_CLOSERS = re.compile(r"[\s,;]*"), re.compile(r"[\s,;)\]}]*")
_FENCE = re.compile(r"```[\w-]*\s*")
_NAMES = ("name", "function", "tool_name", "function_name", "tool", "call", "action")
_ARGUMENTS = ("arguments", "parameters", "args", "input", "params", "tool_input", "action_input")


def read_block(source: str, tools: DeclaredTools, is_closed: bool) -> CallBlock | None:
    """The calls in a block, in which `MARK` stands for each `<|"|>`; None where it holds none.

    `is_closed`: the model has ended the block, or its turn. A block that was cut off is read only if its calls are
    complete: half a call is none.
    """
    source = _unwrapped(source)
    for rung in LADDER if is_closed else LADDER[:-GUESSES]:
        try:
            block = rung(source, tools)
        except Malformed:
            continue
        if block.calls:
            return block
    return None


def _as_written(source: str, tools: DeclaredTools) -> CallBlock:
    """Gemma's own notation: `call:name{key:value}`, strings between two `<|"|>`. Several calls may share a block."""
    return CallBlock(_sequence(ExactReader(source), _HEAD, tools))


def _quoted(source: str, tools: DeclaredTools) -> CallBlock:
    """Keys, strings and names in JSON's or Python's quotes; a name without `call:` or with more in front of it."""
    return CallBlock(_sequence(ExactReader(source, has_quotes=True), _LOOSE_HEAD, tools))


def _assigned(source: str, tools: DeclaredTools) -> CallBlock:
    """Arguments as assignments: `call:f(a=1, b="x")`, `{a='x'}`."""
    return CallBlock(_sequence(ExactReader(source, has_quotes=True, has_equals=True), _LOOSE_HEAD, tools))


def _as_json(source: str, tools: DeclaredTools) -> CallBlock:
    """Calls as JSON has them: `{"name": "f", "arguments": {…}}` and its relatives, one, several or in a list."""
    reader, at, calls = ExactReader(source, has_quotes=True), 0, list[dict[str, Any]]()
    while (at := _skip(source, at)) < len(source):
        node, at = reader.value(at)
        calls += _calls_of(node, tools)
    return CallBlock(calls)


def _mended(source: str, tools: DeclaredTools) -> CallBlock:
    """Arguments that `mending` has to repair, names without brackets, and text around the calls."""
    reader, calls = MendingReader(source), list[dict[str, Any]]()
    start = at = _first_call(source, tools)
    while (at := _skip(source, at, _GAPS_AND_CLOSERS if calls else _GAPS)) < len(source):
        if head := _RECORD.match(source, at):
            node, end = reader.arguments(head.end() - 1, Declared())
            try:
                calls += _calls_of(node, tools)
            except Malformed:
                if calls:
                    break
                raise
            at = end
            continue
        head = _LOOSE_HEAD.match(source, at)
        name = head[1].rstrip(":") if head else ""
        if head is None and not calls and (head := _BARE_HEAD.match(source, at)):
            name = head[2] if head[1] or head[2] in tools else ""
        if head is None or not _is_name(name):
            break
        node, at = reader.arguments(head.end(), tools.get(_declared_name(name, tools), Declared()))
        calls.append(_call(name, node, tools))
    return CallBlock(calls, plain(source[:start]), plain(source[at:]))


def _guided(source: str, tools: DeclaredTools) -> CallBlock:
    """Strings that hold their own quotes, by the keys that the tools declare."""
    return CallBlock(_sequence(GuidedReader(source), _LOOSE_HEAD, tools))


LADDER: tuple[Callable[[str, DeclaredTools], CallBlock], ...] = (
    _as_written,
    _quoted,
    _assigned,
    _as_json,
    _mended,
    _guided,
)
"""The rungs, the strictest first. Each raises Malformed for what it does not read."""
GUESSES = 2
"""How many of them, the last, guess."""


def _sequence(reader: ExactReader | GuidedReader, head: re.Pattern[str], tools: DeclaredTools) -> list[dict[str, Any]]:
    """The calls that a source consists of."""
    source, at, calls = reader.source, 0, list[dict[str, Any]]()
    while (at := _skip(source, at)) < len(source):
        match = head.match(source, at)
        if match is None or not _is_name(name := match[1].rstrip(":")):
            raise Malformed
        node, at = reader.arguments(match.end(), tools.get(_declared_name(name, tools), Declared()))
        calls.append(_call(name, node, tools))
    return calls


def _first_call(source: str, tools: DeclaredTools) -> int:
    """Where the first call begins: behind what the model says before it, if anything."""
    if _LOOSE_HEAD.match(source) or _RECORD.match(source):
        return 0
    bare, within = _BARE_HEAD.match(source), _HEAD_WITHIN.search(source)
    is_call = bare is not None and bool(bare[1] or bare[2] in tools)
    return 0 if is_call or within is None else within.start()


def _is_name(name: str) -> bool:
    """Whether a tool may be called so: `call` alone is a call whose name is missing, `<…>` another model's mark."""
    return bool(name) and name.lower() != "call" and not (name[0] == "<" and name[-1] == ">")


def _skip(source: str, at: int, gaps: re.Pattern[str] = _GAPS) -> int:
    match = gaps.match(source, at)
    return match.end() if match else at


def _call(name: str, arguments: Pairs, tools: DeclaredTools) -> dict[str, Any]:
    name = _declared_name(name, tools)
    declared = tools.get(name, Declared())
    if len(arguments.pairs) == 1 and declared.names:
        ((key, inner),) = arguments.pairs.items()
        if key in _ARGUMENTS and key not in declared.names and isinstance(inner, Pairs):
            arguments = inner  # a wrapper that the tool does not know
    return {"name": name, "arguments": arguments_of(arguments, declared)}


def _declared_name(name: str, tools: DeclaredTools) -> str:
    """The name of the tool that is meant: without the space of names that models put before it."""
    short = _SPACE_OF_NAMES.sub("", name)
    return short if name not in tools and short in tools else name


def _unwrapped(source: str) -> str:
    """A block without what models put around calls: a fence of code, `print(…)`, the brackets of a list of calls."""
    source = source.strip()
    if source.startswith("```"):
        source = source[_skip(source, 0, _FENCE) :].removesuffix("```").strip()
    for opener, closer in (("<tool_call>", "</tool_call>"), ("[TOOL_CALLS]", "")):  # other models' marks, as text
        if source.startswith(opener):
            source = source.removeprefix(opener).removesuffix(closer).strip()
    if source.startswith("print(") and source.endswith(")"):
        source = source[len("print(") : -1].strip()
    if source.startswith("[") and source.endswith("]") and _LOOSE_HEAD.match(source, _skip(source, 1)):
        source = source[1:-1].strip()
    if '\\"' in source and MARK not in source and not re.search(r'(?<!\\)"', source):  # quotes escaped once too often
        source = re.sub(r'\\(["\\])', r"\1", source)
    return source


# ---- calls as JSON has them -----------------------------------------------------------------------------------------


def _calls_of(node: Argument, tools: DeclaredTools) -> list[dict[str, Any]]:
    """The calls that a JSON value describes. Malformed where it describes none."""
    if isinstance(node, Values) and node.items:
        return [call for item in node.items for call in _calls_of(item, tools)]
    if not isinstance(node, Pairs):
        raise Malformed
    pairs = node.pairs
    several, function = pairs.get("tool_calls"), pairs.get("function")
    if isinstance(several, Values):
        return _calls_of(several, tools)
    if isinstance(function, Pairs):
        return _calls_of(function, tools)
    names = [value.text for key in _NAMES if isinstance(value := pairs.get(key), Word | Quoted) and value.text]
    if names:
        return [_call(names[0], _arguments_of(pairs), tools)]
    if len(pairs) == 1:
        ((name, arguments),) = pairs.items()
        if name in tools and isinstance(arguments, Pairs):
            return [_call(name, arguments, tools)]
    raise Malformed


def _arguments_of(pairs: dict[str, Argument]) -> Pairs:
    """The record of arguments in a call's record; they may be JSON in a string."""
    arguments = next((pairs[key] for key in _ARGUMENTS if key in pairs), None)
    if isinstance(arguments, Quoted):
        arguments = read_exactly(arguments.text or "{}")
    if isinstance(arguments, Word) and arguments.text.lower() in ("null", "none"):
        arguments = None
    if arguments is None and not {*pairs} - {*_NAMES, *_ARGUMENTS, "id", "type"}:
        return Pairs("{}", 0, 2, {})
    if not isinstance(arguments, Pairs):
        raise Malformed
    return arguments
