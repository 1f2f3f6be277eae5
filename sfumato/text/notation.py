"""The arguments of a tool call, read exactly: Gemma's own notation, and JSON's and Python's beside it.

`{key:value,…}` is a record, `[value,…]` a list, a string stands between two `<|"|>`, and everything else is a bare
word. What is read is a tree of them: `arguments` makes values of them, because a bare word's meaning is up to the
tool's schema. What breaks the rules is `Malformed`; `mending` reads it.

A source is plain text in which each `<|"|>` is the one character `MARK`. Reading takes time in proportion to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sfumato.text.declared import Declared
from sfumato.text.messages import MAX_DEPTH

MARK = "\udfff"
"""Stands for `<|"|>` in a source. It is a lone surrogate, which no decoded token holds."""
IN_NAME, LONGEST_NAME = rf"[^\s{{}}()\[\],;\"'={MARK}]", 256
"""What the name of a call is made of."""


class Malformed(Exception):
    """The source is not in the notation."""


@dataclass(frozen=True)
class Word:
    """Bare text, without quotes."""

    text: str


@dataclass(frozen=True)
class Quoted:
    """A string."""

    text: str


@dataclass(frozen=True)
class _Bracket:
    source: str
    start: int
    end: int

    @property
    def text(self) -> str:
        """It as it is written."""
        return plain(self.source[self.start : self.end])


@dataclass(frozen=True)
class Pairs(_Bracket):
    """A record; of a key that comes twice the last value counts."""

    pairs: dict[str, Argument]


@dataclass(frozen=True)
class Values(_Bracket):
    """A list."""

    items: list[Argument]


Argument = Word | Quoted | Pairs | Values


def plain(source: str) -> str:
    """The text of a source: a `<|"|>` in it reads as an ordinary quotation mark."""
    return source.replace(MARK, '"')


_SPACE = re.compile(r"\s*")
_WORD = {
    "": re.compile(rf"[^{{}}\[\]:,{MARK}]+"),
    "=": re.compile(rf"[^{{}}\[\]:,={MARK}]+"),  # where pairs may be assignments
    ")": re.compile(rf"[^{{}}\[\]:,()={MARK}]+"),  # within f(k=v)
}
_KEY = {
    False: re.compile(rf"[^{{}}\[\]:,{MARK}]+"),
    True: re.compile(rf"[^{{}}\[\]:,()={MARK}]+"),
}
_STRINGS = {
    quote: re.compile(
        rf"{quote}{{3}}(?:[^{quote}\\]|\\.|{quote}{{1,2}}(?!{quote}))*{quote}{{3}}"
        rf"|{quote}[^{quote}\\]*(?:\\.[^{quote}\\]*)*{quote}",
        re.DOTALL,
    )
    for quote in "\"'"
}
"""A string in JSON's or Python's quotes, single or threefold, by its quote."""
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_CLOSERS = {"{": "}", "[": "]", "(": ")"}


class ExactReader:
    """Reads one source, without repairs.

    `has_quotes`: keys and strings in JSON's or Python's quotes as well, in any depth: `{"a": ['x', "y"]}`.
    `has_equals`: pairs as assignments as well: `{a='x'}`, and `(a=1, b="y")` for a record.
    """

    def __init__(self, source: str, has_quotes: bool = False, has_equals: bool = False) -> None:
        self.source, self.has_quotes, self.has_equals = source, has_quotes, has_equals
        self._depth = 0
        self._word = _WORD["=" if has_equals else ""]

    def arguments(self, at: int, declared: Declared | None = None) -> tuple[Pairs, int]:
        """The record at a place, and the place behind it, whatever is declared. Malformed where there is none."""
        opener = self.source[at : at + 1]
        if opener != "{" and not (opener == "(" and self.has_equals):
            raise Malformed
        self._word = _WORD[")" if opener == "(" else "=" if self.has_equals else ""]
        return self._pairs(at)

    def value(self, at: int) -> tuple[Argument, int]:
        """The value at a place, and the place behind it. Malformed where there is none."""
        at = self._skip(at)
        first = self.source[at : at + 1]
        if first == "{":
            return self._pairs(at)
        if first == "[":
            return self._items(at)
        if first == MARK or (first in ("'", '"') and self.has_quotes):
            text, at = self._string(at)
            return Quoted(text), at
        return self._bare(at, self._word)

    def _pairs(self, at: int) -> tuple[Pairs, int]:
        start, closer, pairs = at, _CLOSERS[self.source[at]], dict[str, Argument]()
        self._enter()
        at += 1
        while (at := self._skip(at)) >= 0 and self.source[at : at + 1] != closer:
            first = self.source[at : at + 1]
            if first == MARK or (first in ("'", '"') and self.has_quotes):
                key, at = self._string(at)
            else:
                word, at = self._bare(at, _KEY[self.has_equals])
                key = word.text
            at = self._skip(at)
            if self.source[at : at + 1] != ":" and not (self.has_equals and self.source[at : at + 1] == "="):
                raise Malformed
            pairs[key], at = self.value(at + 1)
            at = self._behind_comma(at, closer)
        self._depth -= 1
        return Pairs(self.source, start, at + 1, pairs), at + 1

    def _items(self, at: int) -> tuple[Values, int]:
        start, items = at, list[Argument]()
        self._enter()
        at += 1
        while (at := self._skip(at)) >= 0 and self.source[at : at + 1] != "]":
            item, at = self.value(at)
            items.append(item)
            at = self._behind_comma(at, "]")
        self._depth -= 1
        return Values(self.source, start, at + 1, items), at + 1

    def _string(self, at: int) -> tuple[str, int]:
        if self.source[at] == MARK:
            closing = self.source.find(MARK, at + 1)
            if closing < 0:
                raise Malformed
            return self.source[at + 1 : closing], closing + 1
        match = _STRINGS[self.source[at]].match(self.source, at)
        if match is None:
            raise Malformed
        end = match.end()
        size = 3 if self.source.startswith(self.source[at] * 3, at) and end - at >= 6 else 1
        return unescaped(self.source[at + size : end - size]), end

    def _bare(self, at: int, pattern: re.Pattern[str]) -> tuple[Word, int]:
        match = pattern.match(self.source, at)
        text = match.group().strip() if match else ""
        if match is None or not text or text[0] in "\"'":
            raise Malformed
        return Word(text), match.end()

    def _behind_comma(self, at: int, closer: str) -> int:
        at = self._skip(at)
        following = self.source[at : at + 1]
        if following == ",":
            return at + 1
        if following != closer:
            raise Malformed
        return at

    def _skip(self, at: int) -> int:
        match = _SPACE.match(self.source, at)
        return match.end() if match else at

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH + 1:
            raise Malformed


def between_quotes(source: str, at: int, end: int) -> str:
    """The text of a string in JSON's or Python's quotes, from a place to an end that quotes within need not agree with.

    If they do not, it is code: beside real line breaks a `\\n` in it is the code's own."""
    text = source[at + 1 : end - 1]
    is_code = "\n" in text and _STRINGS[source[at]].fullmatch(source, at, end) is None
    return text.replace(MARK, "") if is_code else unescaped(text)


def unescaped(text: str) -> str:
    """What stands between JSON's or Python's quotes, with its escapes read; what is no escape stays.

    A `<|"|>` within is left out. Halves of a pair of surrogates are joined; a lone half becomes U+FFFD."""
    text = text.replace(MARK, "")
    if "\\" not in text:
        return text
    text = _ESCAPE.sub(_character, text)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _character(match: re.Match[str]) -> str:
    code = match[1] or match[2]
    if code:
        return chr(int(code, 16))
    if match[3] in "\"'\\/":
        return match[3]
    return _ESCAPED.get(match[3], match[0])
