"""The skills that `sfumato demo` shows: an item's prompt, its canvas at work, the answer, and what the checker says.

On a terminal that has colours the canvas is drawn at every step; elsewhere the same facts are plain text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.text import Text

from sfumato.cli.answers import screen
from sfumato.cli.sudoku import finished_board, watch
from sfumato.cli.view import WRITTEN, CanvasView, TimedEvents, canvas_frame, canvas_text, colour, visible
from sfumato.errors import InputError
from sfumato.events import Draft, Usage
from sfumato.options import Options
from sfumato.tasks import decisions, edits, graphs, infill, smiles, sudoku
from sfumato.tasks.task import TASKS, Task, drawn
from sfumato.templates.requests import QueryFor

if TYPE_CHECKING:
    from sfumato.evals.tasks import TaskAnswer
    from sfumato.llm import LLM

CLUES = range(34, 46)
"""Of the puzzles that are shown."""
SAMPLES = 8
"""Draws of noise that a decision is read from."""


@dataclass(frozen=True)
class Stage:
    """Where skills are shown, and with which options. Only where it `is_live`, canvases are drawn at every step."""

    console: Console
    options: Options
    is_live: bool = False
    delay: float = 0.0

    @property
    def view(self) -> CanvasView:
        """What draws a canvas."""
        return CanvasView(self.console, self.delay)

    def say(self, text: Text) -> None:
        """Print lines, as wide as they are: the terminal breaks them."""
        self.console.print(text, soft_wrap=True)

    def end(self, is_right: bool, verdict: str, figures: str) -> None:
        """Print what the checker says, and what the answer took."""
        word = ("right", "bold green") if is_right else ("wrong", "bold red")
        self.say(Text.assemble(word, visible(f": {verdict}"), "\n", visible(figures, "dim")))


@dataclass(frozen=True)
class Skill:
    """What is shown under one name."""

    name: str
    model: str
    sentence: str
    task: Task
    show: Callable[[Stage, LLM, str], None]
    """Shows an item of the task."""


@dataclass(frozen=True)
class TextLook:
    """How an item that is answered with a text is shown."""

    answer: Callable[[str], Text]
    """The finished answer on the screen, without white space around it."""
    verdict: Callable[[TaskAnswer], str]
    """What the checker says of it, behind "right: " or "wrong: "."""
    draft: Callable[[Draft], Text] = field(default=lambda draft: canvas_text(draft))
    """A draft on the screen."""
    start: Text | None = None
    """What stands on the canvas before the first step."""


def item_of(skill: Skill, seed: int) -> str:
    """The item that a seed shows: one that no run trains on, whichever skills are shown before it."""
    place = [*SKILLS].index(skill.name)
    return drawn(skill.task, 1, np.random.default_rng([seed, place]), held_out=True)[0]


def skill_of(name: str) -> Skill:
    """InputError for a name that there is not."""
    if name not in SKILLS:
        raise InputError(f"there is no skill {name!r} to show; the skills are: {', '.join(SKILLS)}")
    return SKILLS[name]


def _figures(usage: Usage, seconds: float) -> str:
    milliseconds = f"{1000 * seconds:.0f} ms"
    if not usage.tokens:  # nothing was written: positions were read
        return f"{usage.passes} pass{'es' if usage.passes != 1 else ''}, {milliseconds}"
    steps = f"{usage.steps} step{'s' if usage.steps != 1 else ''}"
    return f"{steps}, {usage.tokens_per_pass:.1f} tokens per pass, {milliseconds}"


# ---- skills that answer with a text ----------------------------------------------------------------------------------


def _show_text(stage: Stage, llm: LLM, task: Task, item: str, look: TextLook) -> None:
    from sfumato.evals.tasks import judged, query_of

    options = replace(stage.options, drafts=stage.is_live)
    query: QueryFor[Any] = query_of(task, item, options, llm.model.config.canvas_length)
    view, outcomes = stage.view, TimedEvents(llm.outcomes(query))
    result: Any = None
    try:
        if stage.is_live and look.start is not None:
            view.show(look.start)
        for outcome in outcomes:
            if isinstance(outcome, Draft):
                view.show(canvas_frame(outcome, look.draft(outcome), stage.console))
            else:
                result = outcome
    finally:
        view.close()
    answer = judged(task, item, result.text, result.usage)
    stage.say(look.answer(answer.text.strip() or "(nothing)"))
    stage.end(answer.is_right, look.verdict(answer), _figures(result.usage, outcomes.seconds))


def _show_edit(stage: Stage, llm: LLM, item: str) -> None:
    edit = edits.read(item)
    stage.say(Text.assemble(visible(edit.instruction), "\n", visible(edit.text, "dim")))

    def verdict(answer: TaskAnswer) -> str:
        if answer.is_right:
            return "the edited document, to the byte"
        rest = "all else stands; " if answer.measures["untouched"] else ""
        return f"{rest}it should be\n{edit.edited}"

    look = TextLook(
        lambda text: _changed(edit.text, text),
        verdict,
        start=visible(edit.text),
    )
    _show_text(stage, llm, TASKS["edits"], item, look)


def _changed(old: str, new: str) -> Text:
    """The new text, with what is new in it marked."""
    text = Text()
    for kind, _, _, start, end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        text.append_text(visible(new[start:end], "" if kind == "equal" else WRITTEN))
    return text


def _show_infill(stage: Stage, llm: LLM, item: str) -> None:
    code = infill.read(item).code
    before, _, after = code.partition(infill.GAP)
    if not stage.is_live:
        stage.say(visible(code + "\n"))

    def within(piece: Text) -> Text:
        return Text.assemble(visible(before, "dim"), piece, visible(after, "dim"))

    def verdict(answer: TaskAnswer) -> str:
        if answer.is_right:
            return f"run on {infill.INPUTS} inputs, it gives what the words say"
        fault = "it gives something else" if answer.measures["parses"] else "that is no Python"
        return f"{fault}; {infill.answer(item)} would be right"

    look = TextLook(
        lambda text: within(visible(text, WRITTEN)),
        verdict,
        lambda draft: within(canvas_text(draft, has_mark=False)),
        within(visible(infill.GAP, "bold")),
    )
    _show_text(stage, llm, TASKS["infill"], item, look)


def _show_molecule(stage: Stage, llm: LLM, item: str) -> None:
    task = TASKS["molecules"]
    stage.say(visible(task.prompt(item)))

    def verdict(answer: TaskAnswer) -> str:
        text = answer.text.strip()
        formula, rings = smiles.formula_of(text), smiles.ring_count(text)
        facts = f"{formula} with {rings} ring{'s' if rings != 1 else ''}"
        if answer.is_right:
            return f"a valid molecule and as asked, {facts}"
        fault = "no molecule" if formula is None else f"valid, but not as asked: {facts}"
        return f"{fault}; {task.answer(item)} would be right"

    _show_text(stage, llm, task, item, TextLook(visible, verdict))


# ---- plots -----------------------------------------------------------------------------------------------------------


def _show_plot(stage: Stage, llm: LLM, item: str) -> None:
    task = TASKS["graphs"]
    stage.say(visible(item.split("\n")[0]))
    right = task.answer(item).split("\n")

    def answer(text: str) -> Text:
        rows = [list(line[: graphs.SIZE].ljust(graphs.SIZE, "?")) for line in text.split("\n")[: graphs.SIZE]]
        rows += [["?"] * graphs.SIZE] * (graphs.SIZE - len(rows))
        return plot(item, rows, lambda row, column: "" if rows[row][column] == right[row][column] else "bold red")

    def draft(draft: Draft) -> Text:
        wide = graphs.SIZE + 1  # a line feed ends each row
        pieces, entropies = [*draft.pieces, *[""] * (wide * wide)], [*draft.entropies, *[0.0] * (wide * wide)]
        rows = [pieces[row * wide : row * wide + graphs.SIZE] for row in range(graphs.SIZE)]
        return plot(item, rows, lambda row, column: colour(entropies[row * wide + column]))

    def verdict(answer: TaskAnswer) -> str:
        return f"{round(answer.measures['cells'] * graphs.SIZE**2)} of {graphs.SIZE**2} cells"

    _show_text(stage, llm, task, item, TextLook(answer, verdict, draft))


def plot(item: str, rows: list[list[str]], style: Callable[[int, int], str]) -> Text:
    """The nine rows of nine cells of a plot with its axes; a cell that is neither marked nor empty is noise."""
    x, y = (line.split()[1:] for line in item.split("\n")[1:])
    text = Text()
    for row, cells in enumerate(rows):
        text.append(f"{int(y[1]) - row:>3} ", style="dim")
        for column, cell in enumerate(cells):
            shown = cell if cell in (graphs.MARK, graphs.EMPTY) else "?"
            text.append(f" {shown}", style=f"{style(row, column)} {'bold' if shown == graphs.MARK else ''}".strip())
        text.append("\n")
    return text.append(f"     {x[0]:<{2 * graphs.SIZE - 3}}{x[1]:>2}", style="dim")


# ---- skills with a screen of their own -------------------------------------------------------------------------------


def _puzzle(rng: np.random.Generator) -> str:
    return sudoku.generate(int(rng.integers(CLUES.start, CLUES.stop)), rng)


def _show_sudoku(stage: Stage, llm: LLM, item: str) -> None:
    from sfumato.evals import sudoku as task

    options = replace(stage.options, max_tokens=llm.model.config.canvas_length)
    clues = sum(cell != "0" for cell in item)
    if stage.is_live:
        solved = watch(llm, item, options, True, stage.view)
        stage.console.print(finished_board(solved, f"{clues} clues", stage.console.width))
    else:
        (solved,) = task.solve(llm, [item], options)
        stage.say(visible(f"{sudoku.render(item)}\n{clues} clues\n{sudoku.render(item, solved.answer)}"))
    wrong = sum(digit != cell for digit, cell in zip(sudoku.solve(item) or "", solved.answer, strict=False))
    verdict = (
        "every row, column and box has each digit once" if solved.solved else f"{wrong} cells are not the solution's"
    )
    usage = Usage(steps=solved.steps, passes=solved.passes, tokens=solved.tokens)
    stage.end(solved.solved, verdict, _figures(usage, solved.seconds))


def _show_decision(stage: Stage, llm: LLM, item: str) -> None:
    one = decisions.read(item)
    stage.say(Text.assemble(visible(one.state, "dim"), "\n", visible(one.question.text())))
    answers = llm.decide(one.state, {one.kind: one.question}, samples=SAMPLES, seed=stage.options.seed)
    decision = answers[one.kind]
    stage.console.print(screen(answers, {one.kind: one.question}))
    name = [*one.question.options][one.likeliest]
    read, chance = decision.probabilities[name], one.chances[one.likeliest]
    verdict = f"the true answer is {one.words[one.likeliest]}; its chance is {chance:.0%}, it was read as {read:.1%}"
    stage.end(decision.choice == name, verdict, _figures(answers.usage, answers.usage.seconds))


SKILLS: Mapping[str, Skill] = {
    skill.name: skill
    for skill in (
        Skill(
            "sudoku",
            "nano",
            "A board fills up, all cells at once.",
            replace(TASKS["sudoku"], generate=_puzzle),
            _show_sudoku,
        ),
        Skill(
            "edits",
            "nano-skills",
            "A small document is changed in place, as an instruction says.",
            TASKS["edits"],
            _show_edit,
        ),
        Skill(
            "infill",
            "nano-skills",
            "What is missing in a Python function, run to check it.",
            TASKS["infill"],
            _show_infill,
        ),
        Skill(
            "molecules",
            "nano-skills",
            "Molecules as SMILES, with a missing part or asked-for properties.",
            TASKS["molecules"],
            _show_molecule,
        ),
        Skill(
            "graphs",
            "nano-skills",
            "A plot in characters, from an expression and its axes.",
            TASKS["graphs"],
            _show_plot,
        ),
        Skill(
            "decisions",
            "nano-decide",
            "A typed question about a document, answered with probabilities.",
            TASKS["decisions"],
            _show_decision,
        ),
    )
}
"""The skills by name, in the order in which they are shown."""
