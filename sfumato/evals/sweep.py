"""A sweep: the search on some of the items, the choice on the others, and the record of both.

Answers are kept by setting: the same sweep goes on where it was stopped, and tries more where its time was over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sfumato.evals.choice import SettingChoice, choose
from sfumato.evals.curve import Point, front
from sfumato.evals.evaluation import BATCH, evaluate
from sfumato.evals.kept_answers import KeptAnswers
from sfumato.evals.search import SettingSearch, Tell, parted
from sfumato.evals.settings import COSTS, Axis, CostKind, Setting
from sfumato.evals.tasks import Exercise, TaskAnswer
from sfumato.options import Options
from sfumato.templates.interface import LanguageModel

SEARCHED = 0.5
"""Of the time, what the search may use; the choice takes about the rest."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to."""

    points: Sequence[Point]
    """What was tried, on the items that choose, or on a part of them; the reference first."""
    choice: SettingChoice
    cost: CostKind
    is_complete: bool
    """Whether the search ended by itself, before its time was over."""

    @property
    def whole(self) -> list[Point]:
        """The points that have answered all items that choose."""
        return [point for point in self.points if point.items == self.points[0].items]

    def to_dict(self) -> dict[str, Any]:
        """The record of a sweep."""
        fronts = {kind: [point.setting.name for point in front(self.whole, kind)] for kind in COSTS}
        points = [point.to_dict() for point in self.points]
        return {"is_complete": self.is_complete, "points": points, "fronts": fronts, "choice": self.choice.to_dict()}


@dataclass
class Sweep:
    """A sweep of one model over exercises. The reference's options have a seed, so that all see the same noise."""

    exercises: Sequence[Exercise]
    axes: Sequence[Axis]
    options: Options
    llm_of: Callable[[Setting], LanguageModel]
    """The model as a setting loads it."""
    seconds: float = 600.0
    """Its time. The reference, and the candidates of the choice, are answered in any case."""
    cost: CostKind = "passes"
    lose: float = 1.0
    """Points that a setting may lose."""
    batch: int = BATCH
    kept: KeptAnswers = field(default_factory=lambda: KeptAnswers(None, {}))
    tell: Tell = lambda line: None
    clock: Callable[[], float] = time.monotonic

    def run(self) -> SweepResult:
        """Search and choose. InputError where an exercise has fewer than two items."""
        began = self.clock()
        parts = [parted(one) for one in self.exercises]
        choosing, confirming = ({one.task.name: one for one in part} for part in zip(*parts, strict=True))
        search = SettingSearch(
            [*choosing.values()],
            self.axes,
            self.options,
            lambda setting, task, count: self._answers(setting, choosing[task], count, "choosing"),
            lambda: self.clock() - began > SEARCHED * self.seconds,
            self.batch,
            self.cost,
            self.lose,
            self.tell,
        )
        points = search.run()
        self.tell("the other items confirm")
        choice = choose(
            search.qualified,
            lambda setting: self._all_answers(setting, confirming),
            self.cost,
            self.lose,
        )
        return SweepResult(points, choice, self.cost, search.is_complete)

    def _all_answers(self, setting: Setting, exercises: Mapping[str, Exercise]) -> dict[str, Sequence[TaskAnswer]]:
        each = {name: self._answers(setting, one, len(one.items), "confirming") for name, one in exercises.items()}
        self.tell(f"{setting.name}: {sum(map(len, each.values()))} confirming items")
        return each

    def _answers(self, setting: Setting, exercise: Exercise, count: int, part: str) -> Sequence[TaskAnswer]:
        """The answers of a setting to the first items, those that are kept first."""
        run, name = f"{part}: {setting.name}", exercise.task.name
        there = self.kept.of(run, name)
        if len(there) < count:
            some = Exercise(exercise.task, exercise.items[:count])
            there = [
                *evaluate(
                    self.llm_of(setting), some, setting.over(self.options), batch=self.batch, kept=self.kept, run=run
                )
            ]
        return there[:count]
