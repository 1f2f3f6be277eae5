"""cli/view.py: drafts on the screen, and texts around them."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.color import Color, ColorSystem
from rich.console import Console

from sfumato.cli import view
from sfumato.cli.view import SMOKE, colour, show, summary
from sfumato.events import Draft, Edited, Usage
from sfumato.llm import LLM
from sfumato.options import Options

PUZZLE = "800560790257001600040000152004050800038607041096348275085906320902704518370285400"
"""50 clues: nano solves it."""

texts = st.text(st.one_of(st.sampled_from("\r\n\t \ufeffé🙂\u2028a1:-"), st.characters(exclude_categories=["Cs"])))


@settings(deadline=None)
@given(texts, texts, texts)
def test_the_screen_gets_no_control_character(before: str, middle: str, after: str) -> None:
    for shown in (view.around(before, middle, after), view.diff_text(Edited(before, after, Usage(), 0).diff())):
        assert not [c for c in shown.plain if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160]


def test_little_is_shown_around_what_was_written() -> None:
    lines = "".join(f"{n}\n" for n in range(10))
    assert view.around(lines + "a", "B", "c\n" + lines).plain == "…\n7\n8\n9\naBc\n0\n1\n2\n…"
    assert view.around("x" * 900, "B", "y" * 900).plain == "…" + "x" * 400 + "B" + "y" * 400 + "…"
    assert view.around("a", "B", "c\n").plain == "aBc"
    assert view.around("", "B", "\r\n" * 9).plain == view.around("", "B", "\n" * 9).plain == "B\n\n\n"
    assert view.around("a\rb", "", "c\r\n").plain == "a␍bc"


def test_the_live_view_draws_every_draft_and_leaves_text_and_figures() -> None:
    llm = LLM.load("nano")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, height=40, color_system="truecolor")
    messages = [{"role": "user", "content": f"Solve this Sudoku:\n{PUZZLE}"}]
    done = show(llm, llm.stream(messages, options=Options(seed=1, drafts=True)), console, 0.0)
    drawn = screen.getvalue()
    assert drawn.count("accepted · entropy") >= done.usage.steps
    assert done.text in drawn and "tokens per pass" in drawn


def test_the_figures_leave_out_the_time_of_drawing() -> None:
    llm, screen = LLM.load("nano"), io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, height=40)
    done = show(llm, llm.stream(f"Solve this Sudoku:\n{PUZZLE}", options=Options(seed=1, drafts=True)), console, 0.1)
    (seconds,) = re.findall(r"canvas, (-?[0-9.]+) s", screen.getvalue())
    assert done.usage.steps > 1 and 0 < float(seconds) <= done.usage.seconds - 0.1 * (done.usage.steps - 1) + 0.05


def test_colours_run_from_certain_to_undecided() -> None:
    assert colour(0.0) == SMOKE[0] and colour(9.0) == SMOKE[-1]
    assert [SMOKE.index(colour(h)) for h in (0.01, 0.1, 0.3, 1.0, 2.0)] == [1, 2, 3, 4, 5]


def luminance(colour: Color) -> float:
    """WCAG's relative luminance."""
    parts = [part / 255 for part in colour.get_truecolor()]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("name", [*SMOKE, view.CLUE])
@pytest.mark.parametrize("system", [ColorSystem.TRUECOLOR, ColorSystem.EIGHT_BIT])
def test_a_colour_is_read_on_black_and_on_white(name: str, system: ColorSystem) -> None:
    if not name:  # the terminal's own, which its owner can read
        return
    light = luminance(Color.parse(name).downgrade(system))
    assert (light + 0.05) / 0.05 >= 3 and 1.05 / (light + 0.05) >= 3


def test_with_sixteen_colours_none_is_black_white_grey_or_pale() -> None:
    numbers = {Color.parse(name).downgrade(ColorSystem.STANDARD).number for name in (*SMOKE[1:], view.CLUE)}
    assert not numbers & {0, 7, 8, 10, 11, 14, 15, None}


def test_what_is_certain_has_the_terminals_own_colour() -> None:
    draft = Draft(0, 0, 1, [1, 2, 3], [0.0, 2.0, 0.0], [True, False, True], "ab", ["a", "b", ""], 2)
    screen = io.StringIO()
    Console(file=screen, force_terminal=True, color_system="truecolor").print(view.canvas_text(draft), end="")
    assert screen.getvalue() == f"a\x1b[3;38;2;{';'.join(map(str, Color.parse(SMOKE[5]).get_truecolor()))}mb\x1b[0m▪"


def test_the_summary_counts_tokens_per_pass() -> None:
    line = summary(Usage(prompt_tokens=10, tokens=60, canvases=1, steps=5, passes=6), seconds=2.0)
    assert "60 tokens in 5 steps on 1 canvas" in line and "10.0 tokens per pass" in line and "30 tokens/s" in line
