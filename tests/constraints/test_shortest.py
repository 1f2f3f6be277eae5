"""constraints/shortest.py: every satisfiable pattern has its shortest text, from its beginning and from the middle."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from random_patterns import random_pattern

from sfumato.constraints.expressions import ANY, ENDLESS, both, repeat
from sfumato.constraints.interruptible import finish
from sfumato.constraints.patterns import NotSupported, parse
from sfumato.constraints.shortest import Automaton, shortest


@pytest.mark.parametrize(
    ("pattern", "length"),
    [
        ("[0-9]{5}", 5),
        (r"\d{4}-\d{2}-\d{2}", 10),
        ("[A-Z]{5}", 5),
        (r"\.(jpg|png)$", 4),
        (r"^.*\.json$", 5),
        ("https?://[^/]+/", 9),
        (r"\S+@\S+\.\S+", 5),
        (r"(?i)^[a-z0-9._%+-]+@[a-z0-9.-]+\.[a-z]{2,}$", 6),
        (r"^(?=.*\d)(?=.*[a-z])(?=.*[A-Z])(?=.*[^\w\s]).{12,64}$", 12),
        (r"^(?=.*foo)(?=.*oob)", 4),
        (r"^(?!a*$)[ab]{3}$", 3),
        (r"^(?=(aa)*$)(?=(aaa)*$)a{7,}$", 12),
        ("^((a{0,100}){0,100}){0,100}$", 0),
        (r"(\d{1,5}|\d{2,9}|\d{3,7}){1,100}", 1),
        ("^(a{1000}){5}$", 5000),
    ],
)
def test_the_shortest_text_is_found(pattern: str, length: int) -> None:
    text = shortest(parse(pattern))
    assert text is not None and len(text) == length
    assert re.search(pattern, text)


@pytest.mark.parametrize(
    "pattern", ["a^", "$b", r"^(?=\d)[a-z]", r"[^\s\S]", r"^(?!a)a", r"a\ba", "^(?=(aa)+$)a(aa)*$"]
)
def test_what_has_no_text_is_known(pattern: str) -> None:
    assert shortest(parse(pattern)) is None


def test_it_is_as_short_as_the_first_text_that_matches() -> None:
    """All texts over a small alphabet, in order of length."""
    rng = random.Random(5)
    for _ in range(40):
        pattern, _ = random_pattern(rng)
        text = shortest(parse(pattern))
        assert text is not None and re.search(pattern, text), pattern
        for shorter in itertools.chain.from_iterable(itertools.product("aAZ0-. \\", repeat=n) for n in range(4)):
            if len(shorter) >= len(text):
                break
            assert not re.search(pattern, "".join(shorter)), (pattern, text, shorter)


def test_a_text_that_has_begun_is_ended_with_as_little_as_possible() -> None:
    rng = random.Random(6)
    for _ in range(60):
        pattern, member = random_pattern(rng)
        automaton = Automaton(parse(pattern))
        for at in range(len(member) + 1):
            end = automaton.shortest(member[:at])
            if end is None and not member.isascii():  # not what every dialect allows
                break
            assert end is not None and len(end) <= len(member) - at, (pattern, member, at)
            assert re.search(pattern, member[:at] + end), (pattern, member, at)


def test_a_length_beside_a_pattern() -> None:
    for low, high, length in ((0, ENDLESS, 3), (10, ENDLESS, 10), (3000, 3001, 3000), (0, 2, None)):
        text = shortest(both([parse("^.*foo.*$"), repeat(ANY, low, high)]))
        assert (None if text is None else len(text)) == length


def test_a_search_that_is_too_long_is_given_up() -> None:
    automaton = Automaton(parse(r"^(?!.*a.{40}b)(?=.*c.{30}d)(?=.*d.{25}c)(?!.*z.{30}).{200}$"))
    with pytest.raises(NotSupported, match="more than 2000 steps"):
        finish(automaton.ending(automaton.start, 2000))
