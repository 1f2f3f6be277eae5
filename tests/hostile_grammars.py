"""A hundred grammars that ask for too much: of time, of memory, of stack, or for what no text can be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Attack = tuple[str, str, Any]
"""Its family, the kind of its constraint, and the constraint."""


def attacks() -> list[Attack]:
    """All of them, in families."""
    families = {
        "nested repeats": _nested_repeats(),
        "automata that grow": _growing_automata(),
        "size": _large(),
        "depth": _deep(),
        "contradictions": _contradictions(),
        "ambiguous rules": _ambiguous_rules(),
        "products": _products(),
    }
    return [(family, kind, value) for family, some in families.items() for kind, value in some]


def _text(pattern: str) -> tuple[str, Any]:
    return "schema", {"type": "string", "pattern": pattern}


def _nested_repeats() -> Iterator[tuple[str, Any]]:
    yield _text("^((a{0,100}){0,100}){0,100}$")
    yield _text(r"(\d{1,5}|\d{2,9}|\d{3,7}){1,100}")
    for pattern in (
        "((a{0,100}b?){0,100}c?){0,100}",
        "(((a|b){1,100}x?){1,100}y?){1,100}",
        r"(\d{1,5}a?|\d{2,9}b?|\d{3,7}c?){1,100}",
        "(a{1,5}b?|a{2,9}c?|a{3,7}d?){1,1000}",
        "((((a?){50}b?){50}c?){50}d?){50}",
        "(a?b?c?d?e?){0,500}x",
        "((a+)+)+b",
        "((a*)*)*",
        "(a{1000}){1000}",
        "((a{1000}){1000}){1000}",
        "(a|aa|aaa|aaaa){100,200}",
        r"(\w{1,20}[-_ ]?){1,200}",
        "(?:.{0,30}x){0,30}y",
        "([a-z]{1,30}[A-Z]{1,30}){1,300}",
        "(a{2,3}|a{5,7}|a{11,13}){17,19}",
        "(?:(?:(?:a|b){3,9}c){3,9}d){3,9}",
    ):
        yield "regex", pattern
        yield _text(f"^{pattern}$")


def _growing_automata() -> Iterator[tuple[str, Any]]:
    for pattern in (
        "(?:a|b)*a(?:a|b){20}",
        "(?:a|b)*a(?:a|b){60}",
        ".*a.{200}b",
        "(?:.*a.{0,100}b.*){4}",
        "(?=.*a.{30}b)(?=.*c.{30}d)(?=.*e.{30}f).{100}",
        "(?!.*a.{40}b)(?=.*c.{30}d)(?=.*d.{25}c)(?!.*z.{30}).{200}",
        "(?=(?:a|b)*a(?:a|b){40}$)(?=(?:a|b)*b(?:a|b){41}$)[ab]*",
        "(?=(a{7})*$)(?=(a{11})*$)(?=(a{13})*$)(?=(a{17})*$)(?=(a{19})*$)a+",
        r"(?:[^\w]{0,50}\p{L}{0,50}){0,50}x",
        r"(?i)(?:[^k]{0,9}ß{0,9}){0,99}\b.\b",
    ):
        yield "regex", pattern


def _large() -> Iterator[tuple[str, Any]]:
    yield "regex", "a" * 100_000
    yield "regex", "[ab]" * 25_000
    yield "regex", "|".join(f"word{i}" for i in range(10_000))
    yield "regex", "".join(f"(?:a{i}|b)?" for i in range(9_000))
    yield "regex", "(" * 50_000 + ")" * 50_000
    yield "regex", "[a-z]{8000}"
    yield "choices", [f"choice {i} of {i * i}" for i in range(10_000)]
    yield "choices", ["a" * i for i in range(1, 1_400)]
    yield "schema", {"enum": [f"value {i}" for i in range(10_000)]}
    yield "schema", {"enum": [[i, str(i)] for i in range(10_000)]}
    yield "schema", {"properties": {f"p{i}": {"type": "string", "description": "x" * 60} for i in range(9_000)}}
    yield "schema", {"properties": {f"p{i}": {"type": "integer"} for i in range(3_000)}, "additionalProperties": False}
    yield "schema", {"type": "object", "required": [f"p{i}" for i in range(3_000)]}
    yield "schema", {"description": "x" * 990_000, "type": "string"}
    yield "schema", {"anyOf": [{"type": "object", "properties": {f"k{i}": {"const": i}}} for i in range(3_000)]}
    yield "schema", {"type": "string", "minLength": 90_000}
    yield "schema", {"type": "array", "items": {"enum": list(range(3_000))}, "minItems": 3_000}
    yield "schema", {"type": "array", "minItems": 100_000}
    yield "grammar", "start: " + " | ".join(f'"w{i}"' for i in range(50_000))
    yield "grammar", "start: r0\n" + "\n".join(f'r{i}: "a" | "b"' for i in range(20_000))
    yield "grammar", "start: T\nT: " + " ".join(f"/[a-{chr(98 + i % 24)}]/" for i in range(40_000))


def _deep() -> Iterator[tuple[str, Any]]:
    schema: Any = {"type": "null"}
    for _ in range(60):
        schema = {"type": "array", "items": schema, "minItems": 1}
    yield "schema", schema
    yield "schema", '{"anyOf": [' * 1_000 + "true" + "]}" * 1_000
    yield "schema", '{"items":' * 100_000
    yield "schema", "[" * 400_000
    yield "grammar", "start: " + "(" * 50_000 + '"a"' + ")" * 50_000
    yield "grammar", "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1}' for i in range(9_000)) + '\nr9000: "b"'
    yield "grammar", "start: T0\n" + "\n".join(f"T{i}: T{i + 1}" for i in range(3_000)) + '\nT3000: "b"'
    yield "regex", "(?:" * 90 + "a" + "){1,2}" * 90
    yield "schema", {"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(900)}, "$ref": "#/$defs/d0"}


def _contradictions() -> Iterator[tuple[str, Any]]:
    for pattern in (r"(?=a)b", r"[^\s\S]", "a^b", r"(?=(aa)+$)a(aa)*", "(?!.*)x", r"(?=.{9}$).{10}", r"\b\B"):
        yield "regex", pattern
    yield "schema", {"type": "string", "minLength": 9, "maxLength": 3}
    yield "schema", {"type": "string", "pattern": "^[a-z]{5}$", "minLength": 9}
    yield "schema", {"type": "integer", "minimum": 7, "maximum": 6}
    yield "schema", {"allOf": [{"type": "string"}, {"type": "integer"}]}
    yield "schema", {"type": "integer", "minimum": 1, "maximum": 6, "multipleOf": 7}
    yield "schema", {"$ref": "#"}
    yield "schema", {"type": "object", "properties": {"a": False}, "required": ["a"], "additionalProperties": False}
    yield "grammar", 'start: "a" start'
    yield "grammar", 'start: A\nA: "b" & "c"'


def _ambiguous_rules() -> Iterator[tuple[str, Any]]:
    yield "grammar", 'start: start start | "a" | ""'
    yield "grammar", 'start: (start | "a")* "b"'
    yield "grammar", "start: " + " ".join(["a?"] * 400) + '\na: "x" | "x" a'
    yield "grammar", 'start: e\ne: e "+" e | e "*" e | "(" e ")" | e e | /[0-9]+/'
    yield "grammar", "start: (A | B | C)* D\nA: /[a-z]+/\nB: /[a-z]{1,9}/\nC: /[a-y]*/\nD: /z{50}/"
    yield "grammar", 'start: p\np: "a" p "a" | "b" p "b" | ""'
    yield "grammar", "start: " + " | ".join(f'x{i} "e{i}"' for i in range(300)) + "\n" + _letters(300)


def _letters(count: int) -> str:
    return "\n".join(f"x{i}: L{i}+\nL{i}: /[a-z]/" for i in range(count))


def _products() -> Iterator[tuple[str, Any]]:
    branch = [{"type": "object", "properties": {name: {"type": "string"}}} for name in "abcd"]
    yield "schema", {"allOf": [{"anyOf": branch}] * 12}
    schema: Any = {"type": "string"}
    for _ in range(14):
        schema = {"anyOf": [schema, {"type": "array", "items": schema}]}
    yield "schema", schema
    doubling = {
        f"d{i}": {"properties": {"l": {"$ref": f"#/$defs/d{i + 1}"}, "r": {"$ref": f"#/$defs/d{i + 1}"}}}
        for i in range(60)
    }
    yield "schema", {"$defs": doubling | {"d60": {"type": "null"}}, "$ref": "#/$defs/d0"}
    tree = {"type": "array", "items": {"anyOf": [{"$ref": "#/$defs/t"}, {"$ref": "#/$defs/t"}]}}
    yield "schema", {"$defs": {"t": tree}, "$ref": "#/$defs/t"}
    yield "schema", {"patternProperties": {f"^{chr(97 + i % 26)}{i}.*x": {"type": "null"} for i in range(60)}}
