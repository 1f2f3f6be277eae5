"""The choice: the cheapest setting that loses less than so many points, confirmed on items that did not choose it.

Candidates are what the search has on its front. They answer the confirming items one after the other, from the dearest,
which is the safest, to the cheapest; the first that may lose too much ends the row, and the last before it that is
cheaper there too is the choice. In that fixed order every test may have the full level (Marcus, Peritz and Gabriel
1976). What may lose too much: the upper limit of its paired loss is above the bound, or one task is significantly
worse. Where a loss is small enough but its limit is not, there are too few items, and about how many would do is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.evals.curve import Point
from sfumato.evals.search import CHEAPER
from sfumato.evals.settings import AXES, COSTS, CostKind, Setting
from sfumato.evals.statistics import PairedCounts
from sfumato.evals.tasks import TaskAnswer
from sfumato.options import LoadOptions, Options, differences
from sfumato.presets import Preset

MOST_CANDIDATES = 3
"""Settings that answer the confirming items beside the reference."""
MOST_ITEMS = 1_000_000
"""Items above which it is not said how many would do."""


@dataclass(frozen=True)
class SettingChoice:
    """What the confirming items say of the candidates."""

    lose: float
    """Points that a setting may lose."""
    cost: CostKind
    tried: Sequence[Point] = ()
    """The candidates on the confirming items, in the order in which they were tried."""
    chosen: Point | None = None
    """The last that was confirmed."""

    @property
    def sentence(self) -> str:
        """What came of it, for a person."""
        if self.chosen is not None:
            return f"{_words(self.chosen)}: it may be chosen"
        if not self.tried:
            return f"no setting that was tried is cheaper and loses less than {self.lose:g} points"
        point = self.tried[-1]
        if point.losing_tasks:
            return f"{_words(point)}; of {' and '.join(point.losing_tasks)} it has significantly less right"
        if point.loss >= self.lose:
            return f"{_words(point)}, which is too much"
        if is_safe(point, self.lose):
            return f"{_words(point)}; on these items it is not cheaper"
        items = items_needed(point.pooled, self.lose)
        more = "more than can be asked for" if items is None else f"about {items:,}"
        return f"{_words(point)}; these items do not suffice to say less than {self.lose:g}, {more} would"

    @property
    def items_needed(self) -> int | None:
        """About how many confirming items the last candidate would have needed; None where no number would do."""
        last = self.tried[-1] if self.tried and self.chosen is None else None
        if last is None or last.losing_tasks or is_safe(last, self.lose):
            return None
        return items_needed(last.pooled, self.lose)

    def to_dict(self) -> dict[str, Any]:
        """The record of a choice."""
        chosen = None if self.chosen is None else self.chosen.setting.name
        needed = {} if self.items_needed is None else {"items_needed": self.items_needed}
        record = {"lose": self.lose, "by": self.cost, "chosen": chosen, "sentence": self.sentence}
        return record | needed | {"confirming": [point.to_dict() for point in self.tried]}


def choose(
    candidates: Sequence[Point],
    answer: Callable[[Setting], Mapping[str, Sequence[TaskAnswer]]],
    cost: CostKind,
    lose: float,
    is_over: Callable[[], bool] = lambda: False,
) -> SettingChoice:
    """Confirm candidates, from the dearest to the cheapest; `answer` gives a setting's answers to the confirming items.

    At most the cheapest `MOST_CANDIDATES`; after the first one, none where the time is over."""
    if not candidates:
        return SettingChoice(lose, cost)
    reference, chosen, tried = answer(Setting()), None, list[Point]()
    for candidate in candidates[-MOST_CANDIDATES:]:
        if tried and is_over():
            break
        point = Point(candidate.setting, answer(candidate.setting), reference)
        tried.append(point)
        if not is_safe(point, lose):
            break
        if point.costs[cost] <= CHEAPER:
            chosen = point
    return SettingChoice(lose, cost, tried, chosen)


def is_safe(point: Point, lose: float) -> bool:
    """Whether it loses less than so many points for certain, and in no task significantly."""
    return point.loss_interval[1] < lose and not point.losing_tasks


def items_needed(counts: PairedCounts, lose: float) -> int | None:
    """The fewest items with these shares whose upper limit of the loss is below so many points; None for no number."""
    if -100 * counts.difference >= lose or not counts.count:
        return None

    def suffices(items: int) -> bool:
        scale = items / counts.count
        minus, plus = round(counts.first_only * scale), round(counts.second_only * scale)
        both = min(items - minus - plus, round(counts.both * scale))
        return -100 * PairedCounts(both, minus, plus, items - minus - plus - both).interval().low < lose

    most = counts.count
    while not suffices(most):
        most *= 2
        if most > MOST_ITEMS:
            return None
    least = 0
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if suffices(middle) else (middle, most)
    return most


def preset_of(setting: Setting, options: Options, load: LoadOptions, evidence: Mapping[str, Any]) -> Preset:
    """The preset of a setting over what the reference was given, with what speaks for it.

    What is asked for (a length, a seed) is not in it."""
    own, loaded = ({n: v for n, v in differences(one).items() if n in AXES} for one in (options, load))
    return Preset(own | setting.options, loaded | setting.load, evidence)


def _words(point: Point) -> str:
    work = ", ".join(f"{point.costs[kind]:.0%} of the {kind}" for kind in COSTS)
    low, high = point.loss_interval
    loss = f"loses {point.loss:.1f} points ({low:.1f} to {high:.1f})"
    return f"{point.setting.name} {loss} on {point.items:,} held-out items, at {work}"
