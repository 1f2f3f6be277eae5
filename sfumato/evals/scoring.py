"""What answers come to: a row for each task and each kind of its items, and two rows on the same items beside another.

Shares have Wilson's interval; two settings are compared item by item (`statistics`). It lacks a figure over several
tasks: their items are of different worth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sfumato.errors import InputError
from sfumato.evals.statistics import Interval, PairedCounts, wilson
from sfumato.evals.tasks import TaskAnswer

_PLACES = 6


@dataclass(frozen=True)
class TaskScore:
    """What the answers of one task, or of one kind of its items, come to."""

    task: str
    kind: str
    """"": all kinds."""
    items: int
    right: int
    measures: Mapping[str, float] = field(default_factory=dict)
    """Means of `Task.measures`."""
    steps: float = 0.0
    """Mean of an item, as are the next two."""
    passes: float = 0.0
    tokens: float = 0.0
    milliseconds: float = 0.0
    """Of the model's time for an item: see `TaskAnswer.cost_seconds`."""
    errors: int = 0
    """Items that the model could not answer; they count as wrong."""

    @classmethod
    def of(cls, task: str, kind: str, results: Sequence[TaskAnswer]) -> TaskScore:
        """The score of these answers."""
        count = max(1, len(results))
        totals: dict[str, list[float]] = {}
        for result in results:
            for name, value in result.measures.items():
                totals.setdefault(name, []).append(value)
        return cls(
            task,
            kind,
            len(results),
            sum(result.is_right for result in results),
            {name: sum(values) / len(values) for name, values in totals.items()},
            sum(result.steps for result in results) / count,
            sum(result.passes for result in results) / count,
            sum(result.tokens for result in results) / count,
            1000 * sum(result.cost_seconds for result in results) / count,
            sum(bool(result.error) for result in results),
        )

    @property
    def share(self) -> float:
        """Of the items that are right."""
        return self.right / max(1, self.items)

    @property
    def interval(self) -> Interval:
        """Where the share of all such items may lie, at 95 %."""
        return wilson(self.right, self.items)

    @property
    def tokens_per_pass(self) -> float:
        """Committed tokens per pass of the stack, prompts left out; 0 where no pass is known."""
        return self.tokens / self.passes if self.passes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The record of a row."""
        low, high = self.interval
        figures = {
            "share": self.share,
            "low": low,
            "high": high,
            "steps": self.steps,
            "passes": self.passes,
            "tokens": self.tokens,
            "tokens_per_pass": self.tokens_per_pass,
            "milliseconds": self.milliseconds,
        }
        names = {"task": self.task, "kind": self.kind or None, "items": self.items, "right": self.right}
        errors = {"errors": self.errors} if self.errors else {}
        return names | _rounded(figures) | errors | {"measures": _rounded(self.measures)}


@dataclass(frozen=True)
class ScoreComparison:
    """Two settings, or two models, on the same items."""

    first: TaskScore
    second: TaskScore
    counts: PairedCounts
    same_texts: int
    """Items whose answers are the same text, character by character."""

    @property
    def agreement(self) -> float:
        """The share of items that both have right or both have wrong."""
        return (self.counts.both + self.counts.neither) / max(1, self.counts.count)

    def to_dict(self) -> dict[str, Any]:
        """The record of a comparison; the difference is the second's share less the first's."""
        low, high = self.counts.interval()
        figures = {
            "difference": self.counts.difference,
            "low": low,
            "high": high,
            "p": self.counts.p,
            "agreement": self.agreement,
        }
        names = {"task": self.first.task, "kind": self.first.kind or None, "items": self.counts.count}
        return names | vars(self.counts) | _rounded(figures) | {"same_texts": self.same_texts}


def scores_of(task: str, results: Sequence[TaskAnswer]) -> list[TaskScore]:
    """The task's row and, where there are several kinds, a row for each, sorted by name."""
    return [TaskScore.of(task, kind, some) for kind, some in _by_kind(results)]


def comparisons_of(task: str, first: Sequence[TaskAnswer], second: Sequence[TaskAnswer]) -> list[ScoreComparison]:
    """The same rows for two runs on the same items. InputError where the items differ."""
    if [one.item for one in first] != [one.item for one in second]:
        raise InputError(f"the answers to compare are to different items of {task}; run both on the same")
    rows = []
    for (kind, some), (_, others) in zip(_by_kind(first), _by_kind(second), strict=True):
        counts = PairedCounts.of([one.is_right for one in some], [one.is_right for one in others])
        same = sum(one.text == other.text for one, other in zip(some, others, strict=True))
        rows.append(ScoreComparison(TaskScore.of(task, kind, some), TaskScore.of(task, kind, others), counts, same))
    return rows


def _by_kind(results: Sequence[TaskAnswer]) -> Iterator[tuple[str, list[TaskAnswer]]]:
    yield "", [*results]
    kinds = sorted({result.kind for result in results})
    if len(kinds) > 1:
        yield from ((kind or "other", [one for one in results if one.kind == kind]) for kind in kinds)


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, _PLACES) for name, value in figures.items()}
