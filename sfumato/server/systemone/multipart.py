"""Bodies of multipart/form-data (RFC 7578), as far as files and JSON need them: each part's name and bytes.

The body is in memory already, and its size is limited before. What is broken is refused by name rather than mended.
Starlette's parser needs python-multipart, another dependency that reads what strangers send: it writes large parts to
files, mends what is broken, and reads the stream, so that a compressed body would not reach it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sfumato.server.http.errors import Refusal

MEDIA = "multipart/form-data"
MOST_HEAD = 8 << 10
"""Bytes of a part's headers."""
_PARAMETER = r';\s*{}\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]+))'
_BOUNDARY = re.compile(_PARAMETER.format("boundary"), re.IGNORECASE)
_NAME = re.compile(_PARAMETER.format("name"), re.IGNORECASE)
_GOOD = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
"""A boundary by the standard."""


@dataclass(frozen=True)
class FormPart:
    """One part of a body."""

    name: str
    media: str
    """Its content type without parameters; "" where it has none."""
    data: bytes


def parts_of(content_type: str, data: bytes, most: int) -> dict[str, FormPart]:
    """The parts of a body by name, `most` at most. Refusal for a body that is broken or names a part twice."""
    match = _BOUNDARY.search(content_type)
    boundary = (match[1] or match[2] or "") if match else ""
    if not _GOOD.fullmatch(boundary):
        raise _broken("its content type has no boundary")
    delimiter = b"\r\n--" + boundary.encode()
    whole = b"\r\n" + data
    if (count := whole.count(delimiter) - 1) > most:
        raise Refusal(400, f"the body has {count} parts, more than the {most} allowed; send fewer", code="too_long")
    _, *sections = whole.split(delimiter)
    parts: dict[str, FormPart] = {}
    for section in sections:
        if section.startswith(b"--"):
            return parts
        part = _part(section)
        if part.name in parts:
            raise _broken(f"it has two parts called {part.name!r}")
        parts[part.name] = part
    raise _broken("it has no end")


def _part(section: bytes) -> FormPart:
    line, _, rest = section.partition(b"\r\n")
    head, end, data = (b"\r\n" + rest).partition(b"\r\n\r\n")
    if line.strip(b" \t") or not end or len(head) > MOST_HEAD:
        raise _broken("a part has no headers, or too long ones")
    headers = {}
    for one in head.decode("utf-8", "replace").split("\r\n")[1:]:
        name, colon, value = one.partition(":")
        if not colon:
            raise _broken("a part has a header without a colon")
        headers[name.strip().lower()] = value.strip()
    disposition = headers.get("content-disposition", "")
    match = _NAME.search(disposition)
    if not disposition.lower().startswith("form-data") or match is None:
        raise _broken("a part has no name")
    name = re.sub(r"\\(.)", r"\1", match[1]) if match[1] is not None else match[2]
    return FormPart(name, headers.get("content-type", "").partition(";")[0].strip().lower(), data)


def _broken(why: str) -> Refusal:
    return Refusal(400, f"the body is no {MEDIA}: {why}; send it as a form's client does", code="multipart_invalid")
