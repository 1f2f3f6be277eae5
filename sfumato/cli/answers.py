"""Decisions on the screen: a line an option, with a bar for its probability, and how sure each answer is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sfumato.cli.tables import FittingTable
from sfumato.cli.view import SMOKE, visible
from sfumato.events import Decision, Decisions
from sfumato.questions import Question, state_text

BAR = 24
"""Characters of a bar at probability 1."""
MOST = 8
"""Options that are shown of one question; of more, the likeliest."""
LONGEST = 160
"""Characters of an option, or a thought, that are shown."""


def screen(decisions: Decisions, questions: Mapping[str, Question]) -> Group:
    """All answers in the order of their questions, with those that were not asked, and what was thought."""
    thoughts = [
        visible(f"thought on {_short(id, 40)}: {_short(' '.join(decision.thought.split()), 2 * LONGEST)}", "dim italic")
        for id, decision in decisions.items()
        if decision.thought
    ]
    return Group(
        FittingTable(table(decisions, questions)), *([Padding(Group(*thoughts), (1, 0, 0, 0))] * bool(thoughts))
    )


def table(decisions: Mapping[str, Decision], questions: Mapping[str, Question]) -> Table:
    """A line an option, the likeliest first, and levels in their order; the bars are probabilities."""
    rows = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    rows.add_column(overflow="fold")
    rows.add_column(overflow="fold")
    rows.add_column(no_wrap=True)
    rows.add_column(justify="right", no_wrap=True)
    for number, (id, question) in enumerate(questions.items()):
        if number:
            rows.add_row()
        if id in decisions:
            _add(rows, id, decisions[id])
        else:
            rows.add_row(visible(id, "bold"), _why_skipped(question))
    return rows


def bar(p: float) -> Text:
    """A bar of eighths of a character on a dim ground."""
    eighths = round(p * BAR * 8)
    drawn = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
    return Text(drawn, style=SMOKE[1]).append("·" * (BAR - len(drawn)), style="dim")


def record_of(decision: Decision) -> dict[str, Any]:
    """An answer for programs: what there is of it, and no more."""
    record: dict[str, Any] = {"choice": decision.choice, "probabilities": decision.probabilities}
    record |= {"kind": decision.kind, "confidence": decision.confidence}
    if decision.kind == "score":
        record |= {"score": decision.score, "legend": decision.legend}
    if decision.place is not None:
        record["place"] = list(decision.place)
    return record if decision.thought is None else record | {"thought": decision.thought}


def _add(rows: Table, id: str, decision: Decision) -> None:
    """The lines of one answer; below its name stands how sure it is."""
    ranked = sorted(decision.probabilities.items(), key=lambda item: -item[1])
    shown = ranked if len(ranked) <= MOST + 1 else ranked[:MOST]
    if decision.kind == "score":
        shown = sorted(shown, key=lambda item: int(item[0]))
    notes = [visible(id, "bold"), *(Text(f"  {note}", style="dim") for note in _notes(decision))]
    lines = []
    for name, p in shown:
        style = "bold" if name == decision.choice else "dim"
        lines.append((visible(_label(decision, name), style), bar(p), Text(f"{p:.1%}", style)))
    if more := len(ranked) - len(shown):
        rest = sum(p for _, p in ranked[len(shown) :])
        lines.append((visible(f"… {more} more", "dim"), bar(rest), Text(f"{rest:.1%}", "dim")))
    for place in range(max(len(notes), len(lines))):
        note = notes[place] if place < len(notes) else Text()
        rows.add_row(note, *(lines[place] if place < len(lines) else ()))


def _notes(decision: Decision) -> list[str]:
    """Below the name."""
    notes = []
    if decision.kind == "score":
        notes.append(f"score {decision.score:.2f}")
    if decision.place is not None:
        notes.append(f"at {decision.place[0]}–{decision.place[1]}")
    return [*notes, f"confidence {decision.confidence:.2f}"] if len(decision.probabilities) > 1 else notes


def _label(decision: Decision, name: str) -> str:
    """What an option is called on the screen."""
    match decision.kind:
        case "noul":
            return {"true": "yes", "false": "no"}.get(name, name)
        case "score" if decision.legend is not None and name in decision.legend:
            return f"{name} {_short(state_text(decision.legend[name]))}"
        case "span":
            return f"“{_short(' '.join(name.split()))}”"
    return _short(name) or "(empty)"


def _short(text: str, most: int = LONGEST) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _why_skipped(question: Question) -> Text:
    above = question.depends_on
    why = "" if above is None else f": needs {_short(above.id, 40)} = {_short(above.answer, 40)}"
    return visible(f"not asked{why}", "dim")
