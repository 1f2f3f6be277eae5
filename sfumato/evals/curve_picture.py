"""The curve as a picture: a row for each task, quality over steps and over milliseconds, as one SVG without a library.

A point is a setting, its bar where the share of all such items may lie; faint ones answered only a part of the items,
as they were dropped, or the time was over. The line is the front. The reference is a square, the chosen setting a
diamond; a pointer over any of them says which it is. Both axes across are logarithmic.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from sfumato.evals.curve import Point, task_front
from sfumato.evals.scoring import TaskScore
from sfumato.evals.settings import CostKind
from sfumato.evals.sweep import SweepResult

WIDTH, HEIGHT = 330, 200
"""Of a panel, in pixels."""
_LEFT, _TOP, _BETWEEN, _ROW, _LINE = 56, 92, 64, 84, 18
_COLUMNS = 104
"""Letters of a line of text."""
_PANELS: tuple[tuple[CostKind, str], ...] = (("steps", "steps of an item"), ("milliseconds", "milliseconds of an item"))
_STYLE = (
    "text{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:12px;fill:#a39eae}"
    ".h{font-size:15px;font-weight:bold;fill:#e4e0d4}.k{font-size:13px;fill:#e4e0d4}.e{text-anchor:end}"
    ".m{text-anchor:middle}.f{fill:#191820;stroke:#3a3744}.g{stroke:#2d2a36}.p{fill:#6fb3a7}.w{stroke:#6fb3a7;"
    "opacity:.45}.l{fill:none;stroke:#6fb3a7;stroke-width:1.5}.r{fill:#191820;stroke:#e4e0d4;stroke-width:2}"
    ".c{fill:#e0b45c;stroke:#191820}.q{opacity:.35}"
)


@dataclass(frozen=True)
class _Scale:
    """Where a value lies in a panel: across by its logarithm, up by the share."""

    x: float
    y: float
    low: float
    high: float
    bottom: float
    """The share at the lower edge."""

    @property
    def middle(self) -> float:
        """The value in the middle of the panel."""
        return math.sqrt(self.low * self.high)

    def across(self, value: float) -> float:
        span = math.log(self.high / self.low) or 1.0
        return self.x + WIDTH * math.log(max(value, self.low) / self.low) / span

    def up(self, share: float) -> float:
        return self.y + HEIGHT * (1 - (max(share, self.bottom) - self.bottom) / (1 - self.bottom))


def draw(result: SweepResult, title: str) -> str:
    """The text of an SVG file."""
    tasks = [*result.points[0].answers]
    lines = textwrap.wrap(_one_line(result.choice.sentence), _COLUMNS) or [""]
    top = _TOP + _LINE * (len(lines) - 1)
    width = _LEFT + 2 * WIDTH + _BETWEEN + 24
    height = top + len(tasks) * (HEIGHT + _ROW)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="#211f29" rx="8"/>',
        f'<text x="16" y="28" class="h">{escape(_one_line(title)[:80])}</text>',
        *(f'<text x="16" y="{50 + _LINE * n}">{escape(line)}</text>' for n, line in enumerate(lines)),
    ]
    for row, task in enumerate(tasks):
        y = top + row * (HEIGHT + _ROW) + 14
        parts.append(f'<text x="{_LEFT}" y="{y - 12}" class="k">{escape(_one_line(task)[:40])}</text>')
        for column, (cost, label) in enumerate(_PANELS):
            parts += _panel(_LEFT + column * (WIDTH + _BETWEEN), y, result, task, cost, label)
    parts += _legend(height - 14)
    return "\n".join([*parts, "</svg>\n"])


def _panel(x: float, y: float, result: SweepResult, task: str, cost: CostKind, label: str) -> Iterator[str]:
    """One panel, whose upper left corner is at (x, y)."""
    scores = [point.scores[task] for point in result.points]
    scale = _scale_of(x, y, scores, cost)
    yield f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" class="f"/>'
    for tenths in range(10, round(10 * scale.bottom) - 1, -1 if scale.bottom >= 0.5 else -2):
        at = scale.up(tenths / 10)
        yield f'<line x1="{x}" x2="{x + WIDTH}" y1="{at:.1f}" y2="{at:.1f}" class="g"/>'
        yield f'<text x="{x - 6}" y="{at + 4:.1f}" class="e">{tenths}0%</text>'
    for value in ticks(scale.low, scale.high):
        at = scale.across(value)
        yield f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y}" y2="{y + HEIGHT}" class="g"/>'
        yield f'<text x="{at:.1f}" y="{y + HEIGHT + 16}" class="m">{value:g}</text>'
    yield f'<text x="{x + WIDTH / 2}" y="{y + HEIGHT + 34}" class="m">{label}</text>'
    line = [(scale.across(_work(one.scores[task], cost)), one.scores[task]) for one in _front(result, task, cost)]
    corners = " ".join(f"{at:.1f},{scale.up(score.share):.1f}" for at, score in line)
    yield f'<polyline points="{corners}" class="l"/>'
    for point in result.points[1:]:
        is_chosen = result.choice.chosen is not None and point.setting == result.choice.chosen.setting
        if not is_chosen:
            yield from _mark(scale, point, task, cost, "p" if point in result.whole else "p q")
    yield from _mark(scale, result.points[0], task, cost, "r")
    if result.choice.chosen is not None:
        chosen = next(point for point in result.points if point.setting == result.choice.chosen.setting)
        yield from _mark(scale, chosen, task, cost, "c")
        yield _label(scale, chosen, task, cost)


def _label(scale: _Scale, point: Point, task: str, cost: CostKind) -> str:
    """The name of a setting, on the side of its point where there is more room; "" where that does not suffice."""
    value = _work(point.scores[task], cost)
    x, y = scale.across(value), scale.up(point.scores[task].share) - 8
    side = f'x="{x - 12:.1f}" class="k e"' if value > scale.middle else f'x="{x + 12:.1f}" class="k"'
    name = point.setting.name
    room = x - scale.x if value > scale.middle else scale.x + WIDTH - x
    return f'<text y="{y:.1f}" {side}>{escape(name)}</text>' if 12 + 8 * len(name) < room else ""


def _front(result: SweepResult, task: str, cost: CostKind) -> Sequence[Point]:
    return task_front(result.whole, task, cost)


def _mark(scale: _Scale, point: Point, task: str, cost: CostKind, style: str) -> Iterator[str]:
    """A point with its interval, and what a pointer over it says."""
    score = point.scores[task]
    x, y = scale.across(_work(score, cost)), scale.up(score.share)
    low, high = score.interval
    words = f"{point.setting.name}: {score.share:.1%} of {score.items}, {score.steps:.1f} steps"
    faint = " q" if "q" in style else ""
    yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{scale.up(low):.1f}" y2="{scale.up(high):.1f}" class="w{faint}"/>'
    name = f"<title>{escape(words)}, {score.milliseconds:.0f} ms</title>"
    yield _shape(x, y, style, name)


def _shape(x: float, y: float, style: str, inner: str = "") -> str:
    """A circle; the reference's square; the diamond of the choice."""
    if style == "r":
        return f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" class="r">{inner}</rect>'
    if style == "c":
        corners = f"{x:.1f},{y - 8:.1f} {x + 8:.1f},{y:.1f} {x:.1f},{y + 8:.1f} {x - 8:.1f},{y:.1f}"
        return f'<polygon points="{corners}" class="c">{inner}</polygon>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{style}">{inner}</circle>'


def _legend(y: float) -> Iterator[str]:
    x = float(_LEFT)
    for style, word in (("r", "reference"), ("c", "chosen"), ("p", "setting"), ("p q", "on a part of the items")):
        yield _shape(x, y - 4, style)
        yield f'<text x="{x + 14}" y="{y}">{word}</text>'
        x += 46 + 7.4 * len(word)
    yield f'<line x1="{x}" x2="{x + 20}" y1="{y - 4}" y2="{y - 4}" class="l"/>'
    yield f'<text x="{x + 28}" y="{y}">front</text>'


def _scale_of(x: float, y: float, scores: Sequence[TaskScore], cost: CostKind) -> _Scale:
    values = [_work(score, cost) for score in scores]
    low, high = min(values) / 1.15, max(values) * 1.15
    lowest = min(score.interval.low for score in scores)
    return _Scale(x, y, low, high, min(0.9, math.floor(lowest * 10) / 10))


def _work(score: TaskScore, cost: CostKind) -> float:
    """Steps or milliseconds; what is not known, as of a server that counts none, is next to nothing."""
    value: float = getattr(score, cost)
    return max(value, 1e-3)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis: 1, 2 and 5 times the powers of ten, or more of them on a short axis."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for bases in ((1, 2, 5), range(1, 10)):
        values = [base * 10.0**power for power in powers for base in bases if low <= base * 10.0**power <= high]
        if len(values) > 2:
            return values if len(values) <= 8 else values[:: len(values) // 5]
    digits = max(0, 1 - math.floor(math.log10(high - low)))
    return [*dict.fromkeys(round(low + (high - low) * part, digits) for part in (0.1, 0.5, 0.9))]


def _one_line(text: str) -> str:
    """A text in one line, of characters that XML may have."""
    return "".join(one if one.isprintable() else " " for one in text)
