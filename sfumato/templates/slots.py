"""Templates as their callers write them: pieces of fixed text, and slots to be written. Nothing here imports torch."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from sfumato.errors import InputError
from sfumato.options import CONSTRAINTS, constraint_of

SLOTS = 1024
"""Most slots of a template."""

PIECES = 4096
"""Most pieces of a template, texts and slots."""

OPEN = 64
"""Most slots of a template without a length: each takes a search of its own."""


@dataclass(frozen=True)
class Slot:
    """A place to be written. At most one of `schema`, `regex`, `grammar`, `choices` says what it must obey."""

    name: str = ""
    """Under which its text comes back; "" : its number among the slots, from 1."""
    length: int | None = None
    """Exactly so many tokens; None: the length is searched for."""
    at_most: int | None = None
    """Bound on a length that is searched for; None: 64 tokens, or about twice what a constraint needs at least."""
    text: str | None = None
    """The text that stands there now: the canvas starts from it, and its tokens are the slot's length."""
    strength: float = 0.5
    """The share of `text` that is noise at first: 0 starts from all of it, 1 from none."""
    schema: dict[str, Any] | bool | None = None
    regex: str | None = None
    grammar: str | None = None
    choices: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("length", "at_most"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(
                    f"{name} of slot {self._label} is {reprlib.repr(value)}; give a whole number of tokens from 1 up"
                )
        if self.length is not None and self.at_most is not None:
            raise InputError(f"slot {self._label} has a length and at_most; give one of them")
        if not isinstance(self.name, str) or not isinstance(self.text, str | None):
            raise InputError(f"name and text of slot {self._label} must be text")
        if self.text == "":
            raise InputError(f"the text of slot {self._label} is empty; leave it out, and give a length if it has one")
        if (
            isinstance(self.strength, bool)
            or not isinstance(self.strength, (int, float))
            or not 0 <= self.strength <= 1
        ):
            raise InputError(
                f"strength of slot {self._label} is {reprlib.repr(self.strength)}; give a number from 0 to 1"
            )
        constraints = [kind for kind in CONSTRAINTS if getattr(self, kind) is not None]
        for kind in constraints:
            value = constraint_of(kind, getattr(self, kind), f"{kind} of slot {self._label}")
            object.__setattr__(self, kind, value)
        if len(constraints) > 1:
            raise InputError(f"slot {self._label} has {' and '.join(constraints)}; a slot can obey one of them")
        if constraints and (self.length is not None or self.text is not None):
            raise InputError(
                f"slot {self._label} has {constraints[0]} and a length or text; bound its length with at_most"
            )

    @property
    def _label(self) -> str:
        return reprlib.repr(self.name)

    @property
    def constraint(self) -> tuple[str, Any] | None:
        """What its text obeys: the name of that field and its value."""
        return next(((kind, value) for kind in CONSTRAINTS if (value := getattr(self, kind)) is not None), None)

    @property
    def is_open(self) -> bool:
        """Whether its length has to be searched for."""
        return self.length is None and self.text is None and self.constraint is None


Template = Sequence[str | Slot | Mapping[str, Any]]
"""Fixed texts, and slots: each a `Slot`, or a record with some of its fields."""


def read_template(text: str) -> list[str | Slot]:
    """A template from JSON: a list of strings and of objects, each a slot with the fields of `Slot`."""
    try:
        pieces = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the template is not JSON: {error}") from None
    return pieces_of(pieces)


def pieces_of(pieces: Any) -> list[str | Slot]:
    """A template from plain data."""
    if not isinstance(pieces, list):
        raise InputError('a template is a list of texts and slots, such as ["Name: ", {"name": "name"}]')
    _check_count(len(pieces), PIECES, "pieces", "join texts that stand side by side")
    template: list[str | Slot] = []
    for number, piece in enumerate(pieces, 1):
        if isinstance(piece, dict):
            template.append(slot_of(piece, number))
        elif isinstance(piece, str):
            template.append(piece)
        else:
            raise InputError(
                f"piece {number} of the template is {reprlib.repr(piece)}; give a text or a slot (an object)"
            )
    return template


def slot_of(record: Mapping[str, Any], number: int) -> Slot:
    """The slot that a record stands for, which is so many pieces into its template; InputError for an unknown field."""
    known = {f.name for f in fields(Slot)}
    if unknown := [key for key in record if key not in known]:
        names = ", ".join(sorted(known))
        raise InputError(f"piece {number} of the template has {reprlib.repr(unknown[0])}; a slot has {names}")
    return Slot(**record)


def check_template(template: Template) -> list[str | Slot]:
    """The template with its slots named and empty texts dropped.

    InputError where it has no slot, too many, or a name twice."""
    if not isinstance(template, (list, tuple)):
        raise InputError(f"the template is {reprlib.repr(template)}; give a list of texts and slots")
    _check_count(len(template), PIECES, "pieces", "join texts that stand side by side")
    pieces: list[str | Slot] = []
    names: set[str] = set()
    for number, piece in enumerate(template, 1):
        if not isinstance(piece, Slot | str) and isinstance(piece, Mapping):
            piece = slot_of(piece, number)
        if isinstance(piece, Slot):
            named = piece if piece.name else replace(piece, name=str(len(names) + 1))
            if named.name in names:
                raise InputError(f"two slots are named {reprlib.repr(named.name)}; give each its own name")
            names.add(named.name)
            pieces.append(named)
        elif not isinstance(piece, str):
            raise InputError(f"piece {number} of the template is {reprlib.repr(piece)}; give a text or a slot")
        elif piece:
            pieces.append(piece)
    if not names:
        raise InputError("the template has no slot, so there is nothing to write; give at least one")
    _check_count(len(names), SLOTS, "slots", "fill it in parts")
    count = sum(isinstance(piece, Slot) and piece.is_open for piece in pieces)
    _check_count(count, OPEN, "slots without a length", "give the others a length")
    return pieces


def _check_count(count: int, most: int, what: str, remedy: str) -> None:
    if count > most:
        raise InputError(f"the template has {count} {what}, more than the {most} allowed; {remedy}")


def span_template(text: str, spans: Sequence[tuple[int, int]], strength: float) -> list[str | Slot]:
    """A text with the spans (from character, to character) as warm slots. InputError where they do not fit."""
    check_spans(spans)
    pieces: list[str | Slot] = []
    end = 0
    for number, (start, stop) in enumerate(sorted(spans), 1):
        if not 0 <= start < stop <= len(text):
            raise InputError(f"the span {start}–{stop} is not in the text of {len(text)} characters, or is empty")
        if start < end:
            raise InputError(f"the span {start}–{stop} overlaps the one before, which ends at {end}; join them")
        pieces += [text[end:start], Slot(str(number), text=text[start:stop], strength=strength)]
        end = stop
    return check_template([*pieces, text[end:]])


def check_spans(spans: Any) -> None:
    """InputError where these are no pairs of characters' numbers, or too many."""
    if not isinstance(spans, (list, tuple)):
        raise InputError(f"the spans are {reprlib.repr(spans)}; give a list of pairs of characters' numbers")
    if len(spans) > SLOTS:
        raise InputError(f"there are {len(spans)} spans, more than the {SLOTS} allowed; edit the text in parts")
    for span in spans:
        if not isinstance(span, (list, tuple)) or len(span) != 2 or {*map(type, span)} != {int}:
            raise InputError(f"the span {reprlib.repr(span)} is not two whole numbers, from character, to character")
