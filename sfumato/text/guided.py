"""The arguments of a call whose strings hold their own quotes, as code does: read by the keys that the tool declares.

`{content:"print("a, b")\\n", path:"x.py"}` breaks every rule of quotes, but who knows the tool knows that a string ends
where another of its keys follows, or the call's end. Only declared keys count, a string begins and ends with the same
quote, and anything else is Malformed. Reading takes time in proportion to the source.
"""

from __future__ import annotations

import re

from sfumato.text.declared import Declared
from sfumato.text.notation import MARK, Argument, ExactReader, Malformed, Pairs, Quoted, between_quotes, plain

_QUOTES = f"{MARK}\"'"
_GAP = r"\s{0,64}"
_NAME = rf"[^\s{{}}\[\]():=,;{_QUOTES}]{{1,128}}"
_KEY = re.compile(rf"{_GAP}([{_QUOTES}]?)({_NAME})\1{_GAP}([:=]){_GAP}")
_BEHIND = re.compile(rf"{_GAP}[,;]?")
_CLOSER = re.compile(rf"{_GAP}[}})]+")
_ENDS = {
    quote: re.compile(
        rf"{quote}(?=(?:{_GAP}[,;]{_GAP}|\s{{1,64}})[{_QUOTES}]?({_NAME})[{_QUOTES}]?{_GAP}([:=])"
        rf"|{_GAP}[}})]+[\s,;]{{0,64}}(?:\Z|call:))"
    )
    for quote in _QUOTES
}
"""A quote that may end a string: a key and its sign follow, or the end of the call, the source's or another call."""


class GuidedReader:
    """Reads calls' arguments in one source."""

    def __init__(self, source: str) -> None:
        self.source = source

    def arguments(self, at: int, declared: Declared) -> tuple[Pairs, int]:
        """The record whose opening bracket is at a place, and the place behind it."""
        if self.source[at : at + 1] not in ("{", "("):
            raise Malformed
        start, pairs, left, sign = at, dict[str, Argument](), {*declared.names}, ""
        at += 1
        while True:
            key = _KEY.match(self.source, at)
            if key is None or key[2] not in left or (sign and key[3] != sign):
                raise Malformed
            sign = key[3]
            left.remove(key[2])
            pairs[key[2]], at = self._value(key.end(), left, sign)
            at = self._behind(_BEHIND, at)
            if (end := self._behind(_CLOSER, at)) > at:
                return Pairs(self.source, start, end, pairs), end

    def _value(self, at: int, left: set[str], sign: str) -> tuple[Argument, int]:
        """The value at a place, and the place behind it. A string ends where one of the keys that are left follows."""
        quote = self.source[at : at + 1]
        if not quote or quote not in _QUOTES:
            return ExactReader(self.source, has_quotes=True).value(at)
        for end in _ENDS[quote].finditer(self.source, at + 1):
            if end[1] is None or (end[1] in left and end[2] == sign):
                if quote == MARK:
                    return Quoted(plain(self.source[at + 1 : end.start()])), end.end()
                return Quoted(between_quotes(self.source, at, end.end())), end.end()
        raise Malformed

    def _behind(self, pattern: re.Pattern[str], at: int) -> int:
        match = pattern.match(self.source, at)
        return match.end() if match else at
