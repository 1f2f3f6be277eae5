"""A run of training on the terminal: a bar with the time that is left, losses, and texts as the model writes them."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from sfumato.cli.view import visible

if TYPE_CHECKING:
    from sfumato.training.samples import Sample
    from sfumato.training.train import StepReport

WIDTH = 100
"""Characters of a text that are shown."""
SECONDS = 5.0
"""Between two notes on how far the data is read."""


class TrainingView:
    """See `training.run.Display`."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._next_note = time.monotonic() + SECONDS

    def note(self, sentence: str) -> None:
        """A line of its own."""
        self.console.print(Text.assemble(visible(sentence), style="dim"), soft_wrap=True)

    def follow(self, steps: Iterable[StepReport], total: int) -> Generator[StepReport, None, None]:
        """A bar that follows the steps."""
        columns = (
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.description}"),
        )
        with bars.Progress(*columns, console=self.console) as bar:
            task = bar.add_task("", total=total)
            for report in steps:
                line = f"denoise {report.diffusion_loss:.3f} encode {report.encode_loss:.3f} nats"
                bar.update(task, completed=report.step, description=line)
                yield report

    def look(self, line: Mapping[str, Any], texts: list[Sample]) -> None:
        """Rates and losses on a line, then each text with its drafts."""
        parts = []
        for name, value in line.items():
            if name.endswith("_rate"):
                parts.append(f"{name.removesuffix('_rate')} {value:.0%} right")
            elif name.endswith("_loss"):
                parts.append(f"{name.removesuffix('_loss').replace('_', ' ')} {value:.3f}")
        self.console.print(f"step {line['step']}: {', '.join(parts)}" if parts else f"step {line['step']}")
        for sample in texts:
            for draft in sample.drafts[:-1]:
                self.console.print(Text.assemble("  ", _short(draft), style="dim"))
            self.console.print(Text.assemble("  ", _short(sample.text)))

    def read(self, done: int, total: int) -> None:
        """Every few seconds."""
        if time.monotonic() > self._next_note:
            self._next_note = time.monotonic() + SECONDS
            self.note(f"the data is {done / max(1, total):.0%} read")

    def count(self, done: int, total: int) -> None:
        """Every thousandth."""
        if done % 1000 == 0:
            self.note(f"{done} of {total} puzzles made")


def _short(text: str) -> Text:
    one_line = " ".join(text.split())
    return visible(one_line if len(one_line) <= WIDTH else one_line[: WIDTH - 1] + "…")
