"""A canvas as HTML: each token's ground tinted by how unsure the model is of it, on light and dark pages alike.

The text keeps the page's own colour, and the tint is half transparent, so that both themes stay readable. Every text is
escaped, and what is no character of a line is shown as a mark. Nothing here imports IPython.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

LEVELS = (0.005, 0.05, 0.2, 0.6, 1.2, 2.4)
"""Entropies in nats from which on the tint is one stage stronger: those of the terminal's colours."""
TINTS = (0.0, 0.10, 0.18, 0.27, 0.36, 0.45, 0.54)
"""The opacity of the tint, from certain to undecided."""
OCHRE = "201,133,47"
"""The tint: red, green, blue."""

_MARKS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_MARKS |= {0x7F: "\u2421"} | dict.fromkeys(range(0xD800, 0xE000), "\ufffd")

_FRAME = "white-space:pre-wrap;overflow-wrap:anywhere;font-family:ui-monospace,monospace;line-height:1.5;color:inherit"
_STATUS = "opacity:.7;font-size:85%;color:inherit"


def canvas_html(pieces: Sequence[str], entropies: Sequence[float], accepted: Sequence[bool], before: str = "") -> str:
    """The tokens of a draft, behind the text that is committed `before` it.

    `pieces` may be fewer than `entropies`: they end where the text does, and a mark stands there."""
    cells = [_cell(*cell) for cell in zip(pieces, entropies, accepted, strict=False)]
    end = _cell("▪", entropies[len(pieces)], True) if len(pieces) < len(entropies) else ""
    return f'<div style="{_FRAME}">{text_html(before)}{"".join(cells)}{end}</div>'


def framed(text: str) -> str:
    """A finished text in the same frame."""
    return f'<div style="{_FRAME}">{text_html(text)}</div>'


def status_html(text: str) -> str:
    """A line of figures below a canvas."""
    return f'<div style="{_STATUS}">{text_html(text)}</div>'


def tint_of(entropy: float) -> float:
    """The opacity of the tint of a token whose distribution has this entropy, in nats."""
    return TINTS[sum(entropy >= level for level in LEVELS)]


def text_html(text: str) -> str:
    """A text, escaped; control characters as their pictures (␀ to ␡), lone surrogates as the replacement character."""
    return html.escape(text.translate(_MARKS))


def _cell(piece: str, entropy: float, is_accepted: bool) -> str:
    """One token; one that the step did not accept is in italics."""
    style = f"background:rgba({OCHRE},{tint_of(entropy):g})" + ("" if is_accepted else ";font-style:italic")
    return f'<span style="{style}" title="{entropy:.3f} nats">{text_html(piece)}</span>'
