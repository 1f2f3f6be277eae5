"""A schema as a document: its parts by place, what a `$ref` names, and errors that say where they arose.

A place is a JSON pointer from the document's top. References are resolved within the document alone, by pointer, by
anchor, and by `$id`, which changes the base of all references below it.

Deliberately absent: whatever lies outside the document. A reference that leads there is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NoReturn
from urllib.parse import unquote, urldefrag, urljoin

from sfumato.constraints.values.equality import canonical
from sfumato.errors import InputError

_NO_SCHEMAS = ("enum", "const", "default", "example", "examples")
"""Keywords whose values hold no schemas, whatever they look like."""


@dataclass(frozen=True)
class Place:
    """A schema, or a part of one, at its place; two places are equal where their pointers are.

    `base` is the URI that references here are relative to.
    """

    pointer: str
    value: Any = field(compare=False)
    base: str = field(compare=False)
    document: Document = field(compare=False, repr=False)

    def at(self, *steps: str | int) -> Place:
        """The place that many steps further down; a step is a key or an index, which exists."""
        here = self
        for step in steps:
            value = here.value[step]
            pointer = f"{here.pointer}/{str(step).replace('~', '~0').replace('/', '~1')}"
            here = Place(pointer, value, _base_of(value, here.base, here.document), here.document)
        return here

    def places(self, word: str) -> list[Place]:
        """The schemas of a keyword whose value is a list of them."""
        values = self.value[word]
        if not isinstance(values, list) or not values:
            self.refuse(f"{word} is a list of at least one schema, not {short(values)}", word)
        return [self.at(word, number) for number in range(len(values))]

    def named_places(self, word: str) -> dict[str, Place]:
        """The schemas of a keyword whose value is an object of them."""
        values = self.value.get(word, {})
        if not isinstance(values, dict):
            self.refuse(f"{word} is an object of schemas, not {short(values)}", word)
        return {name: self.at(word, name) for name in values}

    def with_value(self, value: Any, tag: str) -> Place:
        """A schema that follows from what stands here; `tag` tells it from others that do."""
        return Place(f"{self.pointer}\0{tag}", value, self.base, self.document)

    def refuse(self, sentence: str, *steps: str | int) -> NoReturn:
        """Raise the InputError that says what is wrong here, or that many steps further down."""
        escaped = (str(step).replace("~", "~0").replace("/", "~1") for step in steps)
        pointer = "".join([self.pointer.split("\0")[0], *(f"/{step}" for step in escaped)])
        raise InputError(f"{sentence}, at {pointer[:300] or 'the top'} of {self.document.name}")


class Document:
    """One schema with all that it holds; `name` is what errors call it."""

    def __init__(self, value: Any, name: str) -> None:
        self.name = name
        draft = str(value.get("$schema")) if isinstance(value, dict) else ""
        self.is_draft_4 = "draft-04" in draft
        self.has_prefix_items = "draft-0" not in draft and "draft/2019" not in draft
        """Not before 2020 did `prefixItems` mean anything, and `items` the rest."""
        self.root = Place("", value, _base_of(value, "", self), self)
        self._resources: dict[str, Place] = {self.root.base: self.root, "": self.root}
        self._anchors: dict[tuple[str, str], Place] = {}
        self._dynamic: Counter[str] = Counter()
        self._sets: dict[str, frozenset[Hashable]] = {}
        stack = [self.root]
        while stack:
            here = stack.pop()
            if isinstance(here.value, dict):
                self._index(here)
                stack += [here.at(key) for key in here.value if key not in _NO_SCHEMAS]
            elif isinstance(here.value, list):
                stack += [here.at(number) for number in range(len(here.value))]

    def _index(self, here: Place) -> None:
        if isinstance(here.value.get(_id_word(self)), str):
            self._resources.setdefault(here.base, here)
        if here.value.get("$recursiveAnchor") is True:
            self._dynamic["$recursiveRef"] += 1
        if isinstance(name := here.value.get("$dynamicAnchor"), str):
            self._dynamic[name] += 1
        for word in ("$anchor", "$dynamicAnchor", _id_word(self)):
            name = here.value.get(word)
            if isinstance(name, str) and (word[1:2] != "i" or name.startswith("#")):
                self._anchors.setdefault((here.base, name.removeprefix("#")), here)

    def listed(self, place: Place) -> frozenset[Hashable]:
        """The values of the enum at a place, in their canonical form."""
        if place.pointer not in self._sets:
            self._sets[place.pointer] = frozenset(map(canonical, place.value["enum"]))
        return self._sets[place.pointer]

    def target(self, place: Place, word: str) -> Place:
        """What the reference at a place names; `word` is its keyword."""
        reference = place.value[word]
        if not isinstance(reference, str):
            place.refuse(f"{word} is text, not {short(reference)}", word)
        if word != "$ref" and self._dynamic[word if word == "$recursiveRef" else reference.rpartition("#")[2]] > 1:
            place.refuse(f"the {word} {short(reference)} may lead to several places; use a $ref to one of them", word)
        joined = place.base + reference if reference.startswith("#") else urljoin(place.base, reference)
        base, fragment = urldefrag(joined)
        if word == "$ref" and _id_word(self) in place.value and place.base != self.root.base:
            place.refuse("what a $ref beside an $id is relative to depends on the draft; move one of them", word)
        resource = self._resources.get(base)
        if resource is None:
            place.refuse(f"the {word} {short(reference)} is not within the schema; copy what it names into $defs", word)
        fragment = unquote(fragment)
        if fragment and not fragment.startswith("/"):
            target = self._anchors.get((resource.base, fragment))
        else:
            target = self._walk(resource, fragment)
        if target is None:
            place.refuse(f"the {word} {short(reference)} leads nowhere; give a place within the schema", word)
        return target

    @staticmethod
    def _walk(here: Place, pointer: str) -> Place | None:
        for step in pointer.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(here.value, dict) and step in here.value:
                here = here.at(step)
            elif isinstance(here.value, list) and step.isdecimal() and int(step) < len(here.value):
                here = here.at(int(step))
            else:
                return None
        return here


def _id_word(document: Document) -> str:
    return "id" if document.is_draft_4 else "$id"


def _base_of(value: Any, base: str, document: Document) -> str:
    """The base of references within a value."""
    name = value.get(_id_word(document)) if isinstance(value, dict) else None
    if not isinstance(name, str) or name.startswith("#"):
        return base
    try:
        return urldefrag(urljoin(base, name))[0]
    except ValueError:
        return base


def short(value: Any) -> str:
    """The beginning of a value, for an error."""
    return repr(value)[:80]
