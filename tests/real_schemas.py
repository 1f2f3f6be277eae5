"""Schemas as people write them, of our own wording, for tests of constraints.

The kinds are those of the world: tools of agents, bodies of web services, what classes are turned into, settings of
programs. Keywords come about as often as in public collections: annotations and vendors' words in most, formats that
say nothing, sets, unions with and without a label, references in circles, conditions, keys by pattern.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

_WORDS = "name path title owner count status region label token branch image notes email colour limit offset".split()
_FORMATS = "url path password binary uuid date-time date email uri uuid4 byte hostname ipv4 duration markdown".split()
_PATTERNS = [
    *(r"^[a-z][a-z0-9-]*$", r"^\d{4}-\d{2}$", r"^v?\d+\.\d+\.\d+$", r"^[A-Z]{2,5}$", r"^\S+$"),
    *(r"^(?!-)[a-z0-9-]{1,20}$", r"\.(json|ya?ml)$", r"^#[0-9a-fA-F]{6}$", r"^https?://"),
    *(r"^[^\\/:*?\"<>|]+$", r"^arn:aws:[a-z]+:"),
]


def real_schemas(count: int = 300, seed: int = 0) -> list[Schema]:
    """So many schemas, the same for each seed."""
    rng = random.Random(seed)
    kinds = [_tool, _service, _class, _strict, _settings, _labelled, _circular, _conditional, _manifest, _extended]
    return [kinds[number % len(kinds)](rng) for number in range(count)]


def _words(rng: random.Random, count: int) -> list[str]:
    return rng.sample(_WORDS, count)


def _chance(rng: random.Random, share: float, schema: Schema) -> Schema:
    return schema if rng.random() < share else {}


def _text(rng: random.Random) -> Schema:
    schema: Schema = {"type": "string"}
    schema |= _chance(rng, 0.5, {"description": rng.choice(["The name.", "Where it lies, `a/b`", 'e.g. "x" or {y}'])})
    pick = rng.random()
    if pick < 0.2:
        return schema | {"enum": rng.sample(["draft", "open", "closed", "on hold", "N/A", "größer", 'say "x"'], 3)}
    if pick < 0.4:
        return schema | {"format": rng.choice(_FORMATS)}
    if pick < 0.55:
        return schema | {"pattern": rng.choice(_PATTERNS)}
    if pick < 0.7:
        return schema | {"minLength": rng.choice([1, 2.0, 3]), "maxLength": rng.choice([8, 40, 255, 5000])}
    return schema | _chance(rng, 0.2, {"default": "main"}) | _chance(rng, 0.1, {"nullable": False})


def _number(rng: random.Random) -> Schema:
    kind = rng.choice(["integer", "integer", "number"])
    schema: Schema = {"type": kind} | _chance(rng, 0.3, {"format": "int32" if kind == "integer" else "double"})
    pick = rng.random()
    if pick < 0.3:
        return schema | {"minimum": 0} | _chance(rng, 0.5, {"maximum": rng.choice([1, 100, 65535, 2**40])})
    if pick < 0.4:
        return schema | {"exclusiveMinimum": 0}
    if pick < 0.5:
        return schema | {"multipleOf": rng.choice([5, 0.5, 0.01] if kind == "number" else [5, 10])}
    return schema | _chance(rng, 0.2, {"default": 3})


def _list(rng: random.Random, depth: int) -> Schema:
    items = rng.choice([_text(rng), _number(rng), _value(rng, depth - 1)])
    schema: Schema = {"type": "array", "items": items}
    schema |= _chance(rng, 0.35, {"uniqueItems": rng.random() < 0.7})
    return schema | _chance(rng, 0.3, {"minItems": 1}) | _chance(rng, 0.2, {"maxItems": 5})


def _map(rng: random.Random, depth: int) -> Schema:
    schema: Schema = {"type": "object", "additionalProperties": _value(rng, depth - 1)}
    return (
        schema
        | _chance(rng, 0.2, {"propertyNames": {"pattern": "^[a-zA-Z_]+$"}})
        | _chance(rng, 0.2, {"minProperties": rng.choice([1, 2])})
        | _chance(rng, 0.1, {"maxProperties": 4})
    )


def _value(rng: random.Random, depth: int) -> Schema:
    makers: list[Callable[[], Schema]] = [
        lambda: _text(rng),
        lambda: _text(rng),
        lambda: _number(rng),
        lambda: {"type": "boolean"} | _chance(rng, 0.5, {"default": False}),
        lambda: {"anyOf": [_text(rng), {"type": "null"}], "default": None},
        lambda: {"type": ["string", "null"]},
        lambda: {"const": rng.choice(["v1", 3, True])},
    ]
    if depth:
        makers += [
            lambda: _list(rng, depth),
            lambda: _list(rng, depth),
            lambda: _record(rng, depth),
            lambda: _map(rng, depth),
            lambda: {"oneOf": [_text(rng), _list(rng, depth)]},
            lambda: {"type": "array", "prefixItems": [{"type": "number"}, {"type": "number"}], "items": False},
        ]
    return rng.choice(makers)()


def _record(rng: random.Random, depth: int = 2, most: int = 5) -> Schema:
    names = _words(rng, rng.randint(1, most))
    schema: Schema = {"type": "object", "properties": {name: _value(rng, depth - 1) for name in names}}
    schema["required"] = [name for name in names if rng.random() < 0.5]
    if not schema["required"] and rng.random() < 0.8:
        del schema["required"]
    return schema | _chance(rng, 0.6, {"additionalProperties": False})


def _tool(rng: random.Random) -> Schema:
    schema = _record(rng, 2)
    schema["$schema"] = "http://json-schema.org/draft-07/schema#"
    for inner in schema["properties"].values():
        inner |= _chance(rng, 0.4, {"description": "What it is for.", "x-order": 1, "examples": ["a"]})
    return schema | _chance(rng, 0.3, {"title": "search_files_arguments"})


def _service(rng: random.Random) -> Schema:
    other = _record(rng, 1)
    schema = _record(rng, 2)
    schema["properties"] |= {"links": {"type": "array", "items": {"$ref": "#/components/schemas/Link"}}}
    schema["properties"]["parent"] = {"$ref": "#/components/schemas/Link", "description": "Above it.", "nullable": True}
    schema["components"] = {"schemas": {"Link": other | {"xml": {"name": "link"}, "externalDocs": {"url": "x"}}}}
    if rng.random() < 0.4:
        extra = {"type": "object", "properties": {"id": {"type": "integer", "format": "int64", "readOnly": True}}}
        return {"allOf": [{"$ref": "#/base"}, extra], "base": schema | {"additionalProperties": True},
                "components": schema["components"]}  # fmt: skip
    return schema


def _class(rng: random.Random) -> Schema:
    inner = _record(rng, 1)
    schema = _record(rng, 2)
    schema["title"] = "Order"
    for name, value in schema["properties"].items():
        value["title"] = name.title()
    schema["properties"]["lines"] = {"items": {"$ref": "#/$defs/Line"}, "title": "Lines", "type": "array"}
    schema["properties"]["price"] = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^\d*\.?\d*$"}]}
    schema["properties"]["labels"] = {"items": {"type": "string"}, "type": "array", "uniqueItems": True}
    return schema | {"$defs": {"Line": inner | {"title": "Line"}}}


def _strict(rng: random.Random) -> Schema:
    def closed(depth: int) -> Schema:
        names = _words(rng, rng.randint(2, 4))
        leaves: list[Schema] = [{"type": "string"}, {"type": ["number", "null"]}, {"type": "boolean"}]
        leaves += [{"type": "string", "enum": ["low", "high"]}, {"type": "array", "items": {"type": "string"}}]
        properties = {name: closed(depth - 1) if depth and rng.random() < 0.4 else rng.choice(leaves) for name in names}
        return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}

    return closed(2)


def _settings(rng: random.Random) -> Schema:
    name: Schema = {"$ref": "#/definitions/id"}
    text: Schema = {"type": "string"}
    job: Schema = {
        "type": "object",
        "properties": {
            "runs-on": {"oneOf": [text, {"type": "array", "items": text, "minItems": 1}]},
            "needs": {"anyOf": [name, {"type": "array", "items": name}]},
            "timeout-minutes": {"type": "number", "minimum": 0, "markdownDescription": "**Minutes**"},
            "env": {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}},
            "steps": {"type": "array", "minItems": 1, "items": _record(rng, 1)},
        },
        "required": ["runs-on"],
        "additionalProperties": False,
    }
    events = {"type": "string", "enum": ["push", "pull_request", "schedule", "release"]}
    return {
        "$schema": "http://json-schema.org/draft-07/schema",
        "$id": "https://settings.example/workflow.json",
        "definitions": {"id": {"type": "string", "pattern": "^[_a-zA-Z][a-zA-Z0-9_-]*$"}, "job": job},
        "type": "object",
        "properties": {
            "on": {"oneOf": [events, {"type": "array", "items": events, "uniqueItems": True, "minItems": 1}]},
            "jobs": {
                "type": "object",
                "patternProperties": {"^[_a-zA-Z][a-zA-Z0-9_-]*$": {"$ref": "#/definitions/job"}},
                "additionalProperties": False,
                "minProperties": 1,
            },
        },
        "required": ["on", "jobs"],
        "additionalProperties": rng.random() < 0.3,
    }


def _labelled(rng: random.Random) -> Schema:
    names = rng.sample(["circle", "square", "path", "group"], 3)
    word = rng.choice(["const", "enum"])
    defs = {}
    for name in names:
        record = _record(rng, 1)
        label: Schema = {"const": name} if word == "const" else {"enum": [name]}
        record["properties"]["type"] = label | _chance(rng, 0.5, {"title": "Type", "type": "string"})
        record["required"] = [*record.get("required", []), "type"] if rng.random() < 0.7 else ["type"]
        defs[name] = record
    union: Schema = {"oneOf": [{"$ref": f"#/$defs/{name}"} for name in names]}
    union |= _chance(rng, 0.5, {"discriminator": {"propertyName": "type", "mapping": {}}})
    shapes = {"type": "object", "properties": {"shape": union, "n": _number(rng)}, "required": ["shape"]}
    return rng.choice([shapes, union]) | {"$defs": defs}


def _circular(rng: random.Random) -> Schema:
    node: Schema = {
        "type": "object",
        "properties": {
            "value": _text(rng),
            "left": {"$ref": "#/$defs/node", "description": "Below it."},
            "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 3},
            "any": {"anyOf": [{"$ref": "#/$defs/node"}, _number(rng)]},
        },
        "required": ["value"],
        "additionalProperties": False,
    }
    return {"$ref": "#/$defs/node", "$defs": {"node": node}}


def _conditional(rng: random.Random) -> Schema:
    schema = _record(rng, 2)
    schema["properties"] |= {"mode": {"enum": ["fast", "slow", "off"]}, "level": {"type": "integer"}, "why": _text(rng)}
    schema["required"] = ["mode"]
    pick = rng.randrange(5)
    if pick == 0:
        schema |= {
            "if": {"properties": {"mode": {"const": "fast"}}, "required": ["mode"]},
            "then": {"required": ["level"]},
            "else": {"properties": {"level": False}},
        }
    elif pick == 1:
        schema["dependentRequired"] = {"why": ["level"]}
    elif pick == 2:
        schema["oneOf"] = [{"required": ["level"]}, {"required": ["why"]}]
    elif pick == 3:
        schema["not"] = {"required": ["level", "why"]}
    else:
        schema["properties"]["kind"] = {"type": "string", "not": {"enum": ["", "none"]}}
        schema["dependencies"] = {"level": {"properties": {"why": {"minLength": 2}}, "required": ["why"]}}
    return schema


def _manifest(rng: random.Random) -> Schema:
    text, tools = {"type": "string"}, {"enum": ["node", "bun", "deno"]}
    return {
        "type": "object",
        "title": "A package",
        "allowTrailingCommas": True,
        "properties": {
            "name": {"type": "string", "pattern": "^(?:@[a-z0-9-]+/)?[a-z0-9-]+$", "maxLength": 60, "error": ""},
            "version": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$", "defaultSnippets": [{"body": "1.0.0"}]},
            "keywords": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
            "engines": {"type": "array", "items": tools, "uniqueItems": True, "minItems": 1},
            "bin": {"anyOf": [{"type": "string"}, {"type": "object", "additionalProperties": {"type": "string"}}]},
            "scripts": {"type": "object", "propertyNames": {"minLength": 1}, "additionalProperties": text},
            "private": {"anyOf": [{"type": "boolean"}, {"enum": ["false", "true"]}]},
            "people": {"type": "array", "items": {"$ref": "#/definitions/person"}},
        },
        "patternProperties": {"^_": {"description": "Comments"}},
        "required": ["name", "version"],
        "additionalProperties": rng.random() < 0.5,
        "definitions": {"person": {"type": ["object", "string"], "required": ["name"], "properties": {
            "name": {"type": "string"}, "url": {"type": "string", "format": "uri"},
            "email": {"type": "string", "format": "email"}}}},
    }  # fmt: skip


def _extended(rng: random.Random) -> Schema:
    base = _record(rng, 1)
    base.pop("additionalProperties", None)
    own = {"type": "object", "properties": {"kind": {"const": "x"}, "size": _number(rng)}, "required": ["kind"]}
    joined: Schema = {"allOf": [{"$ref": "#/$defs/base"}, own], "$defs": {"base": base}}
    if rng.random() < 0.5:
        joined["unevaluatedProperties"] = False
    codes = {"type": "array", "contains": {"type": "integer", "minimum": 1}, "maxItems": 6}
    return {"type": "object", "properties": {"spec": joined, "codes": codes, "free": {}}, "required": ["spec"],
            "$defs": {"base": base}}  # fmt: skip
