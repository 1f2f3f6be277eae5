"""Places in a text as LINE:COL, and the parts of the text that they cut.

A place is LINE:COL as an editor shows it: both from 1, columns in characters, lines ending at line feeds. A column is a
gap: 1 stands before the first character of the line, the last one behind its last. A carriage return at a line's end
and a byte order mark have no column.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from sfumato.cli.files import BOM
from sfumato.errors import InputError

MARKER = "<FILL>"
"""The text that says where to write, if no place is given."""


def offset(text: str, place: str, option: str = "--at") -> int:
    """Characters before LINE:COL; InputError, which names `option`, where there is no such place."""
    numbers = re.fullmatch("([0-9]{1,12}):([0-9]{1,12})", place)
    if numbers is None:
        raise InputError(f"{option} is {place!r}; give LINE:COL, both counted from 1, such as 12:5")
    line, column = map(int, numbers.groups())
    lines = text.split("\n")
    if not 1 <= line <= len(lines):
        raise InputError(f"{option} names line {line}; the text has the lines 1 to {len(lines)}")
    content, start = lines[line - 1], sum(len(before) + 1 for before in lines[: line - 1])
    if line == 1 and content.startswith(BOM):
        content, start = content[1:], 1
    if line < len(lines):
        content = content.removesuffix("\r")
    if not 1 <= column <= len(content) + 1:
        raise InputError(f"{option} names column {column}; line {line} has the columns 1 to {len(content) + 1}")
    return start + column - 1


def spans(text: str, places: Sequence[str]) -> list[tuple[int, int]]:
    """The offsets of LINE:COL-LINE:COL each, in order; InputError for an empty span, or for two that overlap."""
    named: list[tuple[int, int, str]] = []
    for place in places:
        first, dash, last = place.partition("-")
        if not dash:
            raise InputError(f"--span is {place!r}; give LINE:COL-LINE:COL, both counted from 1, such as 3:5-3:12")
        start, stop = offset(text, first, f"--span {place}"), offset(text, last, f"--span {place}")
        if start >= stop:
            raise InputError(f"--span {place} holds no character; its second place must stand behind its first")
        named.append((start, stop, place))
    named.sort()
    for (_, stop, one), (start, _, other) in pairwise(named):
        if start < stop:
            raise InputError(f"--span {one} and --span {other} overlap; join them")
    return [(start, stop) for start, stop, _ in named]


def cut(text: str, at: str | None, marker: str | None, name: str) -> tuple[str, str]:
    """The texts before and behind a place, or a marker (default: `MARKER`), which belongs to neither."""
    if at is not None:
        if marker is not None:
            raise InputError("--at and --marker are given together; give one of them")
        place = offset(text, at)
        return text[:place], text[place:]
    marker = MARKER if marker is None else marker
    if not marker:
        raise InputError("--marker is empty; give a text that stands once in the file")
    first = text.find(marker)
    if first < 0:
        raise InputError(f"{name} does not hold the marker {marker!r}; put it where to write, or give --at LINE:COL")
    if (second := text.find(marker, first + 1)) >= 0:
        lines = " and ".join(str(text.count("\n", 0, at) + 1) for at in (first, second))
        raise InputError(f"{name} holds the marker {marker!r} more than once (lines {lines}); keep one of them")
    return text[:first], text[first + len(marker) :]
