"""What a tool's schema declares of an argument: its types, and those of what it holds.

It serves to read what a model wrote, so a schema that says nothing, or nonsense, allows everything. What the grammar of
calls guarantees is another matter (`constraints`). Branches (`anyOf`, `oneOf`, `allOf`) and references within the
schema are followed; a key is looked up in all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_MOST = 64
"""Branches and references that are followed from one place: what is beyond says nothing."""
_TYPES = frozenset(["null", "boolean", "integer", "number", "string", "array", "object"])


@dataclass(frozen=True)
class Declared:
    """The schemas of which one value may follow any, and the root that their references start from.

    None at all: nothing is known."""

    schemas: tuple[Mapping[str, Any], ...] = ()
    root: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def by_tool(cls, tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Declared]:
        """What each tool, as OpenAI's API has it, declares of its arguments, by its name."""
        declared = {}
        for tool in tools or ():
            function = _record(tool).get("function", tool)
            name = _record(function).get("name")
            if isinstance(name, str):
                root = _record(_record(function).get("parameters"))
                declared[name] = cls((root,), root)
        return declared

    @functools.cached_property
    def types(self) -> frozenset[str] | None:
        """The types that are allowed; None where any is."""
        budget = [_MOST]
        types = [_types(schema, self.root, budget) for schema in self.schemas]
        return None if not types or None in types else frozenset[str]().union(*filter(None, types))

    @functools.cached_property
    def names(self) -> dict[str, None]:
        """The keys that are declared of a record, in their order."""
        return dict.fromkeys(name for schema in self._branches for name in _record(schema.get("properties")))

    def property(self, key: str) -> Declared:
        """What is declared of the value behind a key."""
        inner = [_record(schema.get("properties")).get(key) for schema in self._branches]
        if not any(isinstance(one, Mapping) for one in inner):
            inner = [schema.get("additionalProperties") for schema in self._branches]
        return self._at(inner)

    def item(self, index: int) -> Declared:
        """What is declared of an item of a list."""
        inner = []
        for schema in self._branches:
            first, rest = schema.get("prefixItems"), schema.get("items")
            if isinstance(rest, list):  # drafts before 2020
                first, rest = rest, schema.get("additionalItems")
            inner.append(first[index] if isinstance(first, list) and index < len(first) else rest)
        return self._at(inner)

    def _at(self, schemas: list[Any]) -> Declared:
        return Declared(tuple(schema for schema in schemas if isinstance(schema, Mapping)), self.root)

    @functools.cached_property
    def _branches(self) -> list[Mapping[str, Any]]:
        """The schemas, and those of their branches and references; each once, `_MOST` at most."""
        waiting: list[Any] = [*reversed(self.schemas)]
        branches: dict[int, Mapping[str, Any]] = {}
        while waiting and len(branches) < _MOST:
            schema = waiting.pop()
            if isinstance(schema, Mapping) and id(schema) not in branches:
                branches[id(schema)] = schema
                inner = [branch for word in ("anyOf", "oneOf", "allOf") for branch in _list(schema.get(word))]
                waiting += reversed([_referenced(schema.get("$ref"), self.root), *inner])
        return list(branches.values())


def _types(schema: Any, root: Mapping[str, Any], budget: list[int]) -> set[str] | None:
    """The types that a schema allows, None where any is. `budget` is how many schemas may still be asked."""
    budget[0] -= 1
    if not isinstance(schema, Mapping) or budget[0] < 0:
        return None
    together = [_types_of(schema), _types(_referenced(schema.get("$ref"), root), root, budget)]
    together += [_types(branch, root, budget) for branch in _list(schema.get("allOf"))[:_MOST]]
    for word in ("anyOf", "oneOf"):
        branches = [_types(branch, root, budget) for branch in _list(schema.get(word))[:_MOST]]
        if branches and None not in branches:
            together.append(set[str]().union(*filter(None, branches)))
    known = [types for types in together if types is not None]
    if not known:
        return None
    return known[0].intersection(*known[1:]) | ({"null"} if schema.get("nullable") is True else set())


def _referenced(pointer: Any, root: Mapping[str, Any]) -> Any:
    """What a reference within the root leads to, or None."""
    if not isinstance(pointer, str) or not pointer.startswith("#"):
        return None
    node: Any = root
    for step in pointer.split("/")[1:_MOST]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list):
            node = node[int(step)] if step.isdecimal() and len(step) < 6 and int(step) < len(node) else None
        else:
            node = _record(node).get(step)
    return node


def _types_of(schema: Mapping[str, Any]) -> set[str] | None:
    """The types that one schema allows by itself; None where it does not say."""
    declared = schema.get("type")
    types = {
        one.lower() for one in (declared if isinstance(declared, list) else [declared]) if isinstance(one, str)
    } & _TYPES
    if not types:
        constants = [schema["const"]] if "const" in schema else _list(schema.get("enum"))
        types = {_type_of(value) for value in constants}
    if not types and "properties" in schema:
        types = {"object"}
    if not types and ("items" in schema or "prefixItems" in schema):
        types = {"array"}
    return types | {"integer"} if "number" in types else types or None


def _type_of(value: Any) -> str:
    """The type of a constant."""
    kinds: list[tuple[type, str]] = [(bool, "boolean"), (int, "integer"), (float, "number"), (str, "string")]
    kinds += [(list, "array"), (dict, "object")]
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")


def _record(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
