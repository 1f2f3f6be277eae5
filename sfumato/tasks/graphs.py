"""Plots of expressions in characters: an expression and the limits of its axes in, nine lines of nine cells out.

And the other way: a plot in, the family of its expression out. An item is the text that stands in the prompt: of a plot
"y=x^2-3\nx -4 4\ny -4 4", of a family the plot itself. A cell is `*` where the value of its column, rounded to a whole
number (halves up), is the number of its row, and `.` elsewhere; values outside the limits leave no mark.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from sfumato.errors import InputError

SIZE = 9
"""Rows and columns of a plot."""
STARTS = range(-6, -1)
"""Where an axis may begin; it ends eight further."""
MARK, EMPTY = "*", "."
_NOTHING = -100
"""Stands for a value that does not exist, as of 1/x at 0."""


@dataclass(frozen=True)
class Curve:
    """One expression of a family."""

    family: str
    text: str
    """As the prompt writes it, such as "y=2*x-1"."""
    value: Callable[[int], float | Fraction]
    """The value at a whole number; ZeroDivisionError where there is none."""

    def rounded(self, x: int) -> int:
        """The nearest whole number, halves up; `_NOTHING` where there is no value."""
        try:
            value = self.value(x)
        except ZeroDivisionError:
            return _NOTHING
        return math.floor(value + Fraction(1, 2)) if isinstance(value, Fraction) else math.floor(value + 0.5)


def _plus(number: int) -> str:
    return f"{number:+d}" if number else ""


def _scaled(factor: Fraction, text: str) -> str:
    """A factor times a term, the way people write it: -x, 2*x, x/2."""
    sign = "-" if factor < 0 else ""
    size = abs(factor)
    if size == 1:
        return sign + text
    return f"{sign}{size}*{text}" if size.denominator == 1 else f"{sign}{text}/{size.denominator}"


def _shifted(offset: int) -> str:
    return f"x{_plus(-offset)}"


def _lines() -> list[Curve]:
    slopes = [Fraction(n, d) for n, d in ((1, 1), (-1, 1), (2, 1), (-2, 1), (1, 2), (-1, 2), (3, 1), (-3, 1), (1, 3))]
    return [
        Curve("line", f"y={_scaled(a, 'x')}{_plus(b)}", lambda x, a=a, b=b: a * x + b)  # type: ignore[misc]
        for a in slopes
        for b in range(-5, 6)
    ]


def _parabolas() -> list[Curve]:
    return [
        Curve(
            "parabola",
            f"y={_scaled(a, f'({_shifted(c)})^2' if c else 'x^2')}{_plus(b)}",
            lambda x, a=a, b=b, c=c: a * (x - c) ** 2 + b,  # type: ignore[misc]
        )
        for a in (Fraction(1), Fraction(-1), Fraction(1, 2), Fraction(-1, 2))
        for c in range(-3, 4)
        for b in range(-5, 6)
    ]


def _corners() -> list[Curve]:
    return [
        Curve(
            "absolute",
            f"y={_scaled(a, f'|{_shifted(c)}|')}{_plus(b)}",
            lambda x, a=a, b=b, c=c: a * abs(x - c) + b,  # type: ignore[misc]
        )
        for a in (Fraction(1), Fraction(-1), Fraction(2), Fraction(-2))
        for c in range(-3, 4)
        for b in range(-5, 6)
    ]


def _hyperbolas() -> list[Curve]:
    return [
        Curve("hyperbola", f"y={a}/x{_plus(b)}", lambda x, a=a, b=b: Fraction(a, x) + b)  # type: ignore[misc]
        for a in (1, 2, 3, 4, 6, 8, -1, -2, -3, -4, -6, -8)
        for b in range(-2, 3)
    ]


def _waves() -> list[Curve]:
    return [
        Curve("sine", f"y={_scaled(Fraction(a), 'sin(x)')}{_plus(b)}", lambda x, a=a, b=b: a * math.sin(x) + b)  # type: ignore[misc]
        for a in (1, 2, 3, 4, -1, -2, -3, -4)
        for b in range(-3, 4)
    ]


FAMILIES: Mapping[str, Callable[[], Sequence[Curve]]] = {
    "line": _lines,
    "parabola": _parabolas,
    "absolute": _corners,
    "hyperbola": _hyperbolas,
    "sine": _waves,
}
"""Name of a family -> its expressions."""


@functools.cache
def curves(family: str) -> Sequence[Curve]:
    """The expressions of a family."""
    return tuple(FAMILIES[family]())


@functools.cache
def _by_text() -> Mapping[str, Curve]:
    return {curve.text: curve for family in FAMILIES for curve in curves(family)}


@functools.cache
def _values(family: str, start: int) -> np.ndarray:
    """Rounded values of a family's expressions at the columns of a plot that begins at `start`, [expressions, 9]."""
    return np.array([[curve.rounded(x) for x in range(start, start + SIZE)] for curve in curves(family)])


def plot(values: Sequence[int], bottom: int) -> str:
    """The nine lines of a plot, from the rounded value of each column and the number of the lowest row."""
    rows = range(bottom + SIZE - 1, bottom - 1, -1)
    return "\n".join("".join(MARK if value == row else EMPTY for value in values) for row in rows)


# ---- an expression in, its plot out ----------------------------------------------------------------------------------


def generate(rng: np.random.Generator) -> str:
    """A random expression, each family alike, with random limits that show at least four of its values."""
    while True:
        family = list(FAMILIES)[int(rng.integers(len(FAMILIES)))]
        number = int(rng.integers(len(curves(family))))
        left, bottom = (int(rng.integers(STARTS.start, STARTS.stop)) for _ in range(2))
        values = _values(family, left)[number]
        if ((values >= bottom) & (values < bottom + SIZE)).sum() >= 4:
            text = curves(family)[number].text
            return f"{text}\nx {left} {left + SIZE - 1}\ny {bottom} {bottom + SIZE - 1}"


def prompt(item: str) -> str:
    """The user's message for an expression with its limits."""
    return "Plot this:\n" + item


def answer(item: str) -> str:
    """The plot; InputError for an item that `generate` would not make."""
    match = re.fullmatch(r"(y=[^\n]{1,20})\nx (-\d) (\d)\ny (-\d) (\d)", item)
    curve = _by_text().get(match[1]) if match else None
    if match is None or curve is None:
        raise InputError(f"{item[:60]!r} is no expression with limits; take one that `generate` made")
    left, bottom = int(match[2]), int(match[4])
    return plot([curve.rounded(x) for x in range(left, left + SIZE)], bottom)


def family_of(item: str) -> str:
    """The family of an item's expression; InputError for an item that is none."""
    answer(item)
    return _by_text()[item.split("\n")[0]].family


def right_cells(text: str, item: str) -> float:
    """The share of the 81 cells that are right; a text of another shape is judged cell by cell as far as it goes."""
    lines, right = text.strip().split("\n"), answer(item).split("\n")
    cells = sum(
        cell == own for line, ours in zip(lines, right, strict=False) for cell, own in zip(line, ours, strict=False)
    )
    return cells / SIZE**2


def right_marks(text: str, item: str) -> float:
    """The share of the marks, and of what is marked, that are right (intersection over union): most cells are empty."""
    lines, right = text.strip().split("\n"), answer(item).split("\n")
    own, ours = (
        {
            (row, column)
            for row, line in enumerate(some[:SIZE])
            for column, cell in enumerate(line[:SIZE])
            if cell == MARK
        }
        for some in (lines, right)
    )
    return len(own & ours) / len(own | ours) if own | ours else 1.0


# ---- a plot in, the family of its expression out ---------------------------------------------------------------------


def generate_family(rng: np.random.Generator) -> str:
    """The plot of a random expression that no other family can draw, within any limits."""
    while True:
        item = answer(generate(rng))
        if len(families_of(item)) == 1:
            return item


def families_of(plot_text: str) -> list[str]:
    """The families with an expression that draws this plot, within some limits; none for a text that is no plot."""
    lines = plot_text.split("\n")
    if len(lines) != SIZE or any(len(line) != SIZE or set(line) - {MARK, EMPTY} for line in lines):
        return []
    heights = np.full(SIZE, _NOTHING)
    for row, line in enumerate(lines):
        for column, cell in enumerate(line):
            if cell == MARK:
                if heights[column] != _NOTHING:
                    return []
                heights[column] = SIZE - 1 - row
    return [family for family in FAMILIES if _draws(family, heights)]


def _draws(family: str, heights: np.ndarray) -> bool:
    """Whether an expression of a family has these heights over the lowest row, `_NOTHING` where none is visible."""
    for left in STARTS:
        values = _values(family, left)
        for bottom in STARTS:
            visible = np.where((values >= bottom) & (values < bottom + SIZE), values - bottom, _NOTHING)
            if (visible == heights).all(1).any():
                return True
    return False


def family_prompt(item: str) -> str:
    """The user's message for a plot."""
    return "Which family is this?\n" + item


def family_answer(item: str) -> str:
    """The family; of several that fit, the first. InputError for a text that is no plot of ours."""
    families = families_of(item)
    if not families:
        raise InputError(f"{item[:60]!r} is no plot of these families; take one that `generate_family` made")
    return families[0]


def is_family(text: str, item: str) -> bool:
    """Is this the name of a family that draws the plot? Never raises."""
    return text in families_of(item)
