"""The curve of quality against work: what each setting has right and takes, beside the reference on the same items.

Quality is a share of items that are right; work is denoising steps, passes, or milliseconds, which a busy machine
lengthens at times. Of several tasks, the loss is that of all their items together, and the work the geometric mean of
what each task takes of the reference's. A setting is on the front where no other one loses as little for as little.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sfumato.evals.scoring import TaskScore
from sfumato.evals.settings import COSTS, CostKind, Setting
from sfumato.evals.statistics import PairedCounts
from sfumato.evals.tasks import TaskAnswer

SIGNIFICANT = 0.05
"""McNemar's p below which a task's loss counts as one."""
_PLACES = 6


@dataclass(frozen=True)
class Point:
    """A setting, and its answers beside the reference's: by task, to the same items in the same order."""

    setting: Setting
    answers: Mapping[str, Sequence[TaskAnswer]]
    reference: Mapping[str, Sequence[TaskAnswer]]

    @cached_property
    def scores(self) -> dict[str, TaskScore]:
        """What it has right and takes, by task."""
        return {task: TaskScore.of(task, "", results) for task, results in self.answers.items()}

    @cached_property
    def paired(self) -> dict[str, PairedCounts]:
        """How often the reference and it were right, by task: the first is the reference."""
        return {task: _paired(self.reference[task], results) for task, results in self.answers.items()}

    @cached_property
    def pooled(self) -> PairedCounts:
        """The same over the items of all tasks."""
        return pooled(self.paired.values())

    @property
    def items(self) -> int:
        """Of all tasks."""
        return self.pooled.count

    @property
    def loss(self) -> float:
        """What it loses against the reference, in points: percent of all items."""
        return 100 * (self.pooled.first_only - self.pooled.second_only) / max(1, self.items)

    @cached_property
    def loss_interval(self) -> tuple[float, float]:
        """Where the loss may lie, in points."""
        low, high = self.pooled.interval()
        return -100 * high, -100 * low

    def most_loss(self, level: float) -> float:
        """The upper limit of the loss, in points, at this level."""
        return -100 * self.pooled.interval(level).low

    def loses_more_than(self, points: float) -> bool:
        """Whether it is certain that it loses more than so many points, in all or in one task."""
        return any(-100 * one.interval().high > points for one in (self.pooled, *self.paired.values()))

    @property
    def losing_tasks(self) -> list[str]:
        """The tasks of which it has significantly less right than the reference (McNemar)."""
        return [task for task, one in self.paired.items() if one.difference < 0 and one.p < SIGNIFICANT]

    @cached_property
    def costs(self) -> dict[CostKind, float]:
        """What it takes, as a share of what the reference takes."""
        return {kind: self._cost(kind) for kind in COSTS}

    def _cost(self, kind: CostKind) -> float:
        ratios = []
        for task, score in self.scores.items():
            own, other = (getattr(one, kind) for one in (score, TaskScore.of(task, "", self.reference[task])))
            if own > 0 and other > 0:
                ratios.append(math.log(own / other))
        return math.exp(sum(ratios) / len(ratios)) if ratios else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The record of a point."""
        low, high = self.loss_interval
        figures = {"loss": self.loss, "low": low, "high": high} | {f"{kind}_ratio": self.costs[kind] for kind in COSTS}
        tasks = {
            task: score.to_dict() | {"paired": vars(self.paired[task]), "p": round(self.paired[task].p, _PLACES)}
            for task, score in self.scores.items()
        }
        names = {"setting": self.setting.name, "options": self.setting.options, "load": self.setting.load}
        return names | {"items": self.items} | {k: round(v, 4) for k, v in figures.items()} | {"tasks": tasks}


def pooled(counts: Iterable[PairedCounts]) -> PairedCounts:
    """The items of several tasks together."""
    each = [*counts]
    names = ("both", "first_only", "second_only", "neither")
    return PairedCounts(*(sum(getattr(one, name) for one in each) for name in names))


def _paired(reference: Sequence[TaskAnswer], results: Sequence[TaskAnswer]) -> PairedCounts:
    return PairedCounts.of([one.is_right for one in reference], [one.is_right for one in results])


def front(points: Iterable[Point], cost: CostKind) -> list[Point]:
    """The points that no other one beats in both loss and work, from the dearest to the cheapest; of equals the first.

    A point beats another where it is at least as good in both and better in one."""
    best: list[Point] = []
    least = math.inf
    for point in sorted(points, key=lambda one: (one.costs[cost], one.loss)):
        if point.loss < least:
            best.append(point)
            least = point.loss
    return best[::-1]


def task_front(points: Iterable[Point], task: str, cost: CostKind) -> list[Point]:
    """The same for one task, by its own share and its own steps or milliseconds."""
    best: list[Point] = []
    most = -1.0
    for point in sorted(points, key=lambda one: (getattr(one.scores[task], cost), -one.scores[task].share)):
        if (share := point.scores[task].share) > most:
            best.append(point)
            most = share
    return best[::-1]


def signed(points: float) -> str:
    """Points with their sign; 0 has a plus."""
    return f"{round(points, 1) + 0.0:+.1f}"
