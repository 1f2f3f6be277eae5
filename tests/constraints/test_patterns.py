"""constraints/patterns.py: a text that a pattern's expression allows is one that Python's `re` allows, and Rust's."""

from __future__ import annotations

import json
import random
import re
import sys
from typing import TYPE_CHECKING

import pytest
from grammars import ends, nano
from random_patterns import random_pattern, random_text
from tool_grammars import TEXT, allows, compiled_tools, record, tool

from sfumato.constraints import characters
from sfumato.constraints.expressions import written
from sfumato.constraints.patterns import NotSupported, parse
from sfumato.constraints.shortest import Automaton
from sfumato.constraints.values.formats import FORMAT_PATTERNS
from sfumato.constraints.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

pytest.importorskip("llguidance")


def matcher_of(terminal: str) -> LLMatcher:
    vocabulary = Vocabulary.of(nano(), nano().vocab_size, ends(nano()))
    return vocabulary.matcher(f"start: T\nT: {terminal}")


def allowed(matcher: LLMatcher, text: str) -> bool:
    """Whether llguidance takes the text as a whole for that of a terminal."""
    tokens = nano().encode(text)
    assert nano().decode(tokens) == text
    matcher = matcher.deep_copy()
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


def quoted(text: str) -> str:
    """What stands for the text inside a string of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("b+", ["b", "abba", "\nb\n"], ["", "ac"]),
        ("^ab?$", ["a", "ab"], ["abb", "xa", "a\n"]),
        ("^a|b$", ["ax", "xb"], ["xax"]),
        ("^(?:a|b)$", ["a", "b"], ["ab"]),
        ("^(?P<year>\\d{4})-\\d\\d?$", ["1999-1"], ["1999-", "199-1"]),
        ("^[\\w.]+@x\\.y$", ["a.b@x.y"], ["@x.y", "a@xzy"]),
        ("^[^\\s/]{2,}?$", ["ab"], ["a b", "a/b", "a"]),
        ("^\\u0041\\x42[\\]\\[&-]*$", ["AB[&-]"], ["ABC"]),
        ("^.$", ["ä"], ["\n", "\r", "ab"]),
        ("^\\$\\^\\.\\/\\\\$", ["$^./\\"], ["$^x/\\"]),
        ("^\\S\\D\\W$", ["aa-"], ["aaa", "a1-"]),
        ("", ["", "x"], []),
        ("(^|,)x(,|$)", ["x", "a,x", "x,b", ",x,"], ["ax", "xb", "a,xb"]),
        (r"\bfoo\b", ["foo", "a foo.", "foo-"], ["afoo", "foo1", "fo"]),
        (r"^\w+\b.\B\W$", ["a--", "a- "], ["a-b", "ab", "-a-"]),
        (r"\Bfoo", ["afoo"], ["foo", "-foo"]),
        (r"^(?=.*\d)(?=.*[a-z]).{8,}$", ["aaaaaaa1", "1zzzzzzzzz"], ["aaaaaaaa", "a1", "11111111"]),
        (r"^(?!.*foo)[a-z]{3,}$", ["bar", "ooo"], ["afoo", "foobar", "ab"]),
        (r"^(?!(?:con|prn)$)[a-z]+$", ["cons", "a"], ["con", "prn"]),
        (r"^[a-z-]+(?<!-)$", ["a", "-a"], ["a-", "-"]),
        (r"(?<=[$])\d+$", ["$12", "a$1"], ["12", "$"]),
        ("(?i)^k[^s]$", ["k1", "KA"], ["ks", "kS", "k\u017f"]),
        ("^(?i:a)b(?s:.)$", ["Ab\n", "abc"], ["ABc"]),
        (r"\A[0-9]\Z", ["1"], ["12", "1\n"]),
        (r"^((a{0,100}){0,100}){0,100}$", ["", "a" * 300], ["b"]),
        (r"^(\d{1,5}|\d{2,9}|\d{3,7}){1,100}$", ["1", "1" * 500], ["", "1a"]),
        (r"^a{,b}{$", ["a{,b}{"], ["ab"]),
    ],
)
def test_patterns(pattern: str, yes: list[str], no: list[str]) -> None:
    expression = parse(pattern)
    automaton = Automaton(expression)
    plain, in_json = matcher_of(written(expression)), matcher_of(written(expression, "json"))
    for texts, is_right in ((yes, True), (no, False)):
        for text in texts:
            assert automaton.behind(text).is_nullable == is_right, text
            assert allowed(plain, text) == allowed(in_json, quoted(text)) == is_right, text
            if not text.endswith(("\n", "\r")):  # where Python allows more: a line break behind $, \r for a dot
                assert bool(re.search(pattern, text)) == is_right, text


@pytest.mark.parametrize("part", range(4))
def test_patterns_at_random_mean_what_re_means(part: int) -> None:
    rng, allowing = random.Random(part), 0
    for _ in range(40):
        pattern, member = random_pattern(rng)
        expression = parse(pattern)
        plain, in_json = matcher_of(written(expression)), matcher_of(written(expression, "json"))
        automaton = Automaton(expression)
        assert automaton.behind(member).is_nullable or not member.isascii(), (pattern, member)
        for text in [member, *(random_text(rng, member) for _ in range(5))]:
            is_in = automaton.behind(text).is_nullable
            allowing += is_in
            assert re.search(pattern, text) or not is_in, (pattern, text)
            assert allowed(plain, text) == allowed(in_json, quoted(text)) == is_in, (pattern, text)
            if text.isascii() and "\n" not in text:
                assert bool(re.search(pattern, text)) == is_in, (pattern, text)
    assert allowing > 60


@pytest.mark.parametrize("name", ["d", "D", "w", "W", "s", "S"])
def test_a_class_allows_what_python_allows_alone_and_turned_round(name: str) -> None:
    for pattern in (rf"\{name}", rf"[\{name}]", rf"[^\{name}]", rf"(?i)[^\{name}k]", rf"(?!\{name})."):
        expression = parse(pattern, is_whole=True)
        if expression.kind != "characters":
            automaton = Automaton(expression)
            codes = [code for code in range(0x500) if automaton.behind(chr(code)).is_nullable]
        else:
            codes = [code for first, last in expression.ranges for code in range(first, last + 1)]
        compiled = re.compile(pattern)
        assert len(codes) > 3 and all(compiled.fullmatch(chr(code)) for code in codes), pattern


def test_every_code_point_is_in_a_class_or_in_its_complement_or_doubtful() -> None:
    sets = parse(r"\w", is_whole=True).ranges, parse(r"\W", is_whole=True).ranges
    for code in [*range(0x3000), *range(0x1F000, 0x20000), sys.maxunicode]:
        is_word = chr(code).isalnum() or chr(code) == "_"
        ins = [characters.contains(one, code) for one in sets]
        assert ins != [True, True] and (is_word or not ins[0]) and (not is_word or not ins[1])


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(a", r"a \( without its \)"),
        ("a)", r"a \) without its \("),
        ("[a", r"a \[ without its \]"),
        ("*a", "'\\*' of nothing"),
        ("a**", "of a repetition"),
        ("a++", "of a repetition"),
        ("(?>a)", r"the group '\(\?>a'"),
        (r"(a)\1", "the back reference"),
        ("(?:^a)+", r"the repetition '\+' of an anchor"),
        ("(?x)a b", "the flag 'x'"),
        ("(?m)^a$", "the flag 'm'"),
        ("a(?i)b", "flags elsewhere"),
        ("[[:alpha:]]", "dialects read differently"),
        ("[a&&b]", "dialects read differently"),
        ("[b-a]", "a range without an end"),
        ("[]", r"an empty class|without its"),
        ("a{3,2}", "wrong order"),
        ("a{,3}", "begins without a number"),
        ("a{1,99999999999}", "more than 999999999"),
        (r"\012", "octal"),
        (r"\q", "the escape"),
        (r"\ud800", "surrogate"),
        (r"\p{Klingon}", "the property"),
        (r"[^\p{Greek}]", "the property"),
        ("(" * 101 + ")" * 101, "nested deeper than 100"),
        ("(^a|b)" * 10, "ways through its anchors"),
        ("[a-zé]b" * 101_000, "parts, more than the 200000"),
    ],
)
def test_what_is_not_supported_is_named(pattern: str, words: str) -> None:
    with pytest.raises(NotSupported, match=words):
        parse(pattern)


def test_formats_are_patterns() -> None:
    for name, pattern in FORMAT_PATTERNS.items():
        text = Automaton(parse(pattern, is_whole=True)).shortest("")
        assert text is not None and re.fullmatch(pattern, text), name


def test_a_pattern_in_the_call_of_a_tool() -> None:
    grammar = compiled_tools(tool("f", record("a", a=TEXT | {"pattern": r"^(?=.*\d)[a-z\d]{2,}$"})))
    for text, is_right in (("a1", True), ("1a", True), ("aa", False), ("a1-", False)):
        assert allows(grammar, f'<|tool_call>call:f{{a:<|"|>{text}<|"|>}}<tool_call|>') == is_right, text
