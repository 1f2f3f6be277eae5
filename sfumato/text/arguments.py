"""The arguments of a call as values: what a model wrote, by the types that the tool's schema declares.

A bare word reads as a number or a constant where its type is declared, or where none is; as text where text is
declared: `zip:12345` of a string is "12345". A string of which a number, a boolean, a record or a list is declared, and
no string, is read as one where it is exactly that. Whatever fits no declared type is given as it was written: whoever
runs the tool checks its arguments.
"""

from __future__ import annotations

import math
import re
from typing import Any

from sfumato.text.declared import Declared
from sfumato.text.notation import Argument, ExactReader, Malformed, Pairs, Quoted, Values, Word

MOST_DIGITS = 400
"""Characters of a number; a longer one is text."""
_CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None, "none": None}
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d*)?([eE][+-]?\d+)?|-?\.\d+([eE][+-]?\d+)?", re.ASCII)
"""JSON's numbers, `108.` and `.5`. What begins with + or 0 may be a telephone number or a code."""
_WHOLE = re.compile(r"[+-]?\d+(_\d+)*", re.ASCII)
_DECIMAL = re.compile(r"[+-]?(\d+(_\d+)*\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def arguments_of(record: Pairs, declared: Declared, reads_text: bool = True) -> dict[str, Any]:
    """The arguments of a call whose tool declares these."""
    return {key: typed(inner, declared.property(key), reads_text) for key, inner in record.pairs.items()}


def typed(node: Argument, declared: Declared, reads_text: bool = True) -> Any:
    """The value of what was read, where `declared` says which types are allowed.

    `reads_text`: a text of which a record or list is declared is read as one; a text within such a text is not."""
    types = declared.types
    if isinstance(node, Quoted):
        return (
            node.text if types is None or "string" in types else _converted(node.text, node.text, declared, reads_text)
        )
    if isinstance(node, Word):
        value = _natural(node.text)
        if types is None or _is_of(value, types):
            return value
        return _converted(node.text, node.text if "string" in types else value, declared, reads_text)
    kind = "object" if isinstance(node, Pairs) else "array"
    if types is not None and kind not in types and "string" in types:
        return node.text
    if isinstance(node, Pairs):
        return arguments_of(node, declared, reads_text)
    return [typed(inner, declared.item(index), reads_text) for index, inner in enumerate(node.items)]


def _natural(word: str) -> Any:
    """A number or a constant; any other word is a string without its marks, which the model left out."""
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    if len(word) > MOST_DIGITS or not _NUMBER.fullmatch(word):
        return word
    if not any(mark in word for mark in ".eE"):
        return int(word)
    value = float(word)
    return value if math.isfinite(value) else word


def _is_of(value: Any, types: frozenset[str]) -> bool:
    if value is None:
        return "null" in types
    if isinstance(value, bool):
        return "boolean" in types
    if isinstance(value, int):
        return "integer" in types
    return ("number" if isinstance(value, float) else "string") in types


def _converted(text: str, otherwise: Any, declared: Declared, reads_text: bool) -> Any:
    """The text as a value of a declared type, where it is exactly that."""
    types, word = declared.types or frozenset(), text.strip()
    if "null" in types and word.lower() in ("null", "none"):
        return None
    if "boolean" in types and word.lower() in ("true", "false"):
        return word.lower() == "true"
    if "integer" in types and len(word) <= MOST_DIGITS:
        if _WHOLE.fullmatch(word):
            return int(word)
        if _DECIMAL.fullmatch(word):
            value = float(word)
            if "number" in types and math.isfinite(value):
                return value
            if value.is_integer() and abs(value) < 2**53:
                return int(value)
    if reads_text and word[:1] in ("[", "{") and ("array" if word[:1] == "[" else "object") in types:
        node = read_exactly(word)
        if node is not None:
            return typed(node, declared, reads_text=False)
    return otherwise


def read_exactly(text: str) -> Argument | None:
    """The record or list that a whole text is, in any quotes; None where it is none."""
    try:
        node, end = ExactReader(text, has_quotes=True).value(0)
    except Malformed:
        return None
    return node if end == len(text) and isinstance(node, (Pairs, Values)) else None
