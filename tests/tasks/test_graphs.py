"""tasks/graphs.py: plots of expressions in characters, cell by cell, and the family that a plot shows."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest

from sfumato.errors import InputError
from sfumato.tasks import graphs


def value(text: str, x: int) -> float | None:
    """An expression by Python's own arithmetic, in doubles; None where it has no value."""
    source = text.removeprefix("y=").replace("^", "**").replace("sin", "math.sin")
    source = re.sub(r"\|([^|]*)\|", r"abs(\1)", source)
    try:
        return float(eval(source, {"math": math, "abs": abs, "x": x}))
    except ZeroDivisionError:
        return None


def test_plots_are_those_of_the_expressions() -> None:
    rng = np.random.default_rng(1)
    families = Counter()  # type: ignore[var-annotated]
    for _ in range(400):
        item = graphs.generate(rng)
        text, xs, ys = item.split("\n")
        (left, right), (bottom, top) = ([*map(int, axis.split()[1:])] for axis in (xs, ys))
        rows = graphs.answer(item).split("\n")
        assert [len(row) for row in rows] == [9] * 9 and right - left == top - bottom == 8
        for column, x in enumerate(range(left, right + 1)):
            height = value(text, x)
            marked = [top - row for row in range(9) if rows[row][column] == "*"]
            rounded = None if height is None else math.floor(height + 0.5 + 1e-9)
            assert marked == ([rounded] if rounded is not None and bottom <= rounded <= top else [])
        families[graphs.family_of(item)] += 1
    assert families.keys() == graphs.FAMILIES.keys() and min(families.values()) > 40


def test_expressions_have_texts_of_their_own() -> None:
    texts = [curve.text for family in graphs.FAMILIES for curve in graphs.curves(family)]
    assert len({*texts}) == len(texts) > 700


def test_cells_and_marks() -> None:
    item = "y=x\nx -4 4\ny -4 4"
    right = graphs.answer(item)
    assert graphs.right_cells(right, item) == graphs.right_marks(right + "\n", item) == 1.0
    empty = "\n".join(["." * 9] * 9)
    assert graphs.right_cells(empty, item) == pytest.approx(72 / 81) and graphs.right_marks(empty, item) == 0.0
    assert graphs.right_cells("", item) == 0.0 and graphs.right_cells("....\n" * 40, item) < 0.5
    one_off = right.replace("*", ".", 1)
    assert graphs.right_cells(one_off, item) == pytest.approx(80 / 81)
    assert graphs.right_marks(one_off, item) == pytest.approx(8 / 9)


def test_a_family_is_the_only_one_that_draws_its_plot() -> None:
    rng = np.random.default_rng(2)
    names = Counter()  # type: ignore[var-annotated]
    for _ in range(150):
        item = graphs.generate_family(rng)
        name = graphs.family_answer(item)
        assert graphs.families_of(item) == [name] and graphs.is_family(name, item)
        assert not any(graphs.is_family(other, item) for other in graphs.FAMILIES if other != name)
        names[name] += 1
    assert names.keys() == graphs.FAMILIES.keys()


@pytest.mark.parametrize("text", ["", "*" * 89, "\n".join(["*" * 9] * 9), "a\n" * 9])
def test_what_is_no_plot_has_no_family(text: str) -> None:
    assert graphs.families_of(text) == [] and not graphs.is_family("line", text)
    with pytest.raises(InputError, match="no plot"):
        graphs.family_answer(text)


@pytest.mark.parametrize("item", ["", "y=x", "y=x^9\nx -4 4\ny -4 4", "y=x\nx a 4\ny -4 4"])
def test_what_is_no_item_is_refused(item: str) -> None:
    with pytest.raises(InputError, match="no expression with limits"):
        graphs.answer(item)
