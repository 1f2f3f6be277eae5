"""constraints/tools.py, rules.py and scalars.py: random walks under tools' grammars write calls that obey the schemas.

What they write is read back by `replies.parse_ids`.
"""

from __future__ import annotations

import math
import random
from typing import Any

import gemma_vocab
import grammars
import jsonschema
import numpy as np
import pytest
from tool_grammars import (
    CLOSE,
    ENDS,
    NANO,
    NANO_FOLDER,
    OPEN,
    TEXT,
    allows,
    allows_ids,
    compiled_tools,
    record,
    tool,
)

from sfumato.constraints.grammar import Grammar
from sfumato.constraints.tools import source_of_calls
from sfumato.errors import InputError
from sfumato.text.replies import parse_ids
from sfumato.text.template import ChatTemplate
from sfumato.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")

WHOLE, NUMBER, BOOL, NULL = ({"type": kind} for kind in ("integer", "number", "boolean", "null"))
POINT = {"type": "object", "properties": {"x": NUMBER, "y": NUMBER}, "required": ["x", "y"]}

SCHEMAS: dict[str, dict[str, Any]] = {
    "nothing": {"type": "object", "properties": {}},
    "text": record("a", a=TEXT),
    "optional": record("", a=TEXT, b=WHOLE, c=BOOL),
    "middle": record("c", a=WHOLE, b=BOOL, c=NULL, d=BOOL),
    "ends": record("a d", a=BOOL, b=BOOL, c=BOOL, d=BOOL),
    "lengths": record("a b c d", a=TEXT | {"minLength": 3, "maxLength": 5}, b=TEXT | {"maxLength": 2},
                      c=TEXT | {"minLength": 5}, d=TEXT | {"maxLength": 0}),
    "enum": record("a", a=TEXT | {"enum": ["celsius", "c", "", "two words", "{a:1},", 'quote "']}),
    "mixed_enum": record("a", a={"enum": ["x", 3, -2.5, 1e30, None, True, [1, {"b": "c"}], {"k": [], "a b": ""}]}),
    "enum_of_type": record("a b", a={"type": "integer", "enum": ["x", 3, 4.0, None]}, b=NULL | {"const": None}),
    "const": record("a b", a={"const": "fixed"}, b={"const": 7}),
    "whole": record("a b c d", a=WHOLE, b=WHOLE | {"minimum": -17, "maximum": 23}, c=WHOLE | {"exclusiveMinimum": 99},
                    d=WHOLE | {"exclusiveMaximum": -8, "minimum": -1000}),
    "safe_whole": record("a", a=WHOLE | {"minimum": -9007199254740991, "maximum": 9007199254740991}),
    "fractions": record("a b c d e", a=NUMBER, b=NUMBER | {"minimum": -0.25, "maximum": 1.5},
                        c=NUMBER | {"exclusiveMinimum": 0, "exclusiveMaximum": 1}, d=NUMBER | {"minimum": 1e-7},
                        e=NUMBER | {"maximum": -3.14}),
    "one_number": record("a b", a=NUMBER | {"minimum": 2.5, "maximum": 2.5},
                         b=WHOLE | {"minimum": 0.5, "maximum": 1.5}),
    "pattern": record("a b c", a=TEXT | {"pattern": "^[A-Z]{2}-\\d+$"}, b=TEXT | {"pattern": "a[^\\w]b|^x"},
                      c=TEXT | {"pattern": "^(?:/[a-z\\-]+)+/?$", "maxLength": 12}),
    "format": record("a b c d", a=TEXT | {"format": "date"}, b=TEXT | {"format": "ipv4"}, c=TEXT | {"format": "uuid"},
                     d=TEXT | {"format": "email", "maxLength": 40}),
    "array": record("a b", a={"type": "array", "items": WHOLE}, b={"type": "array", "items": TEXT, "minItems": 2}),
    "array_counts": record("a b c d", a={"type": "array", "items": BOOL, "maxItems": 3},
                           b={"type": "array", "items": BOOL, "minItems": 2, "maxItems": 2},
                           c={"type": "array", "maxItems": 0}, d={"type": "array", "items": NULL, "maxItems": 1}),
    "array_of_any": record("a", a={"type": "array", "minItems": 1}),
    "nested": record("p", p=record("q", q=record("r", r=WHOLE, s=TEXT), t=BOOL)),
    "records": record("list", list={"type": "array", "items": record("id", id=WHOLE, tag=TEXT), "minItems": 1}),
    "matrix": record("m", m={"type": "array", "items": {"type": "array", "items": NUMBER, "maxItems": 3}}),
    "map": record("m", m={"type": "object", "additionalProperties": WHOLE}),
    "free_record": record("m", m={"type": "object"}),
    "more_keys": record("b", a=BOOL, b=BOOL) | {"additionalProperties": {"type": "number", "minimum": 5}},
    "only_more_keys": record("", a=BOOL) | {"additionalProperties": True},
    "closed": record("a", a=BOOL, never=False) | {"additionalProperties": False},
    "unnamed_required": {"type": "object", "properties": {"a": BOOL}, "required": ["a", "z"]},
    "any": record("a b", a={}, b={"description": "anything"}),
    "any_of": record("a b", a={"anyOf": [TEXT | {"maxLength": 3}, WHOLE, NULL]},
                     b={"anyOf": [record("x", x=BOOL), POINT]}),
    "any_of_type": record("a", a=TEXT | {"anyOf": [{"maxLength": 2}, {"type": "integer"}, {"const": "long one"}]}),
    "types": record("a b", a={"type": ["string", "null"]},
                    b={"type": ["integer", "array"], "items": NULL, "minimum": 5}),
    "no_type": record("a b c", a={"minimum": 3}, b={"maxLength": 2}, c={"properties": {"q": BOOL}, "required": ["q"]}),
    "refs": {"$defs": {"point": POINT, "line": record("a b", a={"$ref": "#/$defs/point"}, b={"$ref": "#/$defs/point"})},
             **record("l", l={"$ref": "#/$defs/line"}, p={"allOf": [{"$ref": "#/$defs/point"}]})},
    "root_any_of": {"anyOf": [record("a", a=BOOL), record("b", b=WHOLE)]},
    "root_ref": {"$ref": "#/$defs/r", "$defs": {"r": record("a", a=BOOL)}},
    "odd_keys": {"type": "object", "properties": {k: BOOL for k in ("a b", " c", "d:e", "", "[", "ü", '"', "\\n", "-")},
                 "required": ["a b", " c", "d:e", "", "[", "ü", '"', "\\n", "-"]},
}  # fmt: skip


def walk(
    grammar: Grammar, seed: int, room: int, tokenizer: Tokenizer = NANO, ends: list[int] = ENDS, calling: float = 0.5
) -> list[int]:
    """The tokens of a model that errs nearly everywhere: random words, and random picks under the mask."""
    rng, guide = random.Random(seed), grammar.start(room)
    tokens: list[int] = []
    control = np.array(sorted(tokenizer.special_ids - set(ends)))

    def pick(at: int, mask: np.ndarray) -> tuple[int, float]:
        for favoured, chance in ((control, calling), (np.array(ends), 0.2)):
            allowed = favoured[mask[favoured]]
            if len(allowed) and rng.random() < chance:
                return int(rng.choice(allowed)), 0.0
        return int(rng.choice(np.flatnonzero(mask))), rng.choice([0.0, 5.0])

    while guide.room and not guide.is_over:
        width = min(rng.choice([1, 7, 32]), guide.room)
        is_last = False
        while not is_last:  # steps on one canvas
            is_last = rng.random() < 0.6
            top = [
                int(rng.choice(control)) if rng.random() < calling / 3 else rng.randrange(tokenizer.vocab_size)
                for _ in range(width)
            ]
            path = guide.walk(top, [rng.random() < 0.7 for _ in top], pick, 1.0, is_last)
        tokens += path.tokens
        guide.commit(len(path.tokens))
    assert guide.is_over or grammar.start(room).walk(tokens, [True] * len(tokens), pick, 1.0).tokens == tokens
    return tokens


def check(schema: dict[str, Any], arguments: Any) -> None:
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(arguments)


@pytest.mark.parametrize("name", SCHEMAS)
def test_arguments_obey_the_schema(name: str) -> None:
    schema = SCHEMAS[name]
    grammar = compiled_tools(tool(name, schema))
    calls: list[dict[str, Any]] = []
    for seed in range(3 if name in ("lengths", "format") else 9):
        ids = walk(grammar, seed, room=max((3, 90, 200)[seed % 3], grammar.shortest()), calling=0.8)
        assert {NANO.token(i) for i in NANO.special_ids.intersection(ids)} <= {"<|tool_call>", "<tool_call|>", '<|"|>'}
        reply = parse_ids(NANO, ids)
        assert len(reply.tool_calls) == ids.count(OPEN) == ids.count(CLOSE)
        for call in reply.tool_calls:
            assert call["name"] == name
            check(schema, call["arguments"])
        calls += reply.tool_calls
    assert calls


def test_all_tools_together() -> None:
    grammar = compiled_tools(*(tool(name, schema) for name, schema in SCHEMAS.items()))
    names: set[str] = set()
    most = 0
    for seed in range(6):
        reply = parse_ids(NANO, walk(grammar, seed, 200, calling=0.9))
        for call in reply.tool_calls:
            check(SCHEMAS[call["name"]], call["arguments"])
        names |= {call["name"] for call in reply.tool_calls}
        most = max(most, len(reply.tool_calls))
    assert len(names) > 5 and most > 1


def test_calls_alone() -> None:
    grammar = compiled_tools(tool("f"))
    assert allows(grammar, "<|tool_call>call:f{}<tool_call|>" * 2)
    call = "<|tool_call>call:f{}<tool_call|>"
    for text in ("", "words", "<|channel>", f"words{call}", f"{call}words"):
        assert not allows(grammar, text)


def test_what_the_template_writes_allows_ids() -> None:
    arguments: dict[str, Any] = {
        "city": "São Paulo, {x:1}", "days": 3, "deep": {"a": [1, 2.5, -3, "z"], "b": None}, "hot": True
    }  # fmt: skip
    schema = record("city", city=TEXT, days=WHOLE, deep={}, hot=BOOL)
    template = ChatTemplate.from_folder(NANO_FOLDER)
    messages: list[dict[str, Any]] = [{"role": "user", "content": "?"}]
    answer = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": arguments}}] * 2,
    }
    before = template.encode(NANO, messages)
    ids = template.encode(NANO, [*messages, answer], add_generation_prompt=False)[len(before) :]
    ids = ids[: len(ids) - ids[::-1].index(CLOSE)]
    assert [call["arguments"] for call in parse_ids(NANO, ids).tool_calls] == [arguments] * 2
    assert allows_ids(compiled_tools(tool("g"), tool("f", schema)), ids)


@pytest.mark.parametrize(
    "call",
    ["f{}", "f{b:1}", "f{a:1}", 'f{b:1,a:<|"|>x<|"|>}', 'f{a:<|"|>x<|"|>,b:-1}', 'f{a:<|"|>x<|"|>,b:1.5}', "g{}",
     'f{a:<|"|>x<|"|>,c:1}', 'f{a:<|"|>x<|"|>', "f", "f{a:x}", 'f{a:<|"|>x<|"|>,a:<|"|>x<|"|>}', 'f{a:<|"|>xyz<|"|>}'],
)  # fmt: skip
def test_wrong_calls_are_not_allowed(call: str) -> None:
    grammar = compiled_tools(tool("f", record("a", a=TEXT | {"maxLength": 2}, b=WHOLE | {"minimum": 0})))
    assert allows(grammar, '<|tool_call>call:f{a:<|"|>x<|"|>,b:1}<tool_call|>')
    assert not allows(grammar, f"<|tool_call>call:{call}<tool_call|>")


def test_nullable() -> None:
    grammar = compiled_tools(tool("f", record("a", a=TEXT | {"nullable": True})))
    assert allows(grammar, "<|tool_call>call:f{a:null}<tool_call|>")


REFUSED: list[tuple[Any, str]] = [
    ({"type": "int"}, "the type 'int' is unknown; choose from null, boolean"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength 3 is above maxLength 2, at /properties/a of"),
    ({"minLength": -1}, "minLength is -1; give a whole number from 0"),
    ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems 3 is above maxItems 2"),
    ({"type": "number", "minimum": 3, "maximum": 2}, "no number lies between the bounds 3 and 2, at /properties/a of"),
    ({"type": "integer", "minimum": 0.2, "maximum": 0.8}, "no number lies between"),
    ({"type": "number", "minimum": 1, "exclusiveMaximum": 1}, "no number lies between"),
    ({"minimum": "1"}, "minimum is '1'; give a number"),
    ({"type": "string", "pattern": "(?=a)b"}, "no text has the length, the pattern and the format together"),
    ({"pattern": "(a)\\1"}, "has the back reference"),
    ({"pattern": "(a"}, r"has a \( without its \)"),
    ({"pattern": "[a"}, r"has a \[ without its \]"),
    ({"pattern": "*"}, r"has the repetition '\*' of nothing"),
    ({"pattern": 3}, "a pattern is text, not 3"),
    ({"enum": []}, "none of the 0 values listed is allowed, at /properties/a of"),
    ({"enum": 3}, "enum is a list of values, not 3"),
    ({"type": "null", "enum": ["a"]}, "none of the 1 values listed is allowed, at /properties/a"),
    ({"const": "a<|turn>b"}, "spells a control token"),
    ({"$ref": "http://x/y"}, "is not within the schema"),
    ({"$ref": "#/$defs/z"}, "leads nowhere"),
    ({"$ref": "#"}, "no value is allowed"),
    (False, "the key 'a' is required and not allowed"),
    (3, "a schema is an object, true or false, not 3"),
    ({"properties": []}, "properties is an object of schemas"),
    ({"required": "a"}, "required is a list of keys"),
    ({"type": "object", "required": ["z"], "additionalProperties": False}, "the key 'z' is required and not allowed"),
    (record("", **{'<|"|>': TEXT}), "spells a control token; change it"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "sentence"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_refusals_name_the_place(schema: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as error:
        source_of_calls([tool("f", record("a", a=schema))])
    assert "\n" not in str(error.value) and "tool 'f'" in str(error.value)


def test_refused_tools() -> None:
    for tools, sentence in (
        ([], "at least one tool"),
        ([tool("f"), tool("f")], "two tools are called 'f'"),
        ([tool("f g")], "the tool name 'f g' cannot be called"),
        ([tool("f", {"type": "string"})], "no value is allowed.*, at the top of the parameters of tool 'f'"),
        ([{"name": 3}], "tool 0 is not"),
    ):
        with pytest.raises(InputError, match=sentence):
            source_of_calls(tools)
    deep: dict[str, Any] = {"$defs": {"d0": BOOL}, "type": "object", "properties": {"a": {"$ref": "#/$defs/d70"}}}
    deep["$defs"] |= {f"d{n}": record("a", a={"$ref": f"#/$defs/d{n - 1}"}) for n in range(1, 71)}
    with pytest.raises(InputError, match="nest deeper than the 64 levels"):
        source_of_calls([tool("f", deep)])


def test_control_tokens_come_only_where_named() -> None:
    quoted = Grammar.compile("grammar", 'start: <|"|> /[a-z]+/ <|"|>', NANO, 512, ENDS)
    assert allows(quoted, '<|"|>abc<|"|>') and not allows(quoted, '<|"|>abc<|tool_call>')
    for text in ('start: <|"|> "<|\\"|>" <|"|>', "start: <turn|>"):  # spelled as text; an end
        with pytest.raises(InputError):
            Grammar.compile("grammar", text, NANO, 512, ENDS)
    free = Grammar.compile("regex", "(?s:.*)", NANO, 512, ENDS)
    assert not allows(free, '<|"|>')


def test_with_gemmas_vocabulary() -> None:
    gemma_vocab.needs_file()
    tokenizer, ends = grammars.gemma(), grammars.ends(grammars.gemma())
    names = ["fractions", "pattern", "records", "any_of", "odd_keys", "mixed_enum"]
    grammar = compiled_tools(*(tool(name, SCHEMAS[name]) for name in names), tokenizer=tokenizer, ends=ends)
    calls = []
    for seed in range(2):
        calls += parse_ids(tokenizer, walk(grammar, seed, 300, tokenizer, ends, calling=0.9)).tool_calls
    for call in calls:
        check(SCHEMAS[call["name"]], call["arguments"])
    assert calls


def test_numbers_that_no_float_holds_are_refused() -> None:
    def tool(schema: dict[str, Any]) -> list[dict[str, Any]]:
        parameters = {"type": "object", "properties": {"n": schema}, "required": ["n"]}
        return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]

    with pytest.raises(InputError, match=r"minimum is 10+.*of at most 300 digits, at /properties/n/minimum"):
        source_of_calls(tool({"type": "integer", "minimum": 10**400}))
    for value in (10**400, math.nan, -math.inf):
        with pytest.raises(InputError, match=r"more than 300 digits, at /properties/n of|is no JSON"):
            source_of_calls(tool({"const": value}))
    assert str(10**299) in source_of_calls(tool({"const": 10**299})).text


def test_what_a_grammar_cannot_say_of_calls_is_checked() -> None:
    tree = record("v", v=WHOLE, kids={"type": "array", "items": {"$ref": "#"}})
    names = record("tags", tags={"type": "array", "items": TEXT, "uniqueItems": True})
    tools = [tool("grow", tree), tool("name", names)]
    grammar = compiled_tools(*tools)
    assert not allows(grammar, '<|tool_call>call:name{tags:[<|"|>a<|"|>,<|"|>a<|"|>]}<tool_call|>')
    assert allows(grammar, '<|tool_call>call:name{tags:[<|"|>a<|"|>,<|"|>b<|"|>]}<tool_call|>')
    for seed in range(6):
        reply = parse_ids(NANO, walk(grammar, seed, 90, calling=0.8))
        for call in reply.tool_calls:
            check(tree if call["name"] == "grow" else names, call["arguments"])
        assert reply.tool_calls
