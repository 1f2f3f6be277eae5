"""The choice: the cheapest setting that loses less than so many points, confirmed on items that did not choose it.

Candidates are up to three settings, on the search's front or next to it. From the cheapest on they answer the
confirming items; the first that is safe there, and cheaper, is the choice. Safe means: the upper limit of its paired
loss is below the bound, and no task has significantly less right. As there are several tries, each limit is that of a
higher level: with three, of 98.3 % instead of 95 % (Bonferroni). Where a loss is small enough but its limit is not,
there are too few items, and about how many would do is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.evals.curve import Point
from sfumato.evals.search import CHEAPER
from sfumato.evals.settings import AXES, COSTS, CostKind, Setting
from sfumato.evals.statistics import LEVEL, PairedCounts
from sfumato.evals.tasks import TaskAnswer
from sfumato.options import LoadOptions, Options, differences
from sfumato.presets import Preset

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
    """The first that is safe, and cheaper."""
    level: float = LEVEL
    """Of the intervals of a loss: the more candidates, the higher."""

    @property
    def sentence(self) -> str:
        """What came of it, for a person."""
        if self.chosen is not None:
            return f"{self._words(self.chosen)}: it may be chosen"
        if not self.tried:
            return f"no setting that was tried is cheaper and loses less than {self.lose:g} points"
        point = min(self.tried, key=lambda one: items_needed(one.pooled, self.lose, self.level) or math.inf)
        words = self._words(point)
        if point.losing_tasks:
            return f"{words}; of {' and '.join(point.losing_tasks)} it has significantly less right"
        if point.loss >= self.lose:
            return f"{words}, which is too much"
        if is_safe(point, self.lose, self.level):
            return f"{words}; on these items it is not cheaper"
        items = items_needed(point.pooled, self.lose, self.level)
        more = "more than can be asked for" if items is None else f"about {items:,}"
        return f"{words}; these items do not suffice to say less than {self.lose:g}, {more} would"

    @property
    def items_needed(self) -> int | None:
        """About how many confirming items would have done for one of the candidates; None where no number would."""
        rest = [one for one in self.tried if not one.losing_tasks and not is_safe(one, self.lose, self.level)]
        each = [items_needed(point.pooled, self.lose, self.level) for point in rest]
        return None if self.chosen is not None else min((items for items in each if items is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """The record of a choice."""
        chosen = None if self.chosen is None else self.chosen.setting.name
        needed = {} if self.items_needed is None else {"items_needed": self.items_needed}
        record = {"lose": self.lose, "by": self.cost, "level": round(self.level, 6), "chosen": chosen}
        points = [
            point.to_dict()
            | {"high": round(point.most_loss(self.level), 4)}
            | {"is_safe": is_safe(point, self.lose, self.level)}
            for point in self.tried
        ]
        return record | needed | {"sentence": self.sentence, "confirming": points}

    def _words(self, point: Point) -> str:
        work = ", ".join(f"{point.costs[kind]:.0%} of the {kind}" for kind in COSTS)
        most = point.most_loss(self.level)
        loss = f"loses {point.loss:.1f} points, at most {most:.1f}"
        if point.loss < 0:
            limit = f"at least {-most:.1f}" if most < 0 else f"or loses at most {most:.1f}"
            loss = f"gains {-point.loss:.1f} points, {limit}"
        return f"{point.setting.name} {loss}, on {point.items:,} held-out items, at {work}"


def choose(
    candidates: Sequence[Point],
    answer: Callable[[Setting], Mapping[str, Sequence[TaskAnswer]]],
    cost: CostKind,
    lose: float,
) -> SettingChoice:
    """Confirm candidates, given from the dearest to the cheapest; `answer` gives a setting's confirming answers."""
    if not candidates:
        return SettingChoice(lose, cost)
    level = 1 - (1 - LEVEL) / len(candidates)
    reference, tried = answer(Setting()), list[Point]()
    for candidate in candidates[::-1]:
        point = Point(candidate.setting, answer(candidate.setting), reference)
        tried.append(point)
        if is_safe(point, lose, level) and point.costs[cost] <= CHEAPER:
            return SettingChoice(lose, cost, tried, point, level)
    return SettingChoice(lose, cost, tried, None, level)


def is_safe(point: Point, lose: float, level: float = LEVEL) -> bool:
    """Whether it loses less than so many points for certain, and in no task significantly."""
    return point.most_loss(level) < lose and not point.losing_tasks


def items_needed(counts: PairedCounts, lose: float, level: float = LEVEL) -> int | None:
    """The fewest items with these shares whose upper limit of the loss is below so many points; None for no number."""
    if -100 * counts.difference >= lose or not counts.count:
        return None

    def suffices(items: int) -> bool:
        scale = items / counts.count
        minus, plus = round(counts.first_only * scale), round(counts.second_only * scale)
        both = min(items - minus - plus, round(counts.both * scale))
        return -100 * PairedCounts(both, minus, plus, items - minus - plus - both).interval(level).low < lose

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
