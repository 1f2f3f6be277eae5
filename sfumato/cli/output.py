"""What commands print: text without a byte that could command the terminal, and records for programs.

Where a stream's encoding lacks a character, its stand-in is written: one that looks like it for what commands draw with
(`STAND_INS`), and for other text its letter without accents or a question mark on a terminal, an escape elsewhere.
"""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata
from dataclasses import asdict
from typing import Any

from sfumato.events import Usage

_PICTURES: dict[int, int] = {n: 0x2400 + n for n in range(32) if n not in (9, 10)} | {127: 0x2421}
_PICTURES |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)
_PICTURES |= dict.fromkeys([0x202D, 0x202E, 0x2028, 0x2029], 0xFFFD)  # which turn a line around, or end it

STAND_INS = (
    dict.fromkeys("─━═–—−‐‑▁▂▃▄▍▎▏", "-")
    | dict.fromkeys("│┃║", "|")
    | dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╰╯╞╡╪╔╗╚╝╠╣╦╩╬╺╸÷", "+")
    | dict.fromkeys("█▉▊▋▌▓▒░▇▆▅", "#")
    | dict.fromkeys("‘’‚", "'")
    | dict.fromkeys("“”„", '"')
    | dict.fromkeys("\u00a0\u202f\u2009", " ")
    | dict.fromkeys("\ufeff\u200b\u200d\ufe0f", "")
    | {"·": ".", "•": "*", "▪": "*", "×": "x", "→": ">", "←": "<", "↑": "^", "↓": "v", "›": ">", "‹": "<"}
    | {"≤": "<", "≥": ">", "≈": "~", "°": "o", "…": "."}
)
"""ASCII for what commands draw and write with; each as wide as itself, so that what is laid out stays so."""
_ON_TERMINALS, _ELSEWHERE = "sfumato.terminal", "sfumato.file"
"""The error handlers of streams that cannot say a character."""


def harmless(text: str) -> str:
    """A text for the screen: control characters, which can command the terminal, become their pictures.

    What is no character, or turns the order of a line around, becomes U+FFFD. Line feeds and tabs stay.
    """
    return text.replace("\r\n", "\n").translate(_PICTURES)


def put(text: str) -> None:
    """Write to standard output, as UTF-8 and nothing else: no newline is added or changed.

    A terminal gets what is `harmless`, in its encoding.
    """
    is_terminal = sys.stdout.isatty()
    text = encodable(harmless(text)) if is_terminal else text
    sys.stdout.flush()
    encoding = sys.stdout.encoding if is_terminal else "utf-8"
    sys.stdout.buffer.write(text.encode(encoding, "backslashreplace"))  # \ud800 in the JSON of a name, say
    sys.stdout.buffer.flush()


def usage_record(usage: Usage) -> dict[str, Any]:
    """The part of a JSON record that says what an answer took."""
    return {"usage": asdict(usage), "tokens_per_pass": usage.tokens_per_pass}


# ---- streams that cannot say every character -------------------------------------------------------------------------


def speaks_unicode() -> bool:
    """Whether standard output can say every character."""
    return _is_unicode(sys.stdout)


def prepare_streams() -> None:
    """Let no character that a stream's encoding lacks end a command, written or read; streams of Unicode stay."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not _is_unicode(stream):
            stream.reconfigure(errors=_ON_TERMINALS if stream.isatty() else _ELSEWHERE)
    if isinstance(sys.stdin, io.TextIOWrapper) and not _is_unicode(sys.stdin):
        sys.stdin.reconfigure(errors="surrogateescape")


def encodable(text: str) -> str:
    """A text with stand-ins for what standard output cannot say, so that it is laid out as it will be written."""
    if speaks_unicode():
        return text
    encoding = sys.stdout.encoding
    if "…" in text and not _can_say("…", encoding):
        text = text.replace("…", "...")
    return text.encode(encoding, _ON_TERMINALS).decode(encoding)


def readable(text: str) -> str:
    """A text from standard input, whose bytes that its encoding lacks are read as UTF-8."""
    if text.isascii() or not any("\udc80" <= character <= "\udcff" for character in text):
        return text
    encoding = sys.stdin.encoding or "utf-8"
    return text.encode(encoding, "surrogateescape").decode("utf-8", "replace")


def _is_unicode(stream: Any) -> bool:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return codecs.lookup(encoding).name.startswith("utf")


def _can_say(character: str, encoding: str) -> bool:
    try:
        return bool(character.encode(encoding))
    except UnicodeEncodeError:
        return False


def _stand_in(character: str) -> str:
    """What a terminal shows for a character that its encoding lacks; as wide as that is."""
    if (known := STAND_INS.get(character)) is not None:
        return known
    if "\u2800" <= character <= "\u28ff":  # a spinner's
        return "*"
    from rich.cells import cell_len

    letter = unicodedata.normalize("NFD", character)[0]
    return letter if letter.isascii() else "?" * max(0, cell_len(character))


def _replace_on_terminal(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_stand_in, error.object[error.start : error.end])), error.end


def _replace_elsewhere(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    escape = "backslashreplace"
    return "".join(STAND_INS.get(one, one.encode("ascii", escape).decode()) for one in characters), error.end


codecs.register_error(_ON_TERMINALS, _replace_on_terminal)
codecs.register_error(_ELSEWHERE, _replace_elsewhere)
