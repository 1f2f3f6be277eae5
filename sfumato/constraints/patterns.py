"""Patterns of JSON Schema, as regular expressions of llguidance's for whole texts.

A pattern looks anywhere in a text and is written for ECMA's regular expressions; here it means the texts that those and
Python's both accept. Classes are narrow: ASCII where they allow, all of Unicode where they exclude.

Deliberately absent: look-around, back references, anchors elsewhere than at an end, and whatever the two dialects read
differently. Each is `NotSupported`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_DATE = (
    r"(?:[1-9]\d{3}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1\d|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
    r"|(?:[1-9]\d(?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)-02-29)"
)
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_IN_URI = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*"
FORMAT_PATTERNS = {
    "date": _DATE,
    "date-time": f"{_DATE}T{_TIME}",
    "email": rf"[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_+-]+)*@{_LABEL}(?:\.{_LABEL})+",
    "hostname": rf"{_LABEL}(?:\.{_LABEL}){{0,3}}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "time": _TIME,
    "uri": rf"[a-z][a-z0-9+.-]*://{_LABEL}(?:\.{_LABEL})*(?::\d{{1,4}})?(?:/{_IN_URI})?(?:\?{_IN_URI})?(?:#{_IN_URI})?",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
}
"""The pattern of each `format`, in the dialect that `whole_pattern` reads."""
FORMATS = tuple(FORMAT_PATTERNS)
"""Values of `format` that are enforced; others are refused."""


_IN = {
    "d": "0-9", "D": r"\D", "w": "A-Za-z0-9_", "W": r"[^\w\p{N}]", "s": r" \t\n\r\x0b\x0c",
    "S": r"[^\s\x1c-\x1f\x{feff}]",
}  # fmt: skip
"""What an escape adds to a class that allows."""
_OUT = {
    "d": r"\d", "D": "[^0-9]", "w": r"\w\p{N}", "W": "[^A-Za-z0-9_]", "s": r"\s\x1c-\x1f\x{feff}",
    "S": r"[^ \t\n\r\x0b\x0c]",
}  # fmt: skip
"""What an escape adds to a class that excludes."""
_CHARACTERS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}
_QUANTIFIER = re.compile(r"[*+?]|\{\d+(?:,\d*)?\}")
_CODE = re.compile(r"u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,6})\}|x([0-9a-fA-F]{2})")
_PROPERTY = re.compile(r"[pP]\{[A-Za-z_=]+\}")
_GROUP = re.compile(r"\((?:\?:|\?P?<[A-Za-z_]\w*>|(?!\?))")


class NotSupported(Exception):
    """A pattern has something that is not translated; the message says what."""


def whole_pattern(pattern: str) -> str:
    """The regular expression, in llguidance's dialect, of the texts in which the pattern is; else `NotSupported`."""
    return _Pattern(pattern).whole()


class _Pattern:
    """A pattern being translated: its text, and the place that is reached."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def whole(self) -> str:
        """The regular expression of the texts in which the pattern is."""
        branches: list[list[str]] = [[]]
        depth, is_repeated = 0, False
        while self._at < len(self._text):
            if match := _QUANTIFIER.match(self._text, self._at):
                self._quantify(branches[-1], match, is_repeated)
                is_repeated = True
                continue
            is_repeated = False
            here = self._text[self._at]
            if here == "|" and not depth:
                branches.append([])
                self._at += 1
                continue
            depth += {"(": 1, ")": -1}.get(here, 0)
            branches[-1].append(self._group() if here == "(" else self._atom())
            if depth < 0:
                raise NotSupported("a ) without its (")
        if depth:
            raise NotSupported("a ( without its )")
        return "|".join(map(self._anchored, branches))

    def _quantify(self, branch: list[str], match: re.Match[str], is_repeated: bool) -> None:
        """Append a quantifier; a lazy one allows the same texts."""
        if is_repeated or not branch or branch[-1] in ("(?:", "^", "$", "|"):
            raise NotSupported(f"the repetition {match.group()!r} of nothing")
        branch.append(match.group())
        self._at = match.end() + (self._text[match.end() : match.end() + 1] == "?")

    def _group(self) -> str:
        """The opening of a group; none captures."""
        group = _GROUP.match(self._text, self._at)
        if group is None:
            raise NotSupported(f"the group {self._text[self._at : self._at + 4]!r}…")
        self._at = group.end()
        return "(?:"

    def _atom(self) -> str:
        """The next character, class or escape, or a mark that stands for itself."""
        here = self._text[self._at]
        self._at += 1
        if here in "|^$)":
            return here
        if here == ".":
            return r"[^\n\r\x{2028}\x{2029}]"
        if here == "[":
            return self._class()
        if here == "\\":
            atom = self._escape()
            return _character(atom) if len(atom) == 1 else f"[{_set_of(atom, _IN)}]"
        return _character(here)

    @staticmethod
    def _anchored(branch: list[str]) -> str:
        """A branch for whole texts: anything may stand before it and behind it where no anchor forbids that."""
        before = after = "(?s:.*)"
        if branch[:1] == ["^"]:
            before, branch = "", branch[1:]
        if branch[-1:] == ["$"]:
            after, branch = "", branch[:-1]
        if "^" in branch or "$" in branch:
            raise NotSupported("a ^ or $ elsewhere than at an end")
        return f"{before}(?:{''.join(branch)}){after}"

    def _escape(self) -> str:
        """The meaning of what follows a backslash.

        It is one character; or a letter of `_IN` behind a backslash; or a property of Unicode, as it stands.
        """
        rest = self._text[self._at : self._at + 1]
        if match := _CODE.match(self._text, self._at):
            self._at = match.end()
            code = int(next(filter(None, match.groups())), 16)
            if code > 0x10FFFF or 0xD800 <= code < 0xE000:
                raise NotSupported(f"the surrogate {match.group()!r}")
            return chr(code)
        if match := _PROPERTY.match(self._text, self._at):
            self._at = match.end()
            return "\\" + match.group()
        self._at += 1
        if rest == "0" and self._text[self._at : self._at + 1].isdigit():
            raise NotSupported("an octal escape")
        if rest in _CHARACTERS:
            return _CHARACTERS[rest]
        if rest in _IN:
            return "\\" + rest
        if not rest or rest.isalnum():
            raise NotSupported(f"the escape {chr(92) + rest!r}")
        return rest

    def _class(self) -> str:
        """A class in brackets."""
        is_not = self._text[self._at : self._at + 1] == "^"
        self._at += is_not
        sets = _OUT if is_not else _IN
        items: list[str] = []
        while True:
            if self._at >= len(self._text):
                raise NotSupported("a [ without its ]")
            here = self._text[self._at]
            self._at += 1
            if here == "]":
                break
            first = self._escape_in_class() if here == "\\" else here
            if len(first) > 1:
                items.append(_set_of(first, sets))
                continue
            last = first
            if self._text[self._at : self._at + 1] == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 2
                last = self._text[self._at - 1]
                last = self._escape_in_class() if last == "\\" else last
                if len(last) > 1 or last < first:
                    raise NotSupported("a range without an end")
            items.append(f"\\x{{{ord(first):x}}}" + (f"-\\x{{{ord(last):x}}}" if last != first else ""))
        if not items:
            raise NotSupported("an empty class")
        return f"[{'^' if is_not else ''}{''.join(items)}]"

    def _escape_in_class(self) -> str:
        """The same inside a class, where \\b is a backspace."""
        if self._text[self._at : self._at + 1] == "b":
            self._at += 1
            return "\b"
        return self._escape()


def _set_of(escape: str, sets: Mapping[str, str]) -> str:
    """The characters of an escape, for the inside of a class; a property of Unicode stays as it is."""
    return sets.get(escape[1:], escape)


def _character(character: str) -> str:
    """A character that stands for itself."""
    if character.isalnum() and character.isascii():
        return character
    return f"\\x{{{ord(character):x}}}"
