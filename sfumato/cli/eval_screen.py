"""The figures of `sfumato eval` for a person: a table of scores, and one of two runs on the same items."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sfumato.cli.eval_runs import RunResult
from sfumato.cli.output import encodable
from sfumato.cli.tables import RULE, FittingTable
from sfumato.cli.view import visible
from sfumato.evals.score_picture import draw
from sfumato.evals.scoring import ScoreComparison, TaskScore, comparisons_of, scores_of
from sfumato.measure.machine import environment
from sfumato.measure.work import size

PIPED = 160
"""Columns where the output is no terminal."""


@dataclass(frozen=True)
class EvalReport:
    """What one run or two came to: a record, a picture, and tables."""

    results: Sequence[RunResult]
    scores: Sequence[Sequence[TaskScore]]
    """The rows of each run."""
    comparisons: Sequence[ScoreComparison]
    """Of the two, where there are two."""
    seed: int

    @classmethod
    def of(cls, results: Sequence[RunResult], seed: int) -> EvalReport:
        """The report of these results."""
        scores = [[row for name, some in one.answers.items() for row in scores_of(name, some)] for one in results]
        comparisons: list[ScoreComparison] = []
        if len(results) > 1:
            first, second = results
            pairs = ((name, some, second.answers[name]) for name, some in first.answers.items())
            comparisons = [row for name, some, others in pairs for row in comparisons_of(name, some, others)]
        return cls(results, scores, comparisons, seed)

    @property
    def names(self) -> list[str]:
        """What the runs are called."""
        return [str(one.facts["name"]) for one in self.results]

    @property
    def errors(self) -> list[str]:
        """A sentence for each item that a model could not answer."""
        return [
            f"{name}: {answer.error}"
            for one in self.results
            for name, some in one.answers.items()
            for answer in some
            if answer.error
        ]

    def record(self) -> dict[str, Any]:
        """What is written as JSON."""
        runs = [
            one.facts | {"rows": [score.to_dict() | _memory(score, one.peaks) for score in scores]}
            for one, scores in zip(self.results, self.scores, strict=True)
        ]
        comparison = {"comparison": [row.to_dict() for row in self.comparisons]} if self.comparisons else {}
        device = self.results[0].facts.get("device", "cpu")
        return {"what": "eval", "seed": self.seed, "runs": runs, **comparison, "environment": environment(device)}

    def drawn(self) -> str:
        """The picture, as SVG."""
        return draw(self.scores, self.names, f"{self.names[0]}: what it has right")

    def show(self) -> None:
        """The tables, on standard output."""
        for number, (result, scores) in enumerate(zip(self.results, self.scores, strict=True)):
            if number:
                screen_console().print()
            show_scores(scores, result.peaks, self.names[number])
        if self.comparisons:
            show_comparisons(self.comparisons, self.names)


def _memory(score: TaskScore, peaks: Mapping[str, int | None]) -> dict[str, Any]:
    return {} if score.kind else {"peak_bytes": peaks.get(score.task)}


def screen_console() -> Console:
    """Standard output, wide enough for a table where it goes to a file."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPED)


def show_scores(scores: Sequence[TaskScore], peaks: Mapping[str, int | None], title: str) -> None:
    """A row for each task and kind; `peaks` is the memory of each task at most, in bytes, where it is known."""
    table = Table(box=RULE, padding=(0, 1), header_style="dim")
    table.add_column(visible(title), no_wrap=True)
    for name in ("items", "right", "95 % interval", "steps", "passes", "tokens/pass", "ms/item", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    has_measures = any(score.measures for score in scores)
    if has_measures:
        table.add_column("also")
    for score in scores:
        low, high = score.interval
        peak = None if score.kind else peaks.get(score.task)
        cells = [
            f"{score.items:,}",
            f"{score.share:.1%}",
            encodable(f"{low:.1%} – {high:.1%}"),
            _figure(score.steps),
            _figure(score.passes),
            _figure(score.tokens_per_pass),
            f"{score.milliseconds:.1f}",
            "" if peak is None else size(peak),
        ]
        if has_measures:
            cells.append(", ".join(f"{name} {value:.1%}" for name, value in score.measures.items()))
        table.add_row(_label(score), *cells)
    screen_console().print(FittingTable(table))


def show_comparisons(rows: Sequence[ScoreComparison], names: Sequence[str]) -> None:
    """Two runs on the same items: the second's share less the first's, in points, and whether that can be chance."""
    table = Table(box=RULE, padding=(0, 1), header_style="dim")
    table.add_column("the same items", no_wrap=True)
    columns = ("first", "second", "points", "95 % interval", "p", "better / worse", "agree", "same text", "steps", "ms")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        (low, high), counts = row.counts.interval(), row.counts
        table.add_row(
            _label(row.first),
            f"{row.first.share:.1%}",
            f"{row.second.share:.1%}",
            f"{100 * counts.difference:+.1f}",
            encodable(f"{100 * low:+.1f} – {100 * high:+.1f}"),
            f"{counts.p:.3f}" if counts.p >= 0.001 else "<0.001",
            f"{counts.second_only} / {counts.first_only}",
            f"{row.agreement:.1%}",
            f"{row.same_texts}/{counts.count}",
            encodable(f"{row.first.steps:.1f} → {row.second.steps:.1f}"),
            encodable(f"{row.first.milliseconds:.1f} → {row.second.milliseconds:.1f}"),
        )
    console = screen_console()
    console.print()
    console.print(FittingTable(table))
    console.print(visible(encodable(f"first: {names[0]} · second: {names[1]}"), "dim"), soft_wrap=True)
    words = "points: the second's share less the first's (Tango's interval); p: McNemar's exact test, two-sided"
    console.print(words, style="dim", soft_wrap=True)


def _label(score: TaskScore) -> Text:
    return Text("  ").append_text(visible(score.kind, "dim")) if score.kind else visible(score.task, "bold")


def _figure(value: float) -> str:
    """A mean; a server that is not Sfumato's says none."""
    return f"{value:.1f}" if value else encodable("–")
