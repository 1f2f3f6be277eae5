"""constraints/schema.py, checks.py and values/: what a grammar of a schema allows obeys it; what obeys it may come.

Answers are written by a model that errs at random, and held against jsonschema and pydantic with formats on. JSON
Schema's own suite lies in the source distribution of jsonschema (`tests/json-schema-suite`, where somebody put it).
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from grammars import FakeModel, compiled, nano, written

from sfumato.constraints.forms import llguidance
from sfumato.constraints.schema import source_of_schema
from sfumato.errors import InputError

pytest.importorskip("llguidance")
pydantic_types = pytest.importorskip("pydantic_types")
real_schemas = pytest.importorskip("real_schemas").real_schemas

SUITE = Path(__file__).parents[1] / "json-schema-suite"


def allows(schema: Any, text: str) -> bool:
    """Whether a text, its tokens being bytes, is one of the schema's, its check included."""
    source = source_of_schema(schema)
    matcher = llguidance().LLMatcher(llguidance().LLTokenizer("byte"), source.text, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    symbols = list(text.encode())
    if matcher.try_consume_tokens(symbols) < len(symbols) or not matcher.is_accepting():
        return False
    return source.check is None or source.check.is_passed(Spelling(), symbols)  # type: ignore[arg-type]


class Spelling:
    """A tokenizer whose tokens are bytes, as far as a check needs it."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode()


def named(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


TEXT, WHOLE, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
BIG = 2**53 + 1
PETS = {
    "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
    "discriminator": {"propertyName": "kind"},
    "$defs": {"cat": named(kind={"const": "cat"}, lives=WHOLE), "dog": named(kind={"const": "dog"})},
}
MODES = named(mode={"enum": ["a", "b"]}, level=WHOLE) | {
    "if": {"properties": {"mode": {"const": "a"}}, "required": ["mode"]},
    "then": {"required": ["level"]},
}


@pytest.mark.parametrize(
    ("schema", "yes", "no"),
    [
        # values that were wrong before
        ({"type": "string", "format": "date-time"},
         ["2020-02-29T23:59:59Z"], ["2020-01-01T00:00:60Z", "2021-02-29T00:00:00Z"]),
        ({"type": "string", "format": "date"}, ["2024-02-29"], ["2021-02-29", "0000-01-01"]),
        ({"type": "string", "pattern": "^[^\\\\]+$"}, ["a"], ["a\\b"]),
        ({"type": "string", "pattern": '^[^"]+$'}, ["a\n"], ['a"b']),
        ({"type": "string", "pattern": '^a["\\\\\n]b$'}, ['a"b', "a\\b", "a\nb"], ["ab"]),
        ({"type": "object", "additionalProperties": NUMBER, "minProperties": 2}, [{"aa": 1, "b": 2}], [{"aa": 1}]),
        ({"const": BIG}, [BIG], [BIG - 1, BIG + 1]),
        ({"enum": [BIG, 10**40 + 1]}, [BIG, 10**40 + 1], [BIG - 1, 10**40]),
        (WHOLE | {"minimum": BIG}, [BIG, BIG + 1, 10**17], [BIG - 1, 5]),
        (WHOLE | {"maximum": -(10**30)}, [-(10**30)], [-(10**30) + 1, 0]),
        (NUMBER | {"exclusiveMinimum": 4, "maximum": 4.5}, [4.5, 4.25], [4, 4.0, 4.51]),
        (NUMBER | {"exclusiveMinimum": 0}, [0.001, 3], [0, 0.0, -1]),
        (WHOLE | {"minimum": 1, "exclusiveMinimum": True, "$schema": "http://json-schema.org/draft-04/schema#"},
         [2], [1]),
        ({"$id": "https://a.example/b.json", "$ref": "#/$defs/t", "$defs": {"t": WHOLE}}, [1], ["x"]),
        # what is ignored
        (TEXT | {"markdownDescription": "x", "x-order": 1, "format": "ssn", "errorMessage": {}}, ["a"], [1]),
        (TEXT | {"format": "uuid4"},
         ["9b2f4c1e-0a3d-4f5b-8c6d-7e8f9a0b1c2d"], ["9b2f4c1e-0a3d-1f5b-8c6d-7e8f9a0b1c2d"]),
        (TEXT | {"format": "byte"}, ["", "YWI=", "YWJj"], ["a", "YW=="]),
        (WHOLE | {"format": "int32"}, [2**31 - 1, -(2**31)], [2**31]),
        (TEXT | {"minLength": 2.0}, ["ab"], ["a"]),
        # what was refused before
        ({"type": "array", "items": {"enum": ["a", "b", 1]}, "uniqueItems": True}, [[], ["b", 1, "a"]], [["a", "a"]]),
        ({"type": "array", "items": TEXT, "uniqueItems": True}, [["a", "b"]], [["a", "b", "a"]]),
        ({"type": "array", "items": TEXT, "uniqueItems": False}, [["a", "a"]], [[1]]),
        (PETS, [{"kind": "cat", "lives": 3}, {"kind": "dog"}], [{"kind": "dog", "lives": 3}, {"lives": 3}]),
        ({"oneOf": [TEXT | {"maxLength": 3}, TEXT | {"minLength": 3}]}, ["ab", "abcd"], ["abc"]),
        (named(a=WHOLE, b=WHOLE) | {"oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
         [{"a": 1}], [{}, {"a": 1, "b": 1}]),
        ({"not": TEXT}, [1, None, []], ["a"]),
        (TEXT | {"not": {"enum": ["", "none"]}}, ["nones", "n"], ["", "none"]),
        (TEXT | {"not": {"pattern": "^a"}}, ["b"], ["ab"]),
        ({"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}}, [{"ab": 1}], [{"A": 1}]),
        ({"type": "object", "propertyNames": {"enum": ["x", "y"]}}, [{"x": 1}, {}], [{"z": 1}]),
        (named(a=WHOLE, b=WHOLE) | {"dependentRequired": {"a": ["b"]}}, [{"b": 1}, {"a": 1, "b": 1}], [{"a": 1}]),
        (MODES, [{"mode": "b"}, {"mode": "a", "level": 1}], [{"mode": "a"}]),
        ({"$defs": {"n": named(v=WHOLE, n={"$ref": "#/$defs/n", "title": "x"})},
          "$ref": "#/$defs/n", "description": "y"},
         [{"v": 1, "n": {"n": {}}}], [{"n": 1}]),
        ({"allOf": [named(a=WHOLE) | {"additionalProperties": True}, {"properties": {"a": {"minimum": 3}}}]},
         [{"a": 3}], [{"a": 2}]),
        ({"type": "array", "contains": {"const": 1}, "maxItems": 3}, [[1], [1, "x"]], [[], ["x"]]),
        ({"type": "array", "prefixItems": [WHOLE, TEXT], "items": False, "minItems": 2},
         [[1, "a"]], [[1], [1, "a", 2]]),
        ({"allOf": [{"properties": {"a": WHOLE}}], "type": "object", "unevaluatedProperties": False},
         [{"a": 1}], [{"b": 1}]),
        ({"type": "object", "patternProperties": {"^x-": WHOLE}, "additionalProperties": TEXT},
         [{"x-a": 1, "b": "c"}], [{"x-a": "c"}]),
        (named(**{name: WHOLE for name in "abcd"}) | {"minProperties": 2, "maxProperties": 3},
         [{"a": 1, "d": 1}, {"b": 1, "c": 1, "d": 1}], [{"a": 1}, {name: 1 for name in "abcd"}]),
        (NUMBER | {"multipleOf": 0.01}, [19.99, 0.07, 5], [0.001]),
        (WHOLE | {"multipleOf": 7}, [0, -7, 70_007], [8, 10]),
        (TEXT | {"nullable": True}, ["a", None], [1]),
    ],
)  # fmt: skip
def test_what_a_schema_allows(schema: dict[str, Any], yes: list[Any], no: list[Any]) -> None:
    for values, is_right in ((yes, True), (no, False)):
        for value in values:
            assert allows(schema, json.dumps(value, ensure_ascii=False)) == is_right, value


def test_a_key_has_one_form() -> None:
    schema = {"type": "object", "properties": {"a": WHOLE}, "required": ["a"]}
    assert allows(schema, '{"a": 1, "b": "x"}')
    assert not allows(schema, '{"a": 1, "\\u0061": "x"}') and not allows(schema, '{"\\u0061": "x"}')
    assert not allows(schema, '{"a": 1, "a": "x"}')


def test_many_optional_properties() -> None:
    schema = named(**{f"p{number}": WHOLE for number in range(800)})
    grammar = compiled("schema", schema)
    tokens, is_complete = written(grammar.start(300), FakeModel(random.Random(0), nano()), 64)
    assert is_complete and allows(schema, nano().decode(tokens))


def chained(within: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Ninety schemas, each of which refers to the next."""
    schemas = {f"d{number}": within({"$ref": f"#/$defs/d{number + 1}"}) for number in range(90)}
    return {"$defs": schemas | {"d90": WHOLE}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (chained(lambda inner: {"allOf": [inner, inner]}), ""),
        (chained(lambda inner: {"anyOf": [inner, inner]}), "more than 50000 steps"),
        (chained(lambda inner: {"type": "array", "items": inner}), "deeper than the 64"),
        ({"allOf": [{"anyOf": [{"minimum": n}, {"maximum": -n}]} for n in range(40)]}, ""),
        ({"enum": list(range(10_001))}, "more than the 10000 allowed"),
        ({"enum": list(range(10_000))}, ""),
        ({"anyOf": [{"$ref": "#"}, WHOLE]}, "refers to itself"),
    ],
)  # fmt: skip
def test_sizes_are_bounded(schema: dict[str, Any], words: str) -> None:
    if not words:
        assert source_of_schema(schema)
        return
    with pytest.raises(InputError, match=words) as caught:
        source_of_schema(schema)
    assert "\n" not in str(caught.value)


def test_what_takes_long_to_read_ends_in_the_child() -> None:
    onward = {f"d{number}": {"$ref": f"#/$defs/d{number + 1}"} for number in range(2000)}
    with pytest.raises(InputError, match="references lead on from one to the next"):
        compiled("schema", {"$defs": onward | {"d2000": WHOLE}, "$ref": "#/$defs/d0"})


# ---- random answers --------------------------------------------------------------------------------------------------


def answers(schema: dict[str, Any], count: int) -> list[str]:
    """So many answers of a model that errs at random, with rooms from the shortest up."""
    grammar = compiled("schema", schema)
    texts = []
    for seed in range(count):
        room = max(grammar.shortest(), (2 * grammar.shortest(), 60, 200)[seed % 3])
        canvas = (16, 64, 256)[seed % 3]
        tokens, is_complete = written(grammar.start(room), FakeModel(random.Random(seed), nano()), canvas)
        assert is_complete and len(tokens) <= room
        texts.append(nano().decode(tokens))
    return texts


def check(schema: dict[str, Any], text: str) -> None:
    """Hold an answer against jsonschema, with formats and in decimals; OpenAPI's nullable is read as it means."""
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    plain = json.loads(json.dumps(schema), parse_float=Decimal, object_hook=_with_null)
    kind(plain, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text, parse_float=Decimal))


def _with_null(part: dict[str, Any]) -> dict[str, Any]:
    if part.get("nullable") is not True:
        return part
    return {"anyOf": [{"type": "null"}, {word: value for word, value in part.items() if word != "nullable"}]}


def run_sample(schemas: list[dict[str, Any]], count: int) -> list[str]:
    """Answers to the schemas, each valid; what is said of the schemas that were refused."""
    refusals = []
    for schema in schemas:
        try:
            texts = answers(schema, count)
        except InputError as error:
            refusals.append(f"{error}: {schema}")
            continue
        for text in texts:
            check(schema, text)
    return refusals


def run_types(names: list[str], count: int) -> None:
    """Answers to the schemas of pydantic's types, each valid."""
    for name in names:
        schema = pydantic_types.schema_of(name)
        for text in answers(schema, count):
            check(schema, text)
            if name not in pydantic_types.SAY_LESS:
                pydantic_types.adapter_of(name).validate_json(text)


def test_answers_to_real_schemas_are_valid() -> None:
    assert run_sample(real_schemas()[:24], 2) == []


def test_every_schema_of_the_sample_is_accepted() -> None:
    assert len(real_schemas()) == 300 and run_sample(real_schemas(), 0) == []


def test_answers_to_the_types_of_pydantic_are_valid() -> None:
    run_types(list(pydantic_types.TYPES), 1)


@pytest.mark.slow
def test_five_thousand_answers_are_valid() -> None:
    assert run_sample(real_schemas(), 14) == []
    run_types(list(pydantic_types.TYPES), 12)  # 5,196 answers in all


# ---- JSON Schema's own suite -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["draft7", "draft2020-12"])
def test_the_suite_of_json_schema(draft: str) -> None:
    if not (SUITE / draft).is_dir():
        pytest.skip(f"there is no {SUITE}: copy json/tests of jsonschema's source distribution there")
    counts: Counter[str] = Counter()
    wrong = []
    for path in sorted((SUITE / draft).glob("*.json")):
        for group in json.loads(path.read_text(encoding="utf-8")):
            counts["schemas"] += 1
            try:
                source_of_schema(group["schema"])
            except InputError:
                continue
            counts["accepted"] += 1
            for case in group["tests"]:
                text = json.dumps(case["data"], ensure_ascii=False)
                is_allowed = allows(group["schema"], text)
                counts[f"{'valid' if case['valid'] else 'invalid'} {'allowed' if is_allowed else 'refused'}"] += 1
                if is_allowed and not case["valid"]:
                    wrong.append((path.name, group["description"], text))
    print(draft, dict(counts))
    assert not wrong
    assert counts["accepted"] >= 0.85 * counts["schemas"]
    assert counts["valid allowed"] >= 0.9 * (counts["valid allowed"] + counts["valid refused"])
