"""In-line editing: a small document, an instruction or one defect, and the same document with that edit alone.

Documents are JSON, CSV, INI, Markdown and Python literals over a few words and numbers. An answer is right if it is the
edited document to the byte. An item is JSON: what is done, the instruction, the document, the edited document.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from sfumato.errors import InputError

KEYS = tuple("name size color price city count team level score type owner state".split())
WORDS = tuple("oak elm ash fir yew red blue green gold grey rome oslo bern lima cairo ann bob eve kim leo".split())
TITLES = tuple("main server shop user data trees".split())
MOST = 99
"""The largest number of a document."""

T = TypeVar("T")
Cell = str | int
Cells = dict[str, Cell]


@dataclass(frozen=True)
class KeyedRows:
    """What a document says: rows of the same keys, under a title. JSON, INI and Python literals have one row."""

    title: str
    rows: tuple[Cells, ...]

    @property
    def keys(self) -> list[str]:
        """The keys, in order."""
        return [*self.rows[0]]


@dataclass(frozen=True)
class DocumentEdit:
    """An item, taken apart."""

    kind: str
    instruction: str
    text: str
    edited: str

    def item(self) -> str:
        """The item as one line of JSON."""
        return json.dumps([self.kind, self.instruction, self.text, self.edited], separators=(",", ":"))


@functools.lru_cache(4096)
def read(item: str) -> DocumentEdit:
    """The parts of an item; InputError for a text that is none."""
    try:
        kind, instruction, text, edited = json.loads(item)
        if not all(isinstance(one, str) for one in (kind, instruction, text, edited)):
            raise ValueError("it is not four texts")
    except (ValueError, TypeError) as error:
        raise InputError(f"{item[:60]!r} is no item of edits; take one that `generate` made") from error
    return DocumentEdit(kind, instruction, text, edited)


def generate(rng: np.random.Generator) -> str:
    """A random document with something to do, each kind alike."""
    while True:
        kind = _one(rng, [*KINDS])
        edit = KINDS[kind](rng)
        if edit is not None and edit.text != edit.edited:
            return edit.item()


def prompt(item: str) -> str:
    """The user's message for an item: as `LLM.edit` writes it."""
    edit = read(item)
    return f"{edit.instruction}\n\n{edit.text}"


def answer(item: str) -> str:
    """The edited document."""
    return read(item).edited


def document(item: str) -> str:
    """The document before the edit."""
    return read(item).text


def is_right(text: str, item: str) -> bool:
    """Is this the edited document, to the byte? Never raises for an item of `generate`."""
    return text == read(item).edited


def is_untouched(text: str, item: str) -> bool:
    """Does all that the edit leaves as it is, before and behind, stand unchanged?"""
    edit = read(item)
    before = _common(edit.text, edit.edited)
    behind = _common(edit.text[before:][::-1], edit.edited[before:][::-1])
    is_long = len(text) >= before + behind
    return is_long and text.startswith(edit.text[:before]) and text.endswith(edit.text[len(edit.text) - behind :])


def _common(one: str, other: str) -> int:
    """Characters at the beginning of both."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


# ---- documents -------------------------------------------------------------------------------------------------------


def _as_json(own: KeyedRows) -> str:
    return json.dumps(own.rows[0])


def _as_python(own: KeyedRows) -> str:
    return repr(own.rows[0])


def _as_ini(own: KeyedRows) -> str:
    return "\n".join([f"[{own.title}]", *(f"{key}={value}" for key, value in own.rows[0].items())])


def _as_csv(own: KeyedRows) -> str:
    return "\n".join([",".join(own.keys), *(",".join(map(str, row.values())) for row in own.rows)])


def _as_markdown(own: KeyedRows) -> str:
    return "\n".join([f"# {own.title}", *(f"- {key}: {value}" for key, value in own.rows[0].items())])


WRITERS: Mapping[str, Callable[[KeyedRows], str]] = {
    "JSON": _as_json,
    "Python": _as_python,
    "INI": _as_ini,
    "CSV": _as_csv,
    "Markdown": _as_markdown,
}
"""Format -> how a document is written in it."""


def _one(rng: np.random.Generator, values: Sequence[T]) -> T:
    return values[int(rng.integers(len(values)))]


def _some(rng: np.random.Generator, values: Sequence[T], count: int) -> list[T]:
    return [values[int(place)] for place in rng.permutation(len(values))[:count]]


def _value(rng: np.random.Generator) -> Cell:
    return _one(rng, WORDS) if rng.random() < 0.5 else int(rng.integers(MOST + 1))


def _record(rng: np.random.Generator, keys: Sequence[str]) -> Cells:
    return {key: _value(rng) for key in keys}


def _random_document(rng: np.random.Generator, form: str) -> KeyedRows:
    if form != "CSV":
        return KeyedRows(_one(rng, TITLES), (_record(rng, _some(rng, KEYS, int(rng.integers(2, 5)))),))
    keys = _some(rng, KEYS, 2)
    first = _some(rng, WORDS, int(rng.integers(2, 5)))
    return KeyedRows("", tuple({keys[0]: word, keys[1]: int(rng.integers(MOST + 1))} for word in first))


# ---- kinds -----------------------------------------------------------------------------------------------------------


def _rename(rng: np.random.Generator) -> DocumentEdit:
    form = _one(rng, [*WRITERS])
    own, write = _random_document(rng, form), WRITERS[form]
    old = _one(rng, own.keys)
    new = _one(rng, [key for key in KEYS if key not in own.keys])
    rows = tuple({new if key == old else key: value for key, value in row.items()} for row in own.rows)
    return DocumentEdit("rename", f"Rename {old} to {new}.", write(own), write(replace(own, rows=rows)))


def _change(rng: np.random.Generator) -> DocumentEdit:
    form = _one(rng, [*WRITERS])
    own, write = _random_document(rng, form), WRITERS[form]
    if form == "CSV":
        place, (first, second) = int(rng.integers(len(own.rows))), own.keys
        new: Cell = int(rng.integers(MOST + 1))
        what, key = f"{second} of {own.rows[place][first]}", second
    else:
        place, key, new = 0, _one(rng, own.keys), _value(rng)
        what = key
    rows = tuple(row | {key: new} if number == place else row for number, row in enumerate(own.rows))
    return DocumentEdit("change", f"Set {what} to {new}.", write(own), write(replace(own, rows=rows)))


def _sort(rng: np.random.Generator) -> DocumentEdit:
    form = _one(rng, ["Python", "JSON", "Markdown", "CSV"])
    count = int(rng.integers(3, 6))
    if form == "CSV":
        keys, words = _some(rng, KEYS, 2), _some(rng, WORDS, min(count, 4))
        rows = tuple(zip(words, _some(rng, range(MOST + 1), len(words)), strict=True))

        def table(rows: Sequence[tuple[str, int]]) -> str:
            return "\n".join([",".join(keys), *(f"{word},{number}" for word, number in rows)])

        return DocumentEdit("sort", f"Sort by {keys[1]}.", table(rows), table(sorted(rows, key=lambda row: row[1])))
    values: list[Cell] = [*_some(rng, range(MOST + 1), count)] if rng.random() < 0.5 else [*_some(rng, WORDS, count)]
    write: Callable[[list[Cell]], str] = {"Python": repr, "JSON": json.dumps}.get(form, _bullets)
    return DocumentEdit("sort", "Sort the list.", write(values), write(sorted(values)))


def _bullets(values: list[Cell]) -> str:
    return "\n".join(f"- {value}" for value in values)


def _repair(rng: np.random.Generator) -> DocumentEdit | None:
    """One character of the notation is gone, where the rest says which."""
    form = _one(rng, ["JSON", "Python", "INI", "CSV", "Markdown"])
    own, write = _random_document(rng, form), WRITERS[form]
    text = write(own)
    signs = {"JSON": '{}":,', "Python": "{}':,", "INI": "[]=", "CSV": ",", "Markdown": ":-#"}[form]
    places = [place for place, sign in enumerate(text) if sign in signs]
    place = _one(rng, places)
    return DocumentEdit("repair", "Fix the syntax.", text[:place] + text[place + 1 :], text)


def _complete(rng: np.random.Generator) -> DocumentEdit:
    """A cell of a table is empty, and its column goes up by even steps."""
    keys = _some(rng, KEYS, 2)
    step, start = int(rng.integers(1, 10)), int(rng.integers(40))
    words, numbers = _some(rng, WORDS, 4), [start + step * row for row in range(4)]
    place = int(rng.integers(4))
    head = ",".join(keys)
    full = [f"{word},{number}" for word, number in zip(words, numbers, strict=True)]
    gap = [f"{words[place]}," if row == place else line for row, line in enumerate(full)]
    return DocumentEdit("complete", "Fill the empty cell.", "\n".join([head, *gap]), "\n".join([head, *full]))


KINDS: Mapping[str, Callable[[np.random.Generator], DocumentEdit | None]] = {
    "rename": _rename,
    "change": _change,
    "sort": _sort,
    "repair": _repair,
    "complete": _complete,
}
"""What is done -> how an item of it is made."""
