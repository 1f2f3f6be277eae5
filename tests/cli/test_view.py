"""cli/view.py: drafts on the screen, and texts around them."""

from __future__ import annotations

import io

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from sfumato.cli import view
from sfumato.cli.view import SMOKE, colour, show, summary
from sfumato.events import Edited, Usage
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


def test_colours_run_from_certain_to_undecided() -> None:
    assert colour(0.0) == SMOKE[0] and colour(9.0) == SMOKE[-1]
    assert [SMOKE.index(colour(h)) for h in (0.01, 0.1, 0.3, 1.0, 2.0)] == [1, 2, 3, 4, 5]


def test_the_summary_counts_tokens_per_pass() -> None:
    line = summary(Usage(prompt_tokens=10, tokens=60, canvases=1, steps=5, passes=6), seconds=2.0)
    assert "60 tokens in 5 steps on 1 canvas" in line and "10.0 tokens per pass" in line and "30 tokens/s" in line
