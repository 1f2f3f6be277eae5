"""The figures of `sfumato calibrate` for a person: a table, and the reliability diagram in characters."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sfumato.checkpoints.calibration import LEAST, MOST
from sfumato.cli.output import encodable
from sfumato.cli.tables import RULE, FittingTable
from sfumato.cli.view import SMOKE
from sfumato.evals.calibration import FEW, Bin, Fit, KindReport

WIDTH = 18
"""Characters of a bar that is always right."""
_MARK = "│"


def show(reports: Sequence[KindReport]) -> None:
    """The table, and a diagram for each kind; before and after are on the same answers, which no fit has seen."""
    console = Console(highlight=False)
    console.print()
    console.print(FittingTable(_table(reports)))
    for report in reports:
        if report.fit is None:
            few = f"{report.kind} has {report.labels} labels, fewer than {FEW}: its temperature stays 1"
            console.print(few, style="dim")
        elif _is_at_limit(report.fit):
            limit = f"{report.kind} has a temperature at the limit: its probabilities say next to nothing"
            console.print(limit, style="dim")
    for report in reports:
        console.print()
        console.print(FittingTable(_diagram(report)))
    console.print()
    words = "Bars: the share that is right; the mark: how sure it was. After is judged on answers that no fit has seen."
    console.print(encodable(words), style="dim")


def _table(reports: Sequence[KindReport]) -> Table:
    table = Table(box=RULE, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    for name in ("labels", "temperature", "accuracy", "log loss", "Brier", "ECE", "by chance"):
        table.add_column(name, justify="right", no_wrap=True)
    for report in reports:
        best = "1"
        if report.fit is not None:
            error = encodable(f" ± {report.fit.error:.2f}") if not _is_at_limit(report.fit) else ""
            best = f"{report.fit.temperature:.2f}{error}"
        before, after = report.before, report.after
        pairs = [_pair(getattr(before, name), getattr(after, name)) for name in ("log_loss", "brier", "ece")]
        chance = f"{after.ece_by_chance:.3f}"
        table.add_row(report.kind, f"{report.labels:,}", best, f"{before.accuracy:.1%}", *pairs, chance)
    return table


def _is_at_limit(fit: Fit) -> bool:
    return not LEAST * 1.01 < fit.temperature < MOST * 0.99


def _pair(before: float, after: float) -> str:
    return encodable(f"{before:.3f} → {after:.3f}")


def _diagram(report: KindReport) -> Table:
    """A row for each bin that has answers."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(Text(report.kind, "bold"), no_wrap=True)
    for name, figures in (("before", report.before), ("after", report.after)):
        table.add_column(f"{name}, ECE {figures.ece:.3f}", no_wrap=True)
        table.add_column("right", justify="right", no_wrap=True)
        table.add_column("of", justify="right", no_wrap=True)
    count = len(report.before_bins)
    for number, (before, after) in enumerate(zip(report.before_bins, report.after_bins, strict=True)):
        if before.count or after.count:
            edges = encodable(f"{number / count:.2f}–{(number + 1) / count:.2f}")
            table.add_row(edges, *_cells(before), *_cells(after))
    return table


def _cells(one: Bin) -> tuple[Text, str, str]:
    if not one.count:
        return Text(encodable("·" * WIDTH), "dim"), "", ""
    return _bar(one), f"{one.accuracy:.0%}", f"{one.count:,}"


def _bar(one: Bin) -> Text:
    """The share that is right, and where it should end."""
    eighths = round(one.accuracy * WIDTH * 8)
    drawn = ("█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]).ljust(WIDTH, "·")
    at = min(WIDTH - 1, int(one.confidence * WIDTH))
    text = Text(encodable(drawn), style="dim")
    text.stylize(f"not dim {SMOKE[1]}", 0, -(-eighths // 8))
    marked = Text.assemble(text[:at], (encodable(_MARK), "bold"), text[at + 1 :])
    return marked
