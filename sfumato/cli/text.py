"""Text that goes in and out byte for byte, and places in it.

A file is read as bytes and decoded strictly as UTF-8: line endings, a missing last newline and a byte order mark stay
what they are, so that what is not rewritten comes out as it went in. A place is LINE:COL as an editor shows it: both
from 1, columns in characters, lines ending at line feeds. A column is a gap: 1 stands before the first character of
the line, the last one behind its last. A carriage return at a line's end and a byte order mark have no column.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise

from sfumato.errors import InputError, SfumatoError

LIMIT = 16 << 20
"""Bytes of a file that is read."""
MARKER = "<FILL>"
"""What says where to write, if no place is given."""
BOM = "\ufeff"


_PICTURES: dict[int, int] = {n: 0x2400 + n for n in range(32) if n not in (9, 10)} | {127: 0x2421}
_PICTURES |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)


def harmless(text: str) -> str:
    """A text for the screen: a control character, which might command the terminal, becomes its picture, and what is no
    character U+FFFD. Line feeds and tabs stay."""
    return text.replace("\r\n", "\n").translate(_PICTURES)


# ---- in and out ------------------------------------------------------------------------------------------------------


def read(name: str) -> str:
    """The text of a file, or of standard input for "-"; InputError where it cannot be read or is no text."""
    if name == "-":
        if sys.stdin.isatty():
            raise InputError("there is no text on standard input; pipe it in, or give a file")
        return decode(sys.stdin.buffer.read(LIMIT + 1), "standard input")
    try:
        with open(name, "rb") as file:
            return decode(file.read(LIMIT + 1), name)
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}; give a text file, or - for standard input") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {name!r}: {error}") from None  # a name with a NUL


def decode(data: bytes, name: str) -> str:
    """Bytes to text with nothing changed on the way; InputError for what is not text, or too much of it."""
    if len(data) > LIMIT:
        raise InputError(f"{name} is larger than {LIMIT >> 20} MiB, the limit; cut out the part to work on")
    if (at := data.find(0)) >= 0:
        raise InputError(f"{name} is not a text file: byte {at} is NUL; give UTF-8 text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte {error.start} ({data[error.start]:#04x}) is not UTF-8"
        raise InputError(f"{name} is not a text file: {what}; convert it to UTF-8 first") from None


def check_writable(name: str) -> None:
    """InputError where `write` could not replace this file: better known before the model has worked."""
    if name == "-":
        raise InputError("standard input cannot be written; give a file, or leave --write out")
    path = os.path.realpath(name)
    if not os.path.exists(path):
        return  # `read` says so
    if not os.path.isfile(path):
        raise InputError(f"{name} is not a regular file, so --write cannot replace it; leave --write out")
    if not os.access(path, os.W_OK):
        raise InputError(f"{name} is read-only; allow writing, or leave --write out")
    if not os.access(os.path.dirname(path), os.W_OK):
        raise InputError(f"--write needs to make a file beside {name}, and its folder is read-only; leave --write out")


def write(name: str, old: str, new: str) -> None:
    """Replace a file's text, whole or not at all: written beside it, then renamed; its owner, permissions and extended
    attributes stay as far as the system allows, and a link stays a link. SfumatoError where the file no longer holds
    `old`, or is no regular file."""
    path = os.path.realpath(name)
    with open(path, "rb", opener=_open_at_once) as file:
        was = os.fstat(file.fileno())
        if not stat.S_ISREG(was.st_mode) or file.read() != old.encode():
            raise SfumatoError(f"{name} has changed since it was read, so it was left as it is; run this again")
    handle, beside = tempfile.mkstemp(prefix=".sfumato-", dir=os.path.dirname(path))
    try:
        with open(handle, "wb") as file:
            file.write(new.encode())
            file.flush()
            with suppress(OSError, AttributeError):  # another's file, or a system without owners
                os.chown(beside, was.st_uid, was.st_gid)
            os.chmod(beside, stat.S_IMODE(was.st_mode))
            _copy_attributes(path, beside)
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def _open_at_once(path: str, flags: int) -> int:
    """A pipe that took the file's place would have to wait for its other end."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _copy_attributes(source: str, target: str) -> None:
    """Extended attributes, and with them access lists and labels, as far as they may be read and set."""
    if not hasattr(os, "listxattr"):  # Linux alone has them in Python
        return
    with suppress(OSError):
        for name in os.listxattr(source):
            with suppress(OSError):
                os.setxattr(target, name, os.getxattr(source, name))


def put(text: str) -> None:
    """To standard output, as UTF-8 and nothing else: no newline is added or changed. A terminal gets what is
    `harmless`."""
    text = harmless(text) if sys.stdout.isatty() else text
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace"))  # \ud800 in the JSON of a name, say
    sys.stdout.buffer.flush()


# ---- places ----------------------------------------------------------------------------------------------------------


def offset(text: str, place: str, option: str = "--at") -> int:
    """Characters before LINE:COL; InputError, which speaks of `option`, where there is no such place."""
    found = re.fullmatch("([0-9]{1,12}):([0-9]{1,12})", place)
    if found is None:
        raise InputError(f"{option} is {place!r}; give LINE:COL, both counted from 1, such as 12:5")
    line, column = map(int, found.groups())
    lines = text.split("\n")
    if not 1 <= line <= len(lines):
        raise InputError(f"{option} names line {line}; the text has the lines 1 to {len(lines)}")
    held, start = lines[line - 1], sum(len(before) + 1 for before in lines[: line - 1])
    if line == 1 and held.startswith(BOM):
        held, start = held[1:], 1
    if line < len(lines):
        held = held.removesuffix("\r")
    if not 1 <= column <= len(held) + 1:
        raise InputError(f"{option} names column {column}; line {line} has the columns 1 to {len(held) + 1}")
    return start + column - 1


def spans(text: str, places: Sequence[str]) -> list[tuple[int, int]]:
    """LINE:COL-LINE:COL each, from a place up to another, to offsets in order; none is empty, none overlap."""
    found: list[tuple[int, int, str]] = []
    for place in places:
        first, dash, last = place.partition("-")
        if not dash:
            raise InputError(f"--span is {place!r}; give LINE:COL-LINE:COL, both counted from 1, such as 3:5-3:12")
        start, stop = offset(text, first, f"--span {place}"), offset(text, last, f"--span {place}")
        if start >= stop:
            raise InputError(f"--span {place} holds no character; its second place must stand behind its first")
        found.append((start, stop, place))
    found.sort()
    for (_, stop, one), (start, _, other) in pairwise(found):
        if start < stop:
            raise InputError(f"--span {one} and --span {other} overlap; join them")
    return [(start, stop) for start, stop, _ in found]


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
