"""cli/places.py: LINE:COL, spans and markers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.cli import places
from sfumato.errors import InputError

texts = st.text(st.one_of(st.sampled_from("\r\n\t \ufeffé🙂\u2028a1:-"), st.characters(exclude_categories=["Cs"])))


@settings(deadline=None)
@given(texts, texts, texts.filter(bool))
def test_a_marker_cuts_and_every_other_byte_stays(before: str, after: str, marker: str) -> None:
    whole = before + marker + after
    if whole.find(marker, whole.find(marker) + 1) >= 0:
        with pytest.raises(InputError, match="more than once"):
            places.cut(whole, None, marker, "it")
    else:
        assert places.cut(whole, None, marker, "it") == (before, after)


@settings(deadline=None)
@given(texts, st.data())
def test_a_place_cuts_and_every_byte_stays(text: str, data: st.DataObject) -> None:
    lines = text.split("\n")
    line = data.draw(st.integers(1, len(lines)))
    shown = lines[line - 1].removeprefix("\ufeff") if line == 1 else lines[line - 1]
    shown = shown.removesuffix("\r") if line < len(lines) else shown
    column = data.draw(st.integers(1, len(shown) + 1))
    before, after = places.cut(text, f"{line}:{column}", None, "it")
    assert before + after == text
    assert before.split("\n")[-1].removeprefix("\ufeff" if line == 1 else "") == shown[: column - 1]
    assert before.count("\n") == line - 1 and after.startswith(shown[column - 1 :])


@settings(deadline=None)
@given(texts, texts)
def test_a_place_is_in_the_text_or_an_error(text: str, place: str) -> None:
    for one in (place, f"{len(place)}:{len(text) % 5}"):
        try:
            assert 0 <= places.offset(text, one) <= len(text)
        except InputError as error:
            assert "--at" in str(error)


@settings(deadline=None)
@given(texts, st.lists(st.tuples(*[st.integers(1, 4)] * 4), min_size=1, max_size=4))
def test_spans_are_sorted_apart_and_hold_something(text: str, numbers: list[tuple[int, int, int, int]]) -> None:
    try:
        spans = places.spans(text, [f"{a}:{b}-{c}:{d}" for a, b, c, d in numbers])
    except InputError as error:
        assert "--span" in str(error)
    else:
        flat = [at for span in spans for at in span]
        assert flat == sorted(flat) and len(spans) == len(numbers) and all(a < b for a, b in spans)


def test_spans_that_touch_do_not_overlap() -> None:
    assert places.spans("abc\nd", ["1:3-2:1", "1:1-1:3"]) == [(0, 2), (2, 4)]
