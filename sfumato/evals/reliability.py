"""The reliability diagram: what was said against what was right, before and after, as one SVG without a library.

A row for each kind of question. A bar is the share that is right among answers of like confidence; where it ends on the
diagonal the model is as sure as it should be, and bars of few answers are faint. What lies between a bar and the mean
confidence is the error, in one colour where the model was too sure and in another where it was not sure enough. Below
stands how many answers each bar is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from sfumato.evals.calibration import Bin, KindReport, Quality

SIDE, STRIP = 232, 34
"""Height and width of a diagram, and the height of the counts below it, in pixels."""
RARE = 10
"""Answers below which a bar is drawn faintly: it says little."""
_LEFT, _TOP, _BETWEEN, _ROW, _FOOT = 52, 88, 56, 96, 40
_STYLE = (
    "text{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:12px;fill:#8a8594}"
    ".h{font-size:15px;font-weight:bold;fill:#e4e0d4}.k{font-size:13px;fill:#e4e0d4}.e{text-anchor:end}.m{text-anchor:"
    "middle}.f{fill:#191820;stroke:#3a3744}.g{stroke:#2d2a36}.d{stroke:#8a8594;stroke-dasharray:4 4}"
    ".b{fill:#6fb3a7}.o{fill:#d0705f;opacity:.75}.u{fill:#c9b58c;opacity:.75}.c{fill:#5f5a73}.r{opacity:.35}"
)


def draw(reports: Sequence[KindReport], title: str) -> str:
    """The text of an SVG file: a row for each kind, before on the left and after on the right."""
    width = _LEFT + 2 * SIDE + _BETWEEN + 28
    height = _TOP + len(reports) * (SIDE + STRIP + _ROW) + _FOOT - 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="#211f29" rx="8"/>',
        f'<text x="{_LEFT}" y="30" class="h">{escape(_short(title))}</text>',
        f'<text x="{_LEFT}" y="52">across: how sure it was; up: how often it was right</text>',
    ]
    for row, report in enumerate(reports):
        y = _TOP + row * (SIDE + STRIP + _ROW)
        right = _LEFT + SIDE + _BETWEEN
        temperature = "too few labels: T = 1" if report.fit is None else f"T = {report.fit.temperature:.2f}"
        count = sum(one.count for one in report.before_bins)
        parts.append(f'<text x="{_LEFT}" y="{y}" class="k">{report.kind}, {count:,} answers</text>')
        parts.append(f'<text x="{right}" y="{y}" class="k">{temperature}</text>')
        parts += _diagram(_LEFT, y + 30, report.before_bins, "before", report.before)
        parts += _diagram(right, y + 30, report.after_bins, "after, held out", report.after)
    parts += _legend(height - 20)
    return "\n".join([*parts, "</svg>\n"])


def _diagram(x: int, y: int, bins: Sequence[Bin], name: str, figures: Quality) -> Iterator[str]:
    """One diagram with its axes, whose upper left corner is at (x, y)."""
    yield f'<text x="{x}" y="{y - 8}">{name}</text>'
    yield f'<text x="{x + SIDE}" y="{y - 8}" class="e">ECE {figures.ece:.3f}</text>'
    yield f'<rect x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" class="f"/>'
    for share in (0.25, 0.5, 0.75):
        at = y + SIDE * (1 - share)
        yield f'<line x1="{x}" x2="{x + SIDE}" y1="{at}" y2="{at}" class="g"/>'
    width, most = SIDE / len(bins), max(1, *(one.count for one in bins))
    below = y + SIDE + 6
    for number, one in enumerate(bins):
        if not one.count:
            continue
        left = x + number * width + 1
        top, aim = y + SIDE * (1 - one.accuracy), y + SIDE * (1 - one.confidence)
        faint = " r" if one.count < RARE else ""
        yield _bar(left, top, width - 2, y + SIDE - top, f"b{faint}")
        yield _bar(left, min(top, aim), width - 2, abs(top - aim), ("o" if aim < top else "u") + faint)
        yield _bar(left, below, width - 2, max(1.0, STRIP * one.count / most), "c")
    yield f'<line x1="{x}" y1="{y + SIDE}" x2="{x + SIDE}" y2="{y}" class="d"/>'
    for share, word in ((0.0, "0"), (0.5, "0.5"), (1.0, "1")):
        yield f'<text x="{x - 8}" y="{y + SIDE * (1 - share) + 4:.1f}" class="e">{word}</text>'
        yield f'<text x="{x + SIDE * share:.1f}" y="{below + STRIP + 14}" class="m">{word}</text>'


def _bar(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{style}"/>'


def _legend(y: int) -> Iterator[str]:
    x = _LEFT
    for style, word in (("b", "right"), ("o", "too sure"), ("u", "not sure enough"), ("c", "answers")):
        yield _bar(x, y - 9, 10, 10, style)
        yield f'<text x="{x + 16}" y="{y}">{word}</text>'
        x += 40 + round(7.4 * len(word))


def _short(title: str) -> str:
    """A title in one line, of characters that XML may have."""
    text = "".join(one if one.isprintable() else " " for one in title)
    return text if len(text) <= 60 else text[:59] + "…"
