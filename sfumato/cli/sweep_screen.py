"""What a sweep came to, for a person and for a program: a table, a record, a picture, a preset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from sfumato.cli.eval_runs import RunSetting, facts_of
from sfumato.cli.eval_screen import screen_console
from sfumato.cli.output import encodable
from sfumato.cli.tables import RULE, FittingTable
from sfumato.cli.view import visible
from sfumato.evals.choice import preset_of
from sfumato.evals.curve import Point, front, signed
from sfumato.evals.curve_picture import draw
from sfumato.evals.sweep import SweepResult
from sfumato.measure.machine import environment
from sfumato.presets import Preset
from sfumato.templates.interface import LanguageModel


@dataclass(frozen=True)
class SweepReport:
    """The result of a sweep, and of what it is one."""

    result: SweepResult
    first: RunSetting
    """The reference."""
    llm: LanguageModel
    axes: Sequence[str]

    @property
    def errors(self) -> list[str]:
        """A sentence for each item that the reference could not answer."""
        answers = self.result.points[0].answers
        return [f"{task}: {one.error}" for task, some in answers.items() for one in some if one.error]

    def record(self) -> dict[str, Any]:
        """What is written as JSON."""
        facts = facts_of(self.llm, self.first)
        head = {"what": "curve", "seed": self.first.options.seed, **facts, "axes": [*self.axes]}
        return head | self.result.to_dict() | {"environment": environment(facts.get("device", "cpu"))}

    def drawn(self) -> str:
        """The picture, as SVG."""
        return draw(self.result, f"{self.first.name}: quality against steps and time")

    def preset(self) -> Preset | None:
        """The chosen setting with what speaks for it; None where there is none."""
        chosen = self.result.choice.chosen
        if chosen is None:
            return None
        facts = facts_of(self.llm, self.first)
        about = environment(facts.get("device", "cpu"))
        tasks = {
            task: {"items": score.items, "right": round(score.share, 4), "steps": round(score.steps, 2)}
            for task, score in chosen.scores.items()
        }
        evidence = {
            "model": self.first.name,
            "reference": facts,
            "seed": self.first.options.seed,
            "tasks": tasks,
            "choice": self.result.choice.to_dict(),
            "environment": about,
        }
        return preset_of(chosen.setting, self.first.options, self.first.load, evidence)

    def show(self) -> None:
        """The table, and what came of it, on standard output."""
        console, tasks = screen_console(), [*self.result.points[0].answers]
        table = Table(box=RULE, padding=(0, 1), header_style="dim")
        table.add_column(visible(self.first.name), no_wrap=True)
        for name in ("items", "points", "95 % interval", "steps", "passes", "time", *map(_head, tasks)):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        best = {point.setting for kind in ("steps", "milliseconds") for point in front(self.result.whole, kind)}
        for point in sorted(self.result.points, key=lambda one: one.costs[self.result.cost], reverse=True):
            table.add_row(visible(point.setting.name), *_cells(point), self._word(point, point.setting in best))
        console.print(FittingTable(table))
        words = "points: right, against the reference on the same items; steps, passes and time: of the reference's"
        console.print(words, style="dim", soft_wrap=True)
        console.print(visible(encodable(self.result.choice.sentence), "bold"), soft_wrap=True)
        if not self.result.is_complete:
            console.print("the time was over before all was tried; a larger --budget tries more", style="dim")

    def _word(self, point: Point, is_on_front: bool) -> str:
        """What is said of a setting at the end of its row."""
        chosen = self.result.choice.chosen
        if chosen is not None and chosen.setting == point.setting:
            return "chosen"
        if point is self.result.points[0]:
            return "reference"
        return "front" if is_on_front else "" if point in self.result.whole else "partly"


def _cells(point: Point) -> list[str]:
    low, high = point.loss_interval
    work = [f"{point.costs[kind]:.0%}" for kind in ("steps", "passes", "milliseconds")]
    points = (
        [signed(-point.loss), encodable(f"{signed(-high)} – {signed(-low)}")] if point.setting.changes else ["", ""]
    )
    right = [f"{score.share:.1%} {score.steps:5.1f}" for score in point.scores.values()]
    return [f"{point.items:,}", *points, *work, *right]


def _head(task: str) -> str:
    return f"{task[:20]}, steps"
