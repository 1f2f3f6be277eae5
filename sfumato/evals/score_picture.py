"""Scores as a picture: a bar for each task and kind, with its interval, as one SVG without a library.

Two runs stand in pairs. A bar ends at the share of items that are right; the line across its end is where the share of
all such items may lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from sfumato.evals.scoring import TaskScore

WIDTH = 360
"""Pixels of a bar that is always right."""
_BAR, _GAP, _TOP, _FOOT = 12, 14, 76, 34
_LABEL, _FIGURES = 190, 250
_LONGEST = 24
_STYLE = (
    "text{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:12px;fill:#a39eae}"
    ".h{font-size:15px;font-weight:bold;fill:#e4e0d4}.k{fill:#e4e0d4}.e{text-anchor:end}.m{text-anchor:middle}"
    ".g{stroke:#2d2a36}.f{fill:#191820;stroke:#3a3744}.a{fill:#6fb3a7}.b{fill:#c9b58c}.w{stroke:#e4e0d4;stroke-width:1.5}"
)


def draw(runs: Sequence[Sequence[TaskScore]], names: Sequence[str], title: str) -> str:
    """The text of an SVG file, for the rows of one model or setting, or of two that have the same rows."""
    rows = [*zip(*runs, strict=True)]
    high = len(runs) * _BAR + _GAP
    width, height = _LABEL + WIDTH + _FIGURES, _TOP + len(rows) * high + _FOOT
    bottom = _TOP + len(rows) * high
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="#211f29" rx="8"/>',
        f'<text x="16" y="28" class="h">{escape(_short(title, 80))}</text>',
        *_legend(names),
        f'<rect x="{_LABEL}" y="{_TOP - 8}" width="{WIDTH}" height="{bottom - _TOP + 8}" class="f"/>',
    ]
    for percent in (0, 25, 50, 75, 100):
        x = _LABEL + WIDTH * percent / 100
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 8}" y2="{bottom}" class="g"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" class="m">{percent} %</text>')
    for number, scores in enumerate(rows):
        parts += _row(_TOP + number * high, scores)
    return "\n".join([*parts, "</svg>\n"])


def _legend(names: Sequence[str]) -> Iterator[str]:
    x = 16
    if len(names) < 2:
        yield f'<text x="{x}" y="50">share of items that are right, with its 95 % interval</text>'
        return
    for style, name in zip("ab", names, strict=True):
        yield f'<rect x="{x}" y="41" width="10" height="10" class="{style}"/>'
        yield f'<text x="{x + 16}" y="50">{escape(_short(name, 40))}</text>'
        x += 44 + round(7.4 * min(40, len(name)))


def _row(y: int, scores: Sequence[TaskScore]) -> Iterator[str]:
    first = scores[0]
    label, indent, style = (first.kind, 30, "") if first.kind else (first.task, 16, "k")
    middle = y + len(scores) * _BAR / 2
    name = escape(_short(label, _LONGEST - indent // 8))
    yield f'<text x="{indent}" y="{middle + 4:.1f}" class="{style}">{name}</text>'
    for number, score in enumerate(scores):
        top, (low, high) = y + number * _BAR, score.interval
        x1, x2, across = _LABEL + WIDTH * low, _LABEL + WIDTH * high, top + (_BAR - 1) / 2
        style = "ab"[number]
        yield f'<rect x="{_LABEL}" y="{top}" width="{WIDTH * score.share:.1f}" height="{_BAR - 1}" class="{style}"/>'
        yield f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{across:.1f}" y2="{across:.1f}" class="w"/>'
        for x in (x1, x2):
            yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top + 2}" y2="{top + _BAR - 3}" class="w"/>'
        figures = f"{score.share:.1%} of {score.items:,}, {score.steps:.1f} steps, {score.milliseconds:.0f} ms"
        yield f'<text x="{_LABEL + WIDTH + 10}" y="{top + _BAR - 2}">{figures}</text>'


def _short(text: str, most: int) -> str:
    """A text in one line, of characters that XML may have."""
    line = "".join(one if one.isprintable() else " " for one in text)
    return line if len(line) <= most else line[: most - 1] + "…"
