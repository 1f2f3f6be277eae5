"""A model's answer, parsed: thought, text and tool calls.

The marks of an answer are control tokens: `<|channel>` opens a thought, `<|tool_call>` a call in Gemma's own notation
(`call:name{key:value,…}`, strings between two `<|"|>`). `parse_ids` trusts only real control tokens, so a call that the
model merely quotes stays text. What is malformed stays text as well: an answer is never an error.

Deliberately absent: a parser that takes tokens one by one. A canvas arrives whole, and `reader` parses the answer so
far again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sfumato.text.messages import MAX_DEPTH
from sfumato.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Reply:
    """A parsed answer. A tool call is {"name": …, "arguments": {…}}; `thought` is None where there was none."""

    text: str
    thought: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


_CONTROL_TOKEN = re.compile(
    r"<\|channel>|<channel\|>|<\|tool_call>|<tool_call\|>|<\|tool_response>|<tool_response\|>"
    r'|<\|turn>|<turn\|>|<\|think\|>|<\|tool>|<tool\|>|<\|"\|>|<eos>|<bos>|<pad>'
)
_THOUGHT_LABEL = re.compile(r"\Athought(\n|\Z)")
"""The first line of a channel, which names it."""
_ENDS = {"<turn|>", "<eos>", "<|tool_response>"}
"""Control tokens at which an answer ends."""
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")
_CONSTANTS = {"true": True, "false": False, "null": None, "None": None}

_Piece = tuple[str, bool]
"""Text, and whether it is a control token."""
_Atom = str | tuple[str] | list[str]
"""A part of a call: a structural character as it is, a quoted string as (text,), a bare word as [text]."""


def parse(text: str) -> Reply:
    """The reply in an answer's text, in which control tokens are written out (`decode(ids, skip_special=False)`).

    Where ids are at hand `parse_ids` is the safer one: here a call that the model merely quotes is a call.
    """
    pieces: list[_Piece] = []
    end = 0
    for match in _CONTROL_TOKEN.finditer(text):
        pieces += [(text[end : match.start()], False), (match.group(), True)]
        end = match.end()
    return _parse([*pieces, (text[end:], False)])


def parse_ids(tokenizer: Tokenizer, ids: Iterable[int]) -> Reply:
    """The reply in an answer's token ids; only real control tokens open thoughts and calls, never spelled-out ones."""
    pieces: list[_Piece] = []
    run: list[int] = []
    for index in ids:
        if index in tokenizer.special_ids:
            pieces += [(tokenizer.decode(run), False), (tokenizer.token(index) or "", True)]
            run = []
        else:
            run.append(index)
    return _parse([*pieces, (tokenizer.decode(run), False)])


def to_history(reply: Reply) -> dict[str, Any]:
    """The assistant message that carries a reply into the next prompt.

    The thought is left out, except beside tool calls: there `reasoning_content` holds it, and the template decides.
    """
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.tool_calls:
        message["tool_calls"] = [{"type": "function", "function": dict(call)} for call in reply.tool_calls]
        if reply.thought:
            message["reasoning_content"] = reply.thought
    return message


def _parse(pieces: list[_Piece]) -> Reply:
    pieces = [piece for piece in pieces if piece[0]]
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    at = 0
    while at < len(pieces):
        text, is_control = pieces[at]
        at += 1
        if not is_control:
            texts.append(text)
        elif text in _ENDS:
            break
        elif text == "<|channel>":
            end = _end_of(pieces, at, "<channel|>")
            thought = "".join(text for text, _ in pieces[at:end])
            thoughts.append(_THOUGHT_LABEL.sub("", thought).strip("\n"))
            at = end + (pieces[end : end + 1] == [("<channel|>", True)])
        elif text == "<|tool_call>":
            end = _end_of(pieces, at, "<tool_call|>")
            is_closed = pieces[end : end + 1] == [("<tool_call|>", True)]
            call = _parse_call(pieces[at:end]) if is_closed else None
            if call is None:
                texts += [text for text, _ in pieces[at - 1 : end + is_closed]]
            else:
                calls.append(call)
            at = end + is_closed
    return Reply("".join(texts).strip("\n"), "\n".join(filter(None, thoughts)) or None, calls)


def _end_of(pieces: list[_Piece], start: int, token: str) -> int:
    """The index of the closing token, or else of the end of the answer."""
    for index in range(start, len(pieces)):
        text, is_control = pieces[index]
        if is_control and (text == token or text in _ENDS):
            return index
    return len(pieces)


class _Malformed(Exception):
    pass


def _parse_call(pieces: list[_Piece]) -> dict[str, Any] | None:
    """`call:name{key:value,…}`, its strings between two `<|"|>`; None where it is anything else."""
    atoms = _atoms(pieces)
    if atoms is None or len(atoms) < 5 or atoms[:2] != [["call"], ":"]:
        return None
    name, rest = atoms[2], atoms[3:]
    if not isinstance(name, list) or len(name[0].split()) != 1 or rest[0] != "{":
        return None
    try:
        arguments, end = _parse_value(rest, 0, 0)
    except (_Malformed, IndexError):
        return None
    return {"name": name[0], "arguments": arguments} if end == len(rest) else None


def _atoms(pieces: list[_Piece]) -> list[_Atom] | None:
    """The pieces of a call cut into atoms; None where a string is open or another control token stands between."""
    atoms: list[_Atom] = []
    quoted: list[str] | None = None
    for text, is_control in pieces:
        if is_control and text == '<|"|>':
            if quoted is not None:
                atoms.append(("".join(quoted),))
            quoted = [] if quoted is None else None
        elif quoted is not None:
            quoted.append(text)
        elif is_control:
            return None
        else:
            for word in re.split(r"([{}\[\]:,])", text):
                if word.strip():
                    atoms.append(word if word in "{}[]:," else [word.strip()])
    return atoms if quoted is None else None


def _parse_value(atoms: list[_Atom], at: int, depth: int) -> tuple[Any, int]:
    """The value that begins at an atom, and the index after it."""
    atom = atoms[at]
    if depth > MAX_DEPTH:
        raise _Malformed
    if isinstance(atom, tuple):
        return atom[0], at + 1
    if isinstance(atom, list):
        return _bare_value(atom[0]), at + 1
    if atom not in "{[":
        raise _Malformed
    close = "}" if atom == "{" else "]"
    record: dict[str, Any] = {}
    items: list[Any] = []
    at += 1
    while atoms[at] != close:
        key: _Atom = ""
        if atom == "{":
            key = atoms[at]
            if isinstance(key, str) or atoms[at + 1] != ":":
                raise _Malformed
            at += 2
        value, at = _parse_value(atoms, at, depth + 1)
        if isinstance(key, str):
            items.append(value)
        else:
            record[key[0]] = value
        if atoms[at] == ",":
            at += 1
        elif atoms[at] != close:
            raise _Malformed
    return record if atom == "{" else items, at + 1


def _bare_value(word: str) -> Any:
    """A number or a constant; any other word is a string without its marks, which the model left out."""
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    number = _NUMBER.fullmatch(word)
    if number is None or len(word) > 400:
        return word
    if number[1] is None and number[2] is None:
        return int(word)
    value = float(word)
    return value if math.isfinite(value) else word
