"""What commands print: text without a byte that could command the terminal, and records for programs."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from sfumato.events import Usage

_PICTURES: dict[int, int] = {n: 0x2400 + n for n in range(32) if n not in (9, 10)} | {127: 0x2421}
_PICTURES |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)


def harmless(text: str) -> str:
    """A text for the screen: control characters, which can command the terminal, become their pictures.

    What is no character becomes U+FFFD. Line feeds and tabs stay.
    """
    return text.replace("\r\n", "\n").translate(_PICTURES)


def put(text: str) -> None:
    """Write to standard output, as UTF-8 and nothing else: no newline is added or changed.

    A terminal gets what is `harmless`.
    """
    text = harmless(text) if sys.stdout.isatty() else text
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace"))  # \ud800 in the JSON of a name, say
    sys.stdout.buffer.flush()


def usage_record(usage: Usage) -> dict[str, Any]:
    """The part of a JSON record that says what an answer took."""
    return {"usage": asdict(usage), "tokens_per_pass": usage.tokens_per_pass}
