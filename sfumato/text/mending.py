"""The arguments of a tool call that breaks its notation, read as what was probably meant.

What is mended, each of it a mistake that models make: a string that is not closed, or not opened; commas, colons and
quotes in bare text; commas that are missing or too many; an empty value; brackets that are not closed, closed twice or
closed by another's; keys with half their quotes; values without keys, which are those of the schema in their order.

A mark or quote closes a string only where a comma, a bracket, a colon, a key or the end follows; it opens one where a
value begins; any other belongs to the text. So each place is looked at a fixed number of times: reading takes time in
proportion to the source, however it is broken.
"""

from __future__ import annotations

import re
from bisect import bisect_right

from sfumato.text.declared import Declared
from sfumato.text.messages import MAX_DEPTH
from sfumato.text.notation import (
    MARK,
    Argument,
    Malformed,
    Pairs,
    Quoted,
    Values,
    Word,
    between_quotes,
    plain,
    unescaped,
)

_QUOTES = f"{MARK}\"'"
_NAME = rf"[^\s{{}}\[\]():=,;{_QUOTES}]{{1,128}}"
_KEY = re.compile(rf"[{_QUOTES}]?({_NAME}(?: {_NAME}){{0,3}})[{_QUOTES}]?\s*([:=])(?!//)\s*")
"""A key, whose quotes may be halved. Two slashes behind its colon make it the scheme of an address."""
_SHORT_KEY = rf"[{_QUOTES}]?({_NAME})[{_QUOTES}]?[ \t]{{0,64}}[:=](?!//)"
_NEXT_KEY = re.compile(_SHORT_KEY)
_KEY_BEFORE = re.compile(rf"(?<=\s)({_NAME})\s{{0,64}}[:=]\s{{0,64}}\Z")
_SCALAR = re.compile(rf"(?:[+-]?[\d.]+(?:[eE][+-]?\d+)?|true|false|null|none)(?=\s{{1,64}}{_SHORT_KEY})", re.IGNORECASE)
"""A number or constant right before a key, without a comma."""
_SPACE, _GAPS = re.compile(r"\s*"), re.compile(r"[\s,;]*")
_BREAKS = re.compile(rf"[{{}}\[\](){MARK}]|[,;\n][\s,;]*")
_CLOSERS = {"{": "}", "[": "]", "(": ")"}
_LONGEST_KEY = 256


class MendingReader:
    """Reads calls' arguments in one source. Malformed where not even this makes sense of them."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._due: list[str] = []
        """The closing brackets that are due, the innermost last."""
        self._sign = ":"
        """What stood behind the last key: the next one has the same."""
        self._quotes = {quote: _classified(source, quote) for quote in _QUOTES}

    def arguments(self, at: int, declared: Declared) -> tuple[Pairs, int]:
        """The record whose opening bracket is at a place, and the place behind it.

        Without a bracket it goes on to the end of the source. Of values without keys `declared` says the keys."""
        opener = self.source[at : at + 1]
        has_bracket = opener in ("{", "(")
        start, closer = (at + 1, _CLOSERS[opener]) if has_bracket else (at, "}")
        self._due = []
        first = self._skip(start, _GAPS)
        if has_bracket and self.source[first : first + 1] == "{":  # doubled
            start, first = first + 1, self._skip(first + 1, _GAPS)
        if self.source[first : first + 1] in ("", "}", ")") or self._key_at(first):
            return self._pairs(start, closer, declared)
        if not has_bracket:
            raise Malformed
        items, end = self._items(start, closer, declared)
        if not 0 < len(items.items) <= len(declared.names):
            raise Malformed
        return Pairs(self.source, at, end, dict(zip(declared.names, items.items, strict=False))), end

    def _pairs(self, at: int, closer: str, declared: Declared) -> tuple[Pairs, int]:
        """The pairs up to a closing bracket, and the place behind it."""
        start, pairs = at, dict[str, Argument]()
        self._enter(closer)
        while (end := self._end(at)) is None:
            at = self._skip(at, _GAPS)
            if self.source[at] in ")]}":  # of a bracket that was never open
                at += 1
                continue
            key = self._key_at(at)
            if key is None:
                raise Malformed
            # Beside a key that nobody declared there may be others.
            record = declared if key[0] in declared.names else Declared()
            pairs[key[0]], at = self._value(key[1], declared.property(key[0]), record)
        self._due.pop()
        return Pairs(self.source, start - 1, end, pairs), end

    def _items(self, at: int, closer: str, declared: Declared) -> tuple[Values, int]:
        """The values up to a closing bracket, and the place behind it."""
        start, items = at, list[Argument]()
        self._enter(closer)
        while (end := self._end(at)) is None:
            at = self._skip(at, _GAPS)
            if self.source[at] in ")]}":
                at += 1
                continue
            item, at = self._value(at, declared.item(len(items)), None)
            items.append(item)
        self._due.pop()
        return Values(self.source, start - 1, end, items), end

    def _value(self, at: int, declared: Declared, record: Declared | None) -> tuple[Argument, int]:
        """The value at a place. `record` is what is known of the record that it stands in; None: a list."""
        at = self._skip(at)
        first = self.source[at : at + 1]
        if first in ("", ",", ";") or first in self._due:
            return (Quoted("") if declared.types is None or "null" not in declared.types else Word("null")), at
        if first == "[":
            return self._items(at + 1, "]", declared)
        if first == "{":
            inside = self._skip(at + 1, _GAPS)
            if self.source[inside : inside + 1] in ("", "}") or self._key_at(inside):
                return self._pairs(at + 1, "}", declared)
        if first in _QUOTES:
            end = self._closing(at)
            if end is not None:
                if first == MARK:
                    return Quoted(plain(self.source[at + 1 : end])), end + 1
                return Quoted(between_quotes(self.source, at, end + 1)), end + 1
            node, end = self._bare(at + 1, record)
            quoted = self.source[at:end].rstrip()
            if first != MARK and len(quoted) > 1 and quoted.endswith(first):  # a string with its own quotes within
                return Quoted(between_quotes(self.source, at, at + len(quoted))), end
            return Quoted(node.text), end
        scalar = _SCALAR.match(self.source, at)
        if scalar and record is not None:
            return Word(scalar.group()), scalar.end()
        return self._bare(at, record)

    # ---- bare text --------------------------------------------------------------------------------------------------

    def _bare(self, at: int, record: Declared | None) -> tuple[Word | Quoted, int]:
        """The bare text at a place, and the place behind it.

        It ends at a bracket that is due, at a comma or line break in front of a key, or at a mark that closes it."""
        depth, end = 0, len(self.source)
        for match in _BREAKS.finditer(self.source, at):
            here, mark = match.start(), match.group()
            if mark == MARK:
                is_closing = self._is_closing(here)
                if is_closing:
                    return Quoted(plain(self.source[at:here]).strip()), here + 1
                if is_closing is None:
                    continue
                before = _KEY_BEFORE.search(self.source, max(at, here - _LONGEST_KEY), here)
                if before and record is not None and record.names and before[1] not in record.names:
                    continue  # a quotation within the text
                end = before.start() if before else here
                break
            if mark in "{[(":
                depth += mark != "(" or self._due[-1] == ")"
            elif mark in "]}" or (mark == ")" and self._due[-1] == ")"):
                if depth == 0:
                    end = here
                    break
                depth -= 1
            elif mark != ")" and depth == 0 and self._is_separator(match, record):
                end = here
                break
        return Word(plain(self.source[at:end]).strip()), end

    def _is_separator(self, gap: re.Match[str], record: Declared | None) -> bool:
        """Whether a comma or line break ends a value: any comma in a list; in a record one before a key or the end."""
        if record is None:
            return "," in gap.group()
        key = _NEXT_KEY.match(self.source, gap.end())
        if key is not None:
            is_known = not record.names or key[1] in record.names
            return is_known and key.group()[-1] == self._sign
        return self.source[gap.end() : gap.end() + 1] in ("", self._due[-1]) and gap.group() != "\n"

    def _key_at(self, at: int) -> tuple[str, int] | None:
        """The key at a place, and the place behind its colon."""
        first = self.source[at : at + 1]
        if first and first in _QUOTES:
            end = self.source.find(first, at + 1, at + 1 + _LONGEST_KEY)
            behind = self._skip(end + 1)
            sign = self.source[behind : behind + 1]
            if end >= 0 and sign in (":", "="):
                self._sign, key = sign, self.source[at + 1 : end]
                return (key if first == MARK else unescaped(key)), behind + 1
        match = _KEY.match(self.source, at)
        if match is None:
            return None
        self._sign = match[2]
        return match[1], match.end()

    # ---- where strings end ------------------------------------------------------------------------------------------

    def _closing(self, at: int) -> int | None:
        """The place of the quote that closes the string which begins here; None where the next one opens another."""
        places, kinds = self._quotes[self.source[at]]
        n = bisect_right(places, at)
        return places[n] if n < len(places) and kinds[n] else None

    def _is_closing(self, at: int) -> bool | None:
        """Whether the `<|"|>` at a place closes a string or opens one; None: it is part of a text."""
        places, kinds = self._quotes[MARK]
        n = bisect_right(places, at) - 1
        return kinds[n] if n >= 0 and places[n] == at else None

    # ---- brackets ---------------------------------------------------------------------------------------------------

    def _enter(self, closer: str) -> None:
        if len(self._due) > MAX_DEPTH:
            raise Malformed
        self._due.append(closer)

    def _end(self, at: int) -> int | None:
        """The place behind the innermost open bracket where it ends here: by its own, another's or the source's end."""
        at = self._skip(at, _GAPS)
        closer = self.source[at : at + 1]
        if closer == self._due[-1]:
            return at + 1
        return at if not closer or closer in self._due else None

    def _skip(self, at: int, pattern: re.Pattern[str] = _SPACE) -> int:
        match = pattern.match(self.source, at)
        return match.end() if match else at


def _classified(source: str, quote: str) -> tuple[list[int], list[bool]]:
    """The places where a quote closes a string (True) or opens one (False), in order, without those within text."""
    end = re.compile(rf"\s*(?:[,;:=}}\]]|\)(?!\s{{0,64}}[{_QUOTES}])|\Z)")
    start = re.compile(rf"(?:[:=,\[{{]\s{{0,64}}|{quote}\s{{1,64}})\Z")
    next_one = re.compile(rf"\s{{0,64}}{_SHORT_KEY}|\s{{1,64}}{quote}")
    places, kinds = [], []
    for match in re.finditer(rf"\\.|{quote}" if quote != MARK else quote, source, re.DOTALL):
        at = match.start()
        if match.group() != quote:  # escaped
            continue
        is_closing = end.match(source, at + 1) is not None
        is_opening = not is_closing and start.search(source, max(0, at - 65), at) is not None
        if is_opening or is_closing or next_one.match(source, at + 1):
            places.append(at)
            kinds.append(not is_opening)
    return places, kinds
