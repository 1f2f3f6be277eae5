"""tasks/edits.py: documents of five formats, one edit each, and a check to the byte."""

from __future__ import annotations

import ast
import configparser
import csv
import json
from collections import Counter

import numpy as np
import pytest

from sfumato.errors import InputError
from sfumato.tasks import edits


@pytest.fixture(scope="module")
def items() -> list[str]:
    rng = np.random.default_rng(3)
    return [edits.generate(rng) for _ in range(1500)]


def parse(text: str) -> object:
    """The document, read by the format that it looks like; ValueError or SyntaxError where it is none."""
    if text[0] in "{[" and "\n" not in text and not text[1:].startswith(("'",)):
        try:
            return json.loads(text)
        except ValueError:
            return ast.literal_eval(text)
    if text[0] == "{" or (text[0] == "[" and "\n" not in text):
        return ast.literal_eval(text)
    if text[0] == "[":
        parser = configparser.ConfigParser()
        parser.read_string(text)
        return {name: dict(parser[name]) for name in parser.sections()}
    if text[0] in "#-":
        return text.split("\n")
    rows = list(csv.reader(text.split("\n")))
    if len({len(row) for row in rows}) != 1:
        raise ValueError("rows of different lengths")
    return rows


def test_every_kind_and_format_comes(items: list[str]) -> None:
    kinds = Counter(edits.read(item).kind for item in items)
    assert kinds.keys() == edits.KINDS.keys() and min(kinds.values()) > 200
    assert len(set(items)) > 1450


def test_edited_documents_are_valid_and_differ_by_the_edit(items: list[str]) -> None:
    for item in items:
        edit = edits.read(item)
        assert parse(edit.edited) and edit.edited != edit.text
        assert edits.is_untouched(edit.edited, item)
        assert edits.is_right(edits.answer(item), item) and not edits.is_right(edit.text, item)
        if edit.kind == "repair":
            assert len(edit.text) == len(edit.edited) - 1
        if edit.kind == "sort":
            assert Counter(edit.text) == Counter(edit.edited)


def test_a_lost_sign_has_one_place() -> None:
    """Two documents that lose a sign never become the same text: the right answer is the only one."""
    rng, sources = np.random.default_rng(5), dict[str, str]()
    for edit in (edits.read(edits.generate(rng)) for _ in range(4000)):
        if edit.kind == "repair":
            assert sources.setdefault(edit.text, edit.edited) == edit.edited
    assert len(sources) > 600


def test_what_an_edit_leaves_must_stand() -> None:
    item = edits.DocumentEdit("change", "Set size to 7.", "a,size\noak,3\nelm,4", "a,size\noak,7\nelm,4").item()
    assert edits.is_untouched("a,size\noak,99\nelm,4", item)
    assert not edits.is_untouched("a,size\noak,7\nelm,5", item)
    assert not edits.is_untouched("a,size\noak,", item)
    assert edits.prompt(item) == "Set size to 7.\n\na,size\noak,3\nelm,4" and edits.document(item).endswith("elm,4")


@pytest.mark.parametrize("text", ["", "[]", "{}", '["a","b","c"]', '["a",1,"c","d"]', "nonsense"])
def test_what_is_no_item_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="no item of edits"):
        edits.read(text)
