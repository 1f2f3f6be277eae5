"""The search for settings that lose little and take little: along each axis, then several axes together.

A third of the items chooses, the rest confirms (`choice`). The reference answers first. Each setting with one change
then answers a quarter of the choosing items, then half of them, then all: what is refused, loses too much for certain,
is no cheaper, or (from the second look on) is far from the front is dropped on the way. That is successive halving,
with confidence in place of a fixed share. The changes that are left are joined, one axis after another, while that
makes the best setting cheaper at no loss. The search ends where the time is over; what it has tried by then is the
curve.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sfumato.errors import InputError
from sfumato.evals.curve import Point, front, signed
from sfumato.evals.settings import Axis, CostKind, Setting, singles
from sfumato.evals.tasks import Exercise, TaskAnswer
from sfumato.options import Options

RUNGS = (4, 2, 1)
"""A setting answers a quarter of the items, then half of them, then all."""
LAYERS = 3
"""Fronts that stay from the second rung on: the front, that of what is left without it, and so on."""
MOST_CANDIDATES = 3
"""Settings that are to be confirmed, at most."""
CHEAPER = 0.98
"""Of the reference's work, what a setting takes at most to be called cheaper."""

AnswerItems = Callable[[Setting, str, int], Sequence[TaskAnswer]]
"""(setting, task, count) -> its answers to the first so many items of the task, in order."""
Tell = Callable[[str], None]
"""Called with a line about each step of the search."""


class TimeIsOver(Exception):
    """The search has used its time; what it has is kept."""


@dataclass
class SettingSearch:
    """A search over exercises whose items are those that choose."""

    exercises: Sequence[Exercise]
    axes: Sequence[Axis]
    options: Options
    """The reference's."""
    answer: AnswerItems
    is_over: Callable[[], bool]
    """Whether the time is over; asked before any work is begun."""
    batch: int = 32
    """Items that are answered at once."""
    cost: CostKind = "passes"
    lose: float = 1.0
    """Points that a setting may lose."""
    tell: Tell = lambda line: None
    points: dict[Setting, Point] = field(default_factory=dict)
    """Those that were tried, each on as many items as it got to. The reference is the first."""
    is_complete: bool = True
    """Whether all was tried that the search had in mind."""

    def run(self) -> list[Point]:
        """Search; the points that were tried, the reference first. Its own answers come before any look at the time."""
        reference = Setting()
        self.points[reference] = self._measured(reference, self._rungs()[-1], must=True)
        try:
            alive = self._along_each_axis()
            if not any(self.qualifies(point) for _, point in alive):
                self._second_chance()
            self._joined(alive)
        except TimeIsOver:
            self.is_complete = False
            self.tell("the time of the search is over")
        return [*self.points.values()]

    @property
    def qualified(self) -> list[Point]:
        """Up to three points that may be chosen, from the dearest to the cheapest: see `candidates`.

        They have answered all items; where the time was over before any had, as many as any that may be chosen."""
        some = [point for point in self.points.values() if self.qualifies(point)]
        most = max((point.items for point in some), default=0)
        return candidates([point for point in some if point.items == most], self.cost)

    def qualifies(self, point: Point) -> bool:
        """Whether a point may be chosen: cheaper, no task significantly worse, and the loss that was seen in bounds."""
        return self._is_possible_choice(point) and not point.losing_tasks and point.loss < self.lose

    def _along_each_axis(self) -> list[tuple[Axis, Point]]:
        """Every setting with one change, on more and more items; those that are left have answered all."""
        alive = [*singles(self.axes, self.options)]
        for number, rung in enumerate(self._rungs()):
            tried = ((axis, self._try(setting, rung)) for axis, setting in alive)
            each = [(axis, point) for axis, point in tried if point is not None]
            rest = [point for _, point in each if self._is_possible_choice(point)]
            kept = {point.setting for point in (near_front(rest, self.cost) if number else rest)}
            each.sort(key=lambda pair: (max(pair[1].loss, 0.0), self._work(pair[1])))  # what is promising goes on first
            alive = [(axis, point.setting) for axis, point in each if point.setting in kept]
        return [(axis, self.points[setting]) for axis, setting in alive]

    def _second_chance(self) -> None:
        """Where nothing that is left may be chosen: those that were dropped as far from the front, the best first."""
        most = self.points[Setting()].items
        rest = [point for point in self.points.values() if point.items < most and self._is_possible_choice(point)]
        for point in sorted(rest, key=lambda one: (one.loss, self._work(one))):
            climbed = self._climbed(point.setting)
            if climbed is not None and self.qualifies(climbed):
                return

    def _joined(self, alive: Sequence[tuple[Axis, Point]]) -> None:
        """Join changes of several axes to the cheapest setting that qualifies, those that save most first."""
        best = min((point for _, point in alive if self.qualifies(point)), key=self._work, default=None)
        if best is None:
            return
        by_axis: dict[Axis, list[Point]] = {}
        for axis, point in sorted(alive, key=lambda pair: self._work(pair[1])):
            by_axis.setdefault(axis, []).append(point)
        for points in by_axis.values():
            for point in points:
                setting = best.setting.combined(point.setting)
                if setting in self.points or not self._goes_together(setting):
                    continue
                joined = self._climbed(setting)
                if joined is not None and self.qualifies(joined) and self._work(joined) < self._work(best):
                    best = joined
                    break

    def _climbed(self, setting: Setting) -> Point | None:
        """A setting on all rungs; None where it is dropped on the way."""
        for rung in self._rungs():
            point = self._try(setting, rung)
            if point is None or not self._is_possible_choice(point):
                return None
        return point

    def _is_possible_choice(self, point: Point) -> bool:
        """Whether it is cheaper, and not certain to lose more than it may."""
        return point.costs[self.cost] <= CHEAPER and not point.loses_more_than(self.lose)

    def _work(self, point: Point) -> float:
        return point.costs[self.cost]

    def _goes_together(self, setting: Setting) -> bool:
        """Whether its options do not contradict one another."""
        try:
            setting.over(self.options)
        except InputError:
            return False
        return True

    def _rungs(self) -> list[dict[str, int]]:
        """How many items of each task a setting answers, look after look; in whole batches, as the reference did."""
        rungs: list[dict[str, int]] = []
        for part in RUNGS:
            each = {one.task.name: self._count(len(one.items), part) for one in self.exercises}
            if each not in rungs:
                rungs.append(each)
        return rungs

    def _count(self, items: int, part: int) -> int:
        return min(items, -(-items // (part * self.batch)) * self.batch)

    def _try(self, setting: Setting, rung: Mapping[str, int]) -> Point | None:
        """The setting on these items; None, with a line that says why, where the model or a task refuses it."""
        try:
            point = self.points[setting] = self._measured(setting, rung)
        except InputError as error:
            self.tell(f"{setting.name} is left out: {error}")
            return None
        work = f"{point.costs[self.cost]:.0%} of the {self.cost}"
        self.tell(f"{setting.name}: {signed(-point.loss)} points, {work}, on {point.items} items")
        return point

    def _measured(self, setting: Setting, rung: Mapping[str, int], must: bool = False) -> Point:
        """The setting on the first items of every task. TimeIsOver before any that `must` not be answered."""
        own: dict[str, Sequence[TaskAnswer]] = {}
        for task, count in rung.items():
            if not must and self.is_over():
                raise TimeIsOver
            own[task] = self.answer(setting, task, count)
        reference = own if must else self.points[Setting()].answers
        return Point(setting, own, {task: reference[task][:count] for task, count in rung.items()})


def near_front(points: Iterable[Point], cost: CostKind) -> list[Point]:
    """The front, the front of what is left without it, and so on: what may yet turn out to be the best."""
    rest, kept = [*points], list[Point]()
    for _ in range(LAYERS):
        layer = front(rest, cost)
        kept += layer
        rest = [one for one in rest if one not in layer]
    return kept


def candidates(points: Iterable[Point], cost: CostKind) -> list[Point]:
    """Of these points up to three, from the dearest to the cheapest.

    Of the front the cheapest and the dearest, then of the front without them: one lucky point may hide the others."""
    rest, picks = [*points], list[Point]()
    while rest and len(picks) < MOST_CANDIDATES:
        layer = front(rest, cost)
        picks += [layer[-1], *layer[:-1][:1]]
        rest = [one for one in rest if one not in picks]
    return sorted(picks[:MOST_CANDIDATES], key=lambda one: one.costs[cost], reverse=True)


def parted(exercise: Exercise) -> tuple[Exercise, Exercise]:
    """The items that choose, of every kind every third one, and those that confirm.

    The search asks many settings, and so has fewer: its choice need not be sure. Their order is that of a hash, so
    that the first ones of a file that is sorted stand for all. InputError where one part would be empty."""
    places: dict[str, int] = {}
    parts: tuple[list[str], list[str]] = ([], [])
    for item in sorted(exercise.items, key=_digest):
        kind = "" if exercise.task.kind is None else exercise.task.kind(item)
        parts[places.setdefault(kind, len(places)) % 3 > 0].append(item)
        places[kind] += 1
    if not parts[0] or not parts[1]:
        raise InputError(f"{exercise.task.name} has {len(exercise.items)} items; a sweep needs two at least")
    return Exercise(exercise.task, parts[0]), Exercise(exercise.task, parts[1])


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
