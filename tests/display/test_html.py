"""display/html.py: a canvas as HTML, escaped, tinted by entropy."""

from __future__ import annotations

import re

from sfumato.cli.view import _LEVELS
from sfumato.display.html import LEVELS, TINTS, canvas_html, framed, status_html, text_html, tint_of
from sfumato.events import Draft


def test_texts_are_escaped_and_control_characters_shown() -> None:
    assert text_html('<b a="1">&\'') == "&lt;b a=&quot;1&quot;&gt;&amp;&#x27;"
    assert text_html("a\tb\nc") == "a\tb\nc"
    assert text_html("\x1b[2J\x00\x7f\r") == "\u241b[2J\u2400\u2421\u240d"
    text_html("\ud800x").encode()  # which a lone surrogate would refuse
    for html in (framed("<script>"), status_html("<script>"), canvas_html(["<script>"], [0.0], [True], "<script>")):
        assert "<script>" not in html and "&lt;script&gt;" in html


def test_the_less_sure_the_stronger_the_tint() -> None:
    assert LEVELS == _LEVELS  # the terminal's
    assert [tint_of(entropy) for entropy in (0.0, 0.01, 0.1, 0.3, 1.0, 2.0, 5.0)] == list(TINTS) == sorted(TINTS)
    assert tint_of(0.0) == 0.0  # the page's own ground for what is certain


def test_a_canvas_has_a_cell_for_each_token_and_keeps_the_pages_colour() -> None:
    html = canvas_html(["a", "b"], [0.0, 3.0, 0.3], [True, False, True], before="so ")
    cells = re.findall(r'<span style="([^"]*)" title="([^"]*)">([^<]*)</span>', html)
    assert [(title, text) for _, title, text in cells] == [
        ("0.000 nats", "a"),
        ("3.000 nats", "b"),
        ("0.300 nats", "▪"),
    ]
    assert ["italic" in style for style, _, _ in cells] == [False, True, False]
    assert ">so <span" in html and "color:inherit" in html and not re.search(r"[^-]color:\s*#", html)


def test_a_draft_shows_itself() -> None:
    draft = Draft(0, 0, 2, [1, 2, 3], [0.0, 1.0, 2.0], [True, False, False], "<a", ["<", "a", ""], 2)
    html = draft._repr_html_()
    assert html == canvas_html(["<", "a"], [0.0, 1.0, 2.0], [True, False, False]) and html.count("<span") == 3
