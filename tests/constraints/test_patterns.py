"""constraints/patterns.py: patterns mean what Python's regular expressions mean, in the calls of a tool's grammar."""

from __future__ import annotations

import re

import pytest
from tool_grammars import TEXT, allows, compiled_tools, record, tool

pytest.importorskip("llguidance")


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("b+", ["b", "abba", "\nb\n"], ["", "ac"]),
        ("^ab?$", ["a", "ab"], ["abb", "xa"]),
        ("^a|b$", ["ax", "xb"], ["xax"]),
        ("^(?:a|b)$", ["a", "b"], ["ab"]),
        ("^(?<year>\\d{4})-\\d\\d?$", ["1999-1"], ["1999-", "199-1"]),
        ("^[\\w.]+@x\\.y$", ["a.b@x.y"], ["@x.y", "a@xzy"]),
        ("^[^\\s/]{2,}?$", ["ab"], ["a b", "a/b", "a"]),
        ("^\\u0041\\x42[\\]\\[&-]*$", ["AB[&-]"], ["ABC"]),
        ("^.$", ["ä"], ["\n", "ab"]),
        ("^\\$\\^\\.\\/\\\\$", ["$^./\\"], ["$^x/\\"]),
        ("^\\S\\D\\W$", ["aa-"], ["aaa", "a1-"]),
        ("", ["", "x"], []),
    ],
)
def test_patterns(pattern: str, yes: list[str], no: list[str]) -> None:
    grammar = compiled_tools(tool("f", record("a", a=TEXT | {"pattern": pattern})))
    for texts, is_right in ((yes, True), (no, False)):
        for text in texts:
            assert allows(grammar, f'<|tool_call>call:f{{a:<|"|>{text}<|"|>}}<tool_call|>') == is_right, text
            if "?<" not in pattern:
                assert bool(re.search(pattern, text)) == is_right
