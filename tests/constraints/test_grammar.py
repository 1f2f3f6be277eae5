"""constraints/grammar.py, schema.py, forms.py and search.py: what compiles has a short text, what cannot is refused."""

from __future__ import annotations

import random
import string
import sys
from typing import Any

import pytest
from grammars import NANO, FakeModel, compiled, ends, nano, written

from sfumato.constraints import grammar
from sfumato.constraints.forms import MAX_CHOICES, MAX_REGEX
from sfumato.constraints.grammar import Grammar
from sfumato.constraints.vocabulary import Vocabulary
from sfumato.errors import InputError
from sfumato.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("regex", "[a-z]+;[0-9]{4}", 7),
        ("regex", r"\w+@\w+\.(com|org)", 8),
        ("regex", ".*foo", 3),
        ("regex", "(foo|barbaz{20}|x)+y", 2),
        ("regex", "", 0),
        ("schema", {"type": "string", "minLength": 5000}, 720),
        ("schema", {"type": "string", "pattern": ".+@.+[.].+"}, 8),
        ("schema", {"type": "string", "format": "email"}, 7),
        ("schema", {"type": "string", "format": "date-time"}, 25),
        ("schema", {"type": "string", "format": "uri"}, 7),
        ("schema", {"type": "array", "items": {"enum": ["a long one", 1]}, "minItems": 3}, 9),
        ("schema", {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}, 2),
        ("schema", True, 1),
        ("schema", '{"title": "T", "$schema": "urn:x", "$id": "urn:y", "type": "null", "examples": [1]}', 4),
        ("grammar", 'start: "(" start ")" | "x"', 1),
    ],
)
def test_a_short_text_is_found(kind: str, value: Any, text: int) -> None:
    assert compiled(kind, value).shortest() <= text


def test_an_example_stands_where_no_time_is_left_to_shorten_it(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"key_{number}" for number in range(60)]
    schema = {"type": "object", "properties": {key: {"enum": ["low"]} for key in keys}, "required": keys}
    source, hints, _, example = grammar.read_source("schema", schema)
    tokenizer = nano()
    vocabulary = Vocabulary.of(tokenizer, tokenizer.vocab_size, ends(tokenizer))
    monkeypatch.setattr(grammar, "_tokenizers", {vocabulary.key: (tokenizer, vocabulary)})
    monkeypatch.setattr(grammar, "SEARCH_SECONDS", -1)
    tokens = grammar._shortest_text(vocabulary.key, grammar.Terms("schema", source, hints, "", None, example))
    assert tokens is not None and len(tokens) > 256 and tokenizer.decode(tokens) == example
    with pytest.raises(InputError, match="longer than the -1 seconds allowed to find its shortest text"):
        grammar._shortest_text(vocabulary.key, grammar.Terms("schema", source, hints, "", None, None))


# ---- requests that cannot be ----------------------------------------------------------------------------------------


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("xml", "<a/>", "no constraint 'xml'; the constraints are schema, regex, grammar, choices"),
        ("schema", "{", "no JSON"),
        ("schema", "[1]", "a schema is a JSON object, or true"),
        ("schema", 3, "a schema is a JSON object, or true"),
        ("schema", '{"minimum": NaN}', "NaN"),
        ("schema", '{"minimum": 1e999}', "no JSON"),
        ("schema", {"const": {1}}, "no JSON"),
        ("schema", {"const": "\ud800"}, "lone surrogate"),
        ("schema", {"const": "x" * 1_000_001}, "more than the 1000000 allowed"),
        ("schema", nested(64), "deeper than the 64"),
        ("schema", '{"items":' * 5000, "deeper than the 64|no JSON"),
        ("schema", False, "allows no text"),
        (
            "schema",
            {"type": "object", "properties": {"a/b": {"not": {}}}, "required": ["a/b"]},
            "no value is allowed.*b of",
        ),
        ("schema", {"format": ["date"]}, "format is text, not \\['date'\\], at /format of the schema"),
        ("schema", {"$ref": "https://example.org/s.json"}, "not within the schema"),
        ("schema", {"$ref": "#/$defs/none"}, "none"),
        ("schema", {"$ref": "#"}, "refers to itself without anything between"),
        ("schema", {"properties": 3}, "properties is an object of schemas, not 3, at /properties of"),
        ("schema", {"anyOf": {}}, "anyOf is a list of at least one schema, not {}, at /anyOf of"),
        ("schema", {"items": "x"}, "true or false, not 'x', at /items of the schema"),
        ("schema", {"type": "strin"}, "strin"),
        ("schema", {"type": "integer", "minimum": 5, "maximum": 3}, "no number lies between the bounds 5 and 3"),
        ("schema", {"type": "string", "minLength": 5, "maxLength": 3}, "minLength 5 is above maxLength 3"),
        ("schema", {"type": "array", "minItems": 5, "maxItems": 3}, "minItems 5 is above maxItems 3"),
        ("schema", {"type": "integer", "minimum": 1, "maximum": 6, "multipleOf": 7}, "no multiple of the step"),
        ("schema", {"type": "array", "items": {"enum": []}, "minItems": 1}, "none of the 0 values.*at /items of"),
        ("schema", {"enum": []}, "none of the 0 values listed is allowed"),
        (
            "schema",
            {"type": "object", "required": ["a"], "additionalProperties": False},
            "the key 'a' is required and not allowed",
        ),
        ("schema", {"type": "string", "pattern": "(a"}, "without its"),
        ("schema", {"type": "array", "minItems": 1_000_000}, "minItems is 1000000; give a whole number from 0"),
        ("regex", "(a", r"the regex has a \( without its \), which is not supported"),
        ("regex", "(?=a)b", "the regex allows no text"),
        ("regex", r"(a)\1", r"the back reference '\\1', which is not supported"),
        ("regex", r"[^\s\S]", "the regex allows no text"),
        ("regex", "(a{1000}){1000}", "too complex"),
        ("regex", "a" * (MAX_REGEX + 1), "more than the 100000 allowed"),
        ("regex", None, "regex is of type NoneType; give text"),
        ("grammar", "start: foo", 'unknown name: "foo"'),
        ("grammar", 'start: "a" start', "no text of at most 8192 tokens"),
        ("grammar", 'start: "a" <[4]>', "no text of at most 8192 tokens"),
        ("grammar", '{"grammars": []}', "cannot be used"),
        ("choices", [], "at least one text"),
        ("choices", "yes", "at least one text"),
        ("choices", ["a", ""], "choice 2 is empty"),
        ("choices", ["a", "b", "a"], "choice 3, 'a', is choice 1 again"),
        ("choices", ["a", 3], "choice 2 is of type int"),
        ("choices", [str(i) for i in range(MAX_CHOICES + 1)], "more than the 10000 allowed"),
    ],
)
def test_what_cannot_be_is_one_sentence(kind: str, value: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        compiled(kind, value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_schema_of_wrong_types_is_an_error_and_no_panic() -> None:
    rng = random.Random(3)
    junk: list[Any] = [None, True, -1, 1.5, 10**30, "", "x", [], [1], {}, {"a": 1}, [None], {"": {}}]
    words = "type enum const anyOf allOf oneOf items prefixItems minItems maxItems properties required pattern format \
minLength maxLength minimum maximum exclusiveMinimum multipleOf additionalProperties patternProperties minProperties \
maxProperties $ref $defs $id $anchor $schema"
    for _ in range(300):
        value = {word: rng.choice(junk) for word in rng.sample(words.split(), rng.randint(1, 3))}
        try:
            compiled("schema", value)
        except InputError as error:
            assert "\n" not in str(error), value


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    fresh = Tokenizer.from_file(NANO)
    for kind, value in (("regex", "a"), ("choices", ["a"])):
        with pytest.raises(InputError, match=r"pip install '\.\[constrain\]'"):
            Grammar.compile(kind, value, fresh, fresh.vocab_size, [1])


def test_many_choices_are_quick_enough() -> None:
    rng = random.Random(0)
    choices = ["".join(rng.choices(string.ascii_letters + " ", k=90)) for _ in range(MAX_CHOICES)]
    grammar = compiled("choices", choices)
    tokens, _ = written(grammar.start(200), FakeModel(rng, nano()), 200)
    assert nano().decode(tokens) in choices
