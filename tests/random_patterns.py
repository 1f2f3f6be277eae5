"""Regular expressions at random, each with a text that it matches, for tests of constraints."""

from __future__ import annotations

import random
import re

ALPHABET = "aAbBzZ09_-.,;@/ \\\"'\n\té ßK日1²"


def random_pattern(rng: random.Random) -> tuple[str, str]:
    """A pattern of the dialect that ECMA's engines and Python's share, and a text in which it is."""
    while True:
        inside, member = _alternatives(rng, 1)
        start, before = rng.choice([("^", ""), ("^", ""), ("", "x "), (r"\b", "- "), ("^(?=.{0,99}$)", "")])
        end, behind = rng.choice([("$", ""), ("$", ""), ("", " y"), (r"\b", " -"), ("(?![^ ])", "")])
        pattern, text = f"{start}(?:{inside}){end}", before + member + behind
        if rng.random() < 0.1:
            pattern = "(?i)" + pattern
        if re.search(pattern, text) and re.search(pattern, text, re.ASCII):  # the latter's classes are ECMA's
            return pattern, text


def random_text(rng: random.Random, near: str = "") -> str:
    """A text of characters that the patterns speak of; with `near`, that text with a character changed."""
    if near and rng.random() < 0.7:
        at = rng.randrange(len(near))
        new: str = rng.choice([*ALPHABET, ""])
        return near[:at] + new + near[at + rng.randint(0, 1) :]
    return "".join(rng.choices(list(ALPHABET), k=rng.randint(0, 6)))


def _alternatives(rng: random.Random, depth: int) -> tuple[str, str]:
    several = [_sequence(rng, depth) for _ in range(rng.choice([1, 1, 2, 3]))]
    return "|".join(pattern for pattern, _ in several), rng.choice(several)[1]


def _sequence(rng: random.Random, depth: int) -> tuple[str, str]:
    pattern, text = "", ""
    for _ in range(rng.randint(1, 4)):
        if depth and rng.random() < 0.3:
            inside, member = _alternatives(rng, depth - 1)
            opening = rng.choice(["(", "(?:", f"(?P<n{rng.randrange(10**6)}>"])
            part, members = f"{opening}{inside})", [member]
        else:
            part, members = rng.choice(ATOMS)
        low = rng.randint(0, 3)
        high = low + rng.randint(0, 4)
        marks = [("", 1, 1), ("", 1, 1), ("?", 0, 1), (f"{{{low}}}", low, low)]
        if not part.endswith(")"):  # else `re` may take for ever
            marks += [("*", 0, 3), ("+", 1, 3), (f"{{{low},{high}}}", low, high), (f"{{{low},}}", low, high)]
        mark, least, most = rng.choice(marks)
        pattern += part + mark
        text += "".join(rng.choice(members) for _ in range(rng.randint(least, most)))
    return pattern, text


ATOMS: list[tuple[str, list[str]]] = [
    *((character, [character]) for character in 'aZK-"é/ß'),
    *((f"\\{character}", [character]) for character in ".\\]"),
    ("[a-f0-9]", ["b", "0"]), ("[A-Z]", ["A"]), (r"\d", ["0", "9"]), (r"\w", ["_", "z", "0"]), (r"\s", [" ", "\t"]),
    (r"\S", ["é", "@", "a"]), (r"\D", ["a", "日"]), (r"\W", ["-", " "]), (".", ["a", "日"]), (r"[^\\]", ["a", '"']),
    ('[^"]', ["\\", "z"]), (r"[^\w\s]", ["-", "."]), (r"[\w.-]", [".", "a"]), (r"[^/]", ["a", "\n"]), (r"\n", ["\n"]),
    (r"\u00e9", ["é"]), (r"\x41", ["A"]), (r"[^a-z]", ["A", "0", "日"]), (r"[\]\[^]", ["]", "^"]),
]  # fmt: skip
"""Patterns of one character, each with some that it matches in every dialect."""
