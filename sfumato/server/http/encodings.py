"""Bodies that come compressed: what a client's library does by itself is undone, as far as a body may be long.

TypeSafe's SDK compresses with zstd wherever Python has it, and does not come again where a server has not.
"""

from __future__ import annotations

import zlib
from typing import Any

from sfumato.server.http.errors import Refusal, short

zstd: Any
try:
    from backports import zstd
except ImportError:
    zstd = None

ENCODINGS = ("gzip", "deflate") if zstd is None else ("gzip", "deflate", "zstd")
"""Encodings that a body may have here."""
FAULTS: tuple[type[Exception], ...] = (zlib.error, EOFError, ValueError, *([] if zstd is None else [zstd.ZstdError]))
"""What their decoders raise for broken data."""
LARGEST_WINDOW = 23
"""Of zstd, as a power of two: 8 MiB, which every decoder has to have."""


def decoded(data: bytes, encoding: str, most: int) -> bytes:
    """A body as it was before it was compressed. Refusal for one that is broken, or longer than `most` bytes."""
    names = [name for part in encoding.split(",") if (name := part.strip().lower()) not in ("", "identity")]
    if not names:
        return data
    if len(names) > 1 or names[0].removeprefix("x-") not in ENCODINGS:
        known = ", ".join(ENCODINGS)
        message = (
            f"the content encoding is {short(encoding, 80)!r}, and this server has {known}; send the body as it is"
        )
        raise Refusal(415, message, headers={"accept-encoding": known})
    name = names[0].removeprefix("x-")
    try:
        text, is_whole = _expanded(data, name, most)
    except FAULTS:
        is_whole, text = False, b""
    if len(text) > most:
        raise Refusal(413, f"the body is larger than the {most} bytes allowed; send less")
    if not is_whole:
        raise Refusal(400, f"the body is no whole {name}; compress it again, or send it as it is", code="invalid_json")
    return text


def _expanded(data: bytes, name: str, most: int) -> tuple[bytes, bool]:
    """The text, one byte more than `most` at most, and whether the data ends with its end."""
    if name == "zstd":
        options = {zstd.DecompressionParameter.window_log_max: LARGEST_WINDOW}
        reader: Any = zstd.ZstdDecompressor(options=options)
    else:
        reader = zlib.decompressobj(zlib.MAX_WBITS | 32)  # of gzip or of zlib, as its head says
    text: bytes = reader.decompress(data, most + 1)
    return text, reader.eof and not reader.unused_data
