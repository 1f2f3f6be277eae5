"""constrain: whatever a model says, every text that ends is valid, and every text ends within its room.

The model here is a fake that errs at random: random tokens, random certainty, uniform picks under the mask.
"""

from __future__ import annotations

import functools
import json
import random
import re
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gemma_vocab
import jsonschema
import numpy as np
import pytest

from sfumato.constraints.constrain import Grammar, Guide, Walk
from sfumato.constraints.forms import MAX_CHOICES, MAX_REGEX
from sfumato.errors import CapacityError, InputError
from sfumato.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")

NANO = Path(__file__).parents[2] / "sfumato" / "nano" / "tokenizer.json"
BOUND = 0.5


@functools.cache
def nano() -> Tokenizer:
    return Tokenizer.from_file(NANO)


@functools.cache
def gemma() -> Tokenizer:
    return Tokenizer(gemma_vocab.build())


def ends(tokenizer: Tokenizer) -> list[int]:
    names = ("<eos>", "<turn|>", "<pad>")
    return [token for name in names if (token := tokenizer.id(name)) is not None]


def compiled(kind: str, value: Any, tokenizer: Tokenizer | None = None) -> Grammar:
    tokenizer = tokenizer or nano()
    return Grammar.compile(kind, value, tokenizer, tokenizer.vocab_size, ends(tokenizer))


class Fake:
    """A model that knows nothing: each step random words, some of them what was there before."""

    def __init__(self, rng: random.Random, tokenizer: Tokenizer) -> None:
        self.rng, self.vocab_size, self.ends = rng, tokenizer.vocab_size, set(ends(tokenizer))
        self.control = tokenizer.special_ids - self.ends
        self.picks = 0

    def pick(self, position: int, mask: np.ndarray) -> tuple[int, float]:
        assert mask.dtype == np.bool_ and mask.shape == (self.vocab_size,)
        allowed = np.flatnonzero(mask)
        assert len(allowed) and self.control.isdisjoint(allowed.tolist())
        self.picks += 1
        return int(allowed[self.rng.randrange(len(allowed))]), self.rng.random()

    def words(self, count: int, before: list[int]) -> list[int]:
        words = [self.rng.randrange(self.vocab_size) for _ in range(count)]
        return [old if self.rng.random() < 0.7 else new for old, new in zip(before, words, strict=False)] + words[
            len(before) :
        ]


def written(guide: Guide, fake: Fake, canvas: int, steps: int = 3) -> tuple[list[int], bool]:
    """The tokens of one text, and whether it is complete; every walk is checked on the way."""
    text: list[int] = []
    room = guide.room
    while not guide.is_over:
        before: list[int] = []
        for step in range(steps):
            top = fake.words(canvas, before)
            is_sure = [fake.rng.random() < 0.5 for _ in top]
            walk = guide.walk(top, is_sure, fake.pick, BOUND, is_last=step == steps - 1)
            check(walk, top, guide.room, fake)
            before = walk.tokens
        if walk.end is None:
            assert len(walk.tokens) == min(canvas, guide.room)
        text += walk.tokens
        assert walk.tokens or walk.end == 0
        guide.commit(len(walk.tokens))
        assert guide.room == room - len(text)
        assert guide.is_over == (walk.end is not None)
    return text, guide.is_over


def check(walk: Walk, top: list[int], room: int, fake: Fake) -> None:
    assert len(walk.tokens) <= min(len(top), room)
    assert walk.end in (None, len(walk.tokens))
    assert fake.control.isdisjoint(walk.tokens) and fake.ends.isdisjoint(walk.tokens)
    assert set(walk.forced).isdisjoint(walk.overruled)
    assert len(set(walk.forced)) == len(walk.forced)
    for position, token in enumerate(walk.tokens):
        assert token == top[position] or position in walk.forced or position in walk.overruled


# ---- schemas and expressions that nobody wrote by hand --------------------------------------------------------------


def schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    makers: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "boolean"},
        lambda: {"type": "null"},
        lambda: integer(rng),
        lambda: number(rng),
        lambda: text(rng),
        lambda: {"enum": rng.sample(["red", "blü", 7, None, True, "日本", "a b", -3], rng.randint(1, 5))},
        lambda: {"const": rng.choice(["fix", 12, 'é"\\', None, [1, "x"], {"k": "v"}])},
    ]
    if depth:
        makers += [
            lambda: array(rng, depth),
            lambda: object_(rng, depth),
            lambda: object_(rng, depth),
            lambda: {"anyOf": [schema(rng, depth - 1) for _ in range(rng.randint(2, 3))]},
        ]
    return rng.choice(makers)()


def integer(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    found = {"type": "integer", "minimum": low, "maximum": low + rng.randint(3, 3000)}
    return found | ({"multipleOf": 3} if rng.random() < 0.3 else {})


def number(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-50, 50) / 4
    return {"type": "number", "exclusiveMinimum": low, "maximum": low + rng.randint(4, 40) / 4}


def text(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.4:
        return {"type": "string", "pattern": f"^{regex(rng, 1)}$"}
    low = rng.randint(0, 6)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 30)}


def array(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(0, 2)
    return {
        "type": "array",
        "items": schema(rng, depth - 1),
        "minItems": low,
        "maxItems": low + rng.randint(0, 3),
    }


def object_(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["name", "größe", "n", "list of it", "名", 'quo"te', "value"], rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: schema(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def regex(rng: random.Random, depth: int = 2) -> str:
    parts = []
    for _ in range(rng.randint(1, 4)):
        if depth and rng.random() < 0.3:
            part = "(" + "|".join(regex(rng, depth - 1) for _ in range(rng.randint(1, 3))) + ")"
        else:
            part = rng.choice(["[a-z]", "[0-9]", "[A-Zé-ü]", "x", "-", "foo", '[^a-m"\\\\\\x00-\\x1f]', "ß", "[,;]"])
            part = f"(?:{part})" if part == "foo" else part
        low = rng.randint(0, 2)
        parts.append(
            part + rng.choice(["", "", "?", "+" if depth == 0 else "", f"{{{low},{low + rng.randint(1, 6)}}}"])
        )
    return "".join(parts)


def valid(value: Any, text: str) -> bool:
    if isinstance(value, str):
        return re.fullmatch(value, text) is not None
    jsonschema.validate(json.loads(text), value)
    return True


def generated(count: int, seed: int) -> list[Any]:
    rng = random.Random(seed)
    found: dict[str, Any] = {}
    while len(found) < count:
        value = schema(rng) if rng.random() < 0.7 else regex(rng, 1)
        found[json.dumps(value)] = value
    return list(found.values())


@pytest.mark.parametrize("part", range(8))
def test_a_model_that_errs_at_random_writes_valid_texts_that_end(part: int) -> None:
    rng = random.Random(part)
    for value in generated(24, seed=part):
        grammar = compiled("regex" if isinstance(value, str) else "schema", value)
        shortest = grammar.shortest()
        for room, canvas in ((shortest, 64), (2 * shortest, 64), (2 * shortest + 40, 16), (400, 256)):
            room = max(room, shortest)
            tokens, is_complete = written(grammar.start(room), Fake(rng, nano()), canvas)
            assert is_complete, (value, room)
            assert len(tokens) <= room
            assert valid(value, nano().decode(tokens)), (value, nano().decode(tokens))


def test_the_same_with_the_words_of_gemma() -> None:
    gemma_vocab.needs_file()
    rng = random.Random(7)
    for value in generated(12, seed=99):
        grammar = compiled("regex" if isinstance(value, str) else "schema", value, gemma())
        for room in (grammar.shortest(), 2 * grammar.shortest(), 200):
            room = max(room, grammar.shortest())
            tokens, is_complete = written(grammar.start(room), Fake(rng, gemma()), 64)
            assert is_complete and len(tokens) <= room
            assert valid(value, gemma().decode(tokens)), (value, gemma().decode(tokens))


@pytest.mark.parametrize("name", ["nano", "gemma"])
def test_choices_and_grammars_are_written_as_they_stand(name: str) -> None:
    if name == "gemma":
        gemma_vocab.needs_file()
    tokenizer = {"nano": nano, "gemma": gemma}[name]()
    choices = [" leading", "<eos>", "<turn|>", 'tab\t"quote"', "日本語", "\\u0041", "ab", "abc", "👩‍👩‍👧", "line\nline"]
    grammar = compiled("choices", choices, tokenizer)
    found = set()
    for seed in range(60):
        tokens, is_complete = written(grammar.start(20), Fake(random.Random(seed), tokenizer), 32)
        assert is_complete
        found.add(tokenizer.decode(tokens))
    assert found <= set(choices) and len(found) > 4

    lark = 'start: "(" start ")" | WORD (", " WORD)*\nWORD: /[a-zé]{1,5}/'
    grammar = compiled("grammar", lark, tokenizer)
    for seed in range(20):
        tokens, is_complete = written(grammar.start(30), Fake(random.Random(seed), tokenizer), 32)
        text = tokenizer.decode(tokens)
        inner = text.strip("()")
        assert is_complete and text.count("(") == text.count(")")
        assert re.fullmatch(r"[a-zé]{1,5}(, [a-zé]{1,5})*", inner), text


# ---- one walk -------------------------------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


BOS = 2
"""A token that no constraint allows."""


def never(position: int, mask: np.ndarray) -> tuple[int, float]:
    raise AssertionError("nothing was to be picked")


def spelled(grammar: Grammar, wanted: str) -> list[int]:
    """The tokens of a text as a model that knows it would write them, one canvas of one position after the other."""
    guide, tokens = grammar.start(300), []

    def pick(position: int, mask: np.ndarray) -> tuple[int, float]:
        left = wanted[len(nano().decode(tokens)) :]
        fits = [int(t) for t in np.flatnonzero(mask) if left.startswith(nano().decode([int(t)]) or "?")]
        return (max(fits, key=lambda t: len(nano().decode([t]))) if fits else ends(nano())[0]), 0.0

    while not guide.is_over:
        walk = guide.walk([BOS], [True], pick, 1.0, is_last=True)
        tokens += walk.tokens
        guide.commit(len(walk.tokens))
    assert nano().decode(tokens) == wanted
    return tokens


ADA = '{"name": "Ada Lovelace", "age": 36}'


def test_a_model_that_errs_nowhere_costs_no_mask() -> None:
    grammar = compiled("schema", PERSON)
    right = spelled(grammar, ADA)
    guide = grammar.start(100)
    walk = guide.walk([*right, *[1] * 50], [False] * 90, never, BOUND)
    assert (walk.tokens, walk.end, walk.overruled, guide.masks) == (right, len(right), {}, 0)
    assert 0 in walk.forced and len(walk.forced) > len(right) // 2  # the scaffold


def test_a_mask_is_asked_for_where_all_before_is_settled_and_nowhere_else() -> None:
    grammar = compiled("schema", PERSON)
    right = spelled(grammar, ADA)
    free = [j for j in range(len(right)) if j not in grammar.start(100).walk(right, [True] * 99, never, BOUND).forced]
    wrong, sure = right[:], [True] * len(right)
    first, second = free[3], free[6]
    wrong[first] = wrong[second] = BOS
    asked: list[int] = []

    def pick(position: int, mask: np.ndarray) -> tuple[int, float]:
        asked.append(position)
        assert mask[right[position]] and not mask[BOS]
        return right[position], entropy

    for entropy, is_last, expected in (
        (0.1, False, [first, second]),
        (9.0, False, [first]),
        (9.0, True, [first, second]),
    ):
        asked.clear()
        guide = grammar.start(100)
        walk = guide.walk(wrong, sure, pick, BOUND, is_last=is_last)
        assert asked == expected and walk.overruled == dict.fromkeys(expected, entropy)
        assert walk.tokens == (right if len(expected) == 2 else right[:second])
        assert walk.end == (len(right) if len(expected) == 2 else None)
        assert guide.masks == len(expected)

    sure[free[1]] = False  # a guess: nothing is built on it
    walk = grammar.start(100).walk(wrong, sure, never, BOUND)
    assert walk.tokens == right[:first] and walk.end is None


def test_what_is_known_of_a_position_is_kept_for_the_next_step() -> None:
    grammar = compiled("schema", PERSON)
    right = spelled(grammar, ADA)
    free = [j for j in range(len(right)) if j not in grammar.start(100).walk(right, [True] * 99, never, BOUND).forced]
    wrong = right[:]
    for j in free[2:8]:
        wrong[j] = BOS
    asked: list[int] = []

    def pick(position: int, mask: np.ndarray) -> tuple[int, float]:
        asked.append(position)
        return right[position], 0.0

    guide = grammar.start(100)
    for _ in range(3):
        assert guide.walk(wrong, [True] * 99, pick, BOUND).tokens == right
    assert asked == 3 * free[2:8] and guide.masks == 6
    assert guide.walk(right, [True] * 99, never, BOUND).tokens == right  # the model agrees at last
    wrong[free[-1]] = BOS
    guide.walk(wrong, [True] * 99, pick, BOUND)
    assert guide.masks == 7

    other = [*wrong[: free[4]], right[free[1]], *wrong[free[4] + 1 :]]  # a new path from there on
    guide.walk(other, [True] * 99, lambda j, mask: (int(mask.argmax()), 0.0), BOUND)
    assert guide.masks > 7


def test_the_end_is_one_of_the_tokens_that_may_come() -> None:
    grammar = compiled("schema", {"type": "integer", "minimum": 1, "maximum": 5000})
    one = nano().id("1")
    assert one is not None

    def pick(position: int, mask: np.ndarray) -> tuple[int, float]:
        assert position == 1 and all(mask[end] for end in ends(nano())) and mask[one]
        return ends(nano())[0], 0.3

    guide = grammar.start(10)
    walk = guide.walk([one, BOS, BOS], [True] * 3, pick, BOUND)
    assert walk == Walk([one], [], {1: 0.3}, 1)
    walk = guide.walk([one, ends(nano())[1], BOS], [True] * 3, never, BOUND)
    assert walk == Walk([one], [], {}, 1)
    guide.commit(1)
    assert guide.is_over and guide.room == 9
    assert guide.walk([one], [True], never, BOUND) == Walk([], [], {}, 0)


def test_a_text_may_be_committed_piece_by_piece() -> None:
    grammar = compiled("schema", PERSON)
    right = spelled(grammar, ADA)
    guide, done = grammar.start(len(right)), 0
    for count in (3, 0, 5, 1):
        walk = guide.walk([*right[done : done + 9]], [True] * 9, never, BOUND)
        assert walk.tokens == right[done : done + 9] and walk.end is None
        with pytest.raises(ValueError, match="cannot be committed"):
            guide.commit(10)
        guide.commit(count)
        done += count
        assert guide.room == len(right) - done and not guide.is_over
    walk = guide.walk([*right[done:], 1], [True] * 99, never, BOUND)
    assert walk.tokens == right[done:] and walk.end == len(right) - done


def test_where_the_room_is_short_the_path_takes_the_way_that_fits() -> None:
    long = {"type": "object", "properties": {"why": {"type": "string", "minLength": 60}}, "required": ["why"]}
    grammar = compiled("schema", {"anyOf": [long, {"type": "null"}]})
    start = nano().id("{")
    assert start is not None and grammar.shortest() < 10
    guide = grammar.start(10)
    for _ in range(2):
        walk = guide.walk([start] * 10, [True] * 10, never, BOUND)
        assert nano().decode(walk.tokens) == "null" and walk.end == len(walk.tokens)
        assert walk.forced == list(range(len(walk.tokens)))
    assert grammar.start(200).walk([start], [True], never, BOUND).tokens == [start]
    with pytest.raises(
        CapacityError, match=f"at least {grammar.shortest()} tokens and has room for 1; raise max_tokens"
    ):
        grammar.start(1)


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
        ("schema", {"type": "string", "format": "email"}, 6),
        ("schema", {"type": "string", "format": "date-time"}, 25),
        ("schema", {"type": "string", "format": "uri"}, 6),
        ("schema", {"type": "array", "items": {"enum": ["a long one", 1]}, "minItems": 3}, 9),
        ("schema", {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}, 2),
        ("schema", True, 1),
        ("schema", '{"title": "T", "$schema": "urn:x", "$id": "urn:y", "type": "null", "examples": [1]}', 4),
        ("grammar", 'start: "(" start ")" | "x"', 1),
    ],
)
def test_a_short_text_is_found(kind: str, value: Any, text: int) -> None:
    assert compiled(kind, value).shortest() <= text


# ---- requests that cannot be ----------------------------------------------------------------------------------------


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        found = {"items": found}
    return found


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
        ("schema", {"properties": {"a/b": {"not": {}}}}, "'not' at /properties/a~1b/not is not supported"),
        ("schema", {"items": {"uniqueItems": True}}, "'uniqueItems' at /items/uniqueItems"),
        ("schema", {"x-guidance": {"lenient": True}}, "'x-guidance' at /x-guidance"),
        ("schema", {"anyOf": [{"type": "null"}, {"minimun": 1}]}, "'minimun' at /anyOf/1/minimun"),
        ("schema", {"format": "ssn"}, "format 'ssn' at /format is not supported; choose from date"),
        ("schema", {"format": ["date"]}, "is not supported; choose from date"),
        ("schema", {"$ref": "https://example.org/s.json"}, "not within the schema"),
        ("schema", {"$ref": "#/$defs/none"}, "none"),
        ("schema", {"$ref": "#"}, "no text of at most 8192 tokens"),
        ("schema", {"properties": 3}, "properties at /properties is an object of schemas, not 3"),
        ("schema", {"anyOf": {}}, "anyOf at /anyOf is a list of schemas"),
        ("schema", {"items": "x"}, "at /items stands 'x'"),
        ("schema", {"type": "strin"}, "strin"),
        ("schema", {"type": "integer", "minimum": 5, "maximum": 3}, "minimum \\(5\\) is greater than maximum \\(3\\)"),
        ("schema", {"type": "string", "minLength": 5, "maxLength": 3}, "greater than maxLength"),
        ("schema", {"type": "array", "minItems": 5, "maxItems": 3}, "greater than maxItems"),
        ("schema", {"type": "integer", "minimum": 1, "maximum": 6, "multipleOf": 7}, "multiple of 7"),
        ("schema", {"items": {"exclusiveMinimum": 4, "maximum": 4.5}}, "exclusiveMinimum 4 at /items/exclusiveMinimum"),
        ("schema", {"enum": []}, "empty"),
        ("schema", {"type": "object", "required": ["a"], "additionalProperties": False}, "required property 'a'"),
        ("schema", {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "use anyOf"),
        ("schema", {"type": "string", "pattern": "(a"}, "unclosed group"),
        ("schema", {"type": "array", "minItems": 1_000_000}, "no text of at most 8192 tokens"),
        ("regex", "(a", "unclosed group"),
        ("regex", "(?=a)b", "look-ahead"),
        ("regex", r"[^\s\S]", "no text of at most 8192 tokens"),
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
        with pytest.raises(InputError, match=r"pip install 'sfumato\[constrain\]'"):
            Grammar.compile(kind, value, fresh, fresh.vocab_size, [1])


def test_many_choices_are_quick_enough() -> None:
    rng = random.Random(0)
    choices = ["".join(rng.choices(string.ascii_letters + " ", k=90)) for _ in range(MAX_CHOICES)]
    grammar = compiled("choices", choices)
    tokens, _ = written(grammar.start(200), Fake(rng, nano()), 200)
    assert nano().decode(tokens) in choices
