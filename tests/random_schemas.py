"""Schemas and regular expressions at random, and whether a text obeys one, for tests of constraints."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import jsonschema


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
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
            lambda: {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(2, 3))]},
        ]
    return rng.choice(makers)()


def integer(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    schema = {"type": "integer", "minimum": low, "maximum": low + rng.randint(3, 3000)}
    return schema | ({"multipleOf": 3} if rng.random() < 0.3 else {})


def number(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-50, 50) / 4
    return {"type": "number", "exclusiveMinimum": low, "maximum": low + rng.randint(4, 40) / 4}


def text(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.4:
        return {"type": "string", "pattern": f"^{random_regex(rng, 1)}$"}
    low = rng.randint(0, 6)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 30)}


def array(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(0, 2)
    return {
        "type": "array",
        "items": random_schema(rng, depth - 1),
        "minItems": low,
        "maxItems": low + rng.randint(0, 3),
    }


def object_(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["name", "größe", "n", "list of it", "名", 'quo"te', "value"], rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def random_regex(rng: random.Random, depth: int = 2) -> str:
    parts = []
    for _ in range(rng.randint(1, 4)):
        if depth and rng.random() < 0.3:
            part = "(" + "|".join(random_regex(rng, depth - 1) for _ in range(rng.randint(1, 3))) + ")"
        else:
            part = rng.choice(["[a-z]", "[0-9]", "[A-Zé-ü]", "x", "-", "foo", '[^a-m"\\\\\\x00-\\x1f]', "ß", "[,;]"])
            part = f"(?:{part})" if part == "foo" else part
        low = rng.randint(0, 2)
        parts.append(
            part + rng.choice(["", "", "?", "+" if depth == 0 else "", f"{{{low},{low + rng.randint(1, 6)}}}"])
        )
    return "".join(parts)


def valid(value: Any, text: str) -> bool:
    """Whether a text matches a regular expression, or is JSON that obeys a schema (else an error)."""
    if isinstance(value, str):
        return re.fullmatch(value, text) is not None
    jsonschema.validate(json.loads(text), value)
    return True


def generated(count: int, seed: int) -> list[Any]:
    """So many different schemas (dicts) and regular expressions (texts)."""
    rng = random.Random(seed)
    values: dict[str, Any] = {}
    while len(values) < count:
        value = random_schema(rng) if rng.random() < 0.7 else random_regex(rng, 1)
        values[json.dumps(value)] = value
    return list(values.values())
