"""`sfumato sudoku`: a puzzle in, a board that fills up, a checked answer out."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import numpy as np
import typer
from rich.console import Console
from rich.text import Text

from sfumato.cli import flags, loading
from sfumato.cli import options as opt
from sfumato.cli.view import CLUE, CanvasView, TimedEvents, colour
from sfumato.errors import InputError
from sfumato.events import Done, Draft
from sfumato.options import LoadOptions, Options
from sfumato.tasks import sudoku

if TYPE_CHECKING:
    from sfumato.evals.sudoku import Solved
    from sfumato.llm import LLM

FRAMED = 25
"""Columns of a board with its frame."""


@dataclass(frozen=True)
class PuzzleFlags:
    """Which puzzles to solve."""

    puzzle: Annotated[
        str | None, typer.Argument(help="81 characters, 0 or . for blank; line breaks and spaces are ignored.")
    ] = None
    file: Annotated[Path | None, typer.Option(help="A file with one puzzle a line, or one board of nine lines.")] = None
    random: Annotated[bool, typer.Option("--random", help="Make a new puzzle.")] = False
    clues: Annotated[int, typer.Option(help="Clues of a random puzzle, 24 to 55.")] = 36
    count: Annotated[int, typer.Option(min=1, help="How many random puzzles.")] = 1

    def puzzles(self, seed: int) -> list[str]:
        """The puzzles as 81 digits each; InputError where there is none, or more than one source."""
        if sum((self.puzzle is not None, self.file is not None, self.random)) != 1:
            raise InputError("give one of: a puzzle of 81 characters, --file FILE, or --random")
        if self.puzzle is not None:
            return [sudoku.parse(self.puzzle)]
        if (file := self.file) is not None:
            try:
                return sudoku.parse_file(file.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                raise InputError(f"{file} is not a text file; give one puzzle of 81 characters a line") from None
            except OSError as error:
                raise InputError(f"cannot read {file}: {error.strerror}; give a file with a puzzle a line") from None
        rng = np.random.default_rng(seed)
        return [sudoku.generate(self.clues, rng) for _ in range(self.count)]


@flags.takes(
    source=flags.group_of(PuzzleFlags),
    api=loading.API,
    options=opt.flags_of("seed", "mode", "max_steps", "temperature", usual=()),
    load=opt.load_flags_of(),
)
def command(
    *,
    source: PuzzleFlags,
    pins: Annotated[bool, typer.Option(help="Keep the clues fixed on the canvas.")] = True,
    batch: Annotated[int, typer.Option(min=1, help="Puzzles solved at once; above 1 nothing is drawn live.")] = 1,
    api: loading.ApiFlags,
    options: Options,
    load: LoadOptions,
    delay: opt.Delay = 0.12,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line a puzzle, nothing else.")] = False,
) -> None:
    """Solve Sudoku on a canvas, and check the answer. Exit code 1 if any puzzle stays unsolved.

    The model is nano unless another is named here. Each run is different; its seed is printed, and --seed repeats it.

    Example: sfumato sudoku --random --clues 36

    Example: sfumato sudoku --file puzzles.txt --json
    """
    seed = secrets.randbits(32) if options.seed is None else options.seed
    puzzles, options = source.puzzles(seed), replace(options, seed=seed)
    console = Console(highlight=False)

    from sfumato.evals import sudoku as task
    from sfumato.evals.tasks import answer_options

    model = loading.connect_or_load(api if api.api or api.model else replace(api, model="nano"), load)
    if model.is_remote:
        results = _print_each((task.solve_anywhere(model, text, options, pins) for text in puzzles), as_json)
    else:
        llm = cast("LLM", model)
        options = answer_options(options, llm)
        if console.is_terminal and not as_json and batch == 1:
            results = [_solve_live(llm, text, options, pins, console, delay) for text in puzzles]
        else:
            results = _print_each(task.solve(llm, puzzles, options, pins, batch), as_json)
    right = sum(result.solved for result in results)
    if len(results) > 1 and not as_json:
        print(f"{right} of {len(results)} solved, {_means(results)} on average")
    if right < len(results):
        raise typer.Exit(1)


def _print_each(results: Iterable[Solved], as_json: bool) -> list[Solved]:
    """Print each result as it comes; returns them all."""
    printed = []
    for result in results:
        printed.append(result)
        if as_json:
            print(json.dumps(asdict(result)), flush=True)
        else:
            print(sudoku.render(result.puzzle, result.answer))
            print(_verdict(result), flush=True)
    return printed


def _means(results: list[Solved]) -> str:
    def mean(name: str) -> float:
        return sum(float(getattr(result, name)) for result in results) / len(results)

    return f"{mean('steps'):.1f} steps, {mean('seconds'):.3f} s, {mean('tokens_per_pass'):.1f} tokens per pass"


def _solve_live(llm: LLM, puzzle: str, options: Options, pinned: bool, console: Console, delay: float) -> Solved:
    """Solve one puzzle while its board is drawn after every step, and leave the board on the screen."""
    solved = watch(llm, puzzle, options, pinned, CanvasView(console, delay))
    console.print(finished_board(solved, _verdict(solved), console.width))
    return solved


def watch(llm: LLM, puzzle: str, options: Options, pinned: bool, view: CanvasView) -> Solved:
    """Solve one puzzle while its board is drawn after every step; nothing stays on the screen."""
    from sfumato.evals import sudoku as task

    width = view.console.width
    ids, pins = task.request(llm, puzzle, pinned)
    blank = Draft(0, 0, 0, [0] * 81, [9.0] * 81, [False] * 81)
    done = None
    events = TimedEvents(
        llm.events([ids], options=replace(options, drafts=options.mode != "autoregressive"), pins=[pins])
    )
    try:
        view.show(board(puzzle, blank, ["·"] * 81, "noise", width=width))
        for event in events:
            if isinstance(event, Draft):
                cells = [llm.tokenizer.decode([token]) for token in event.tokens[:81]]
                sure = sum(event.accepted[:81])
                view.show(board(puzzle, event, cells, f"step {event.step} · {sure}/81 accepted", width=width))
            elif isinstance(event, Done):
                done = event
    finally:
        view.close()
    assert done is not None
    return task.result(puzzle, done, events.seconds)


def finished_board(solved: Solved, status: str, width: int) -> Text:
    """The board of an answer, with a line below it."""
    final = Draft(0, 0, 0, [0] * 81, [0.0] * 81, [True] * 81)
    return board(solved.puzzle, final, list(solved.answer.ljust(81, "?")), status, wrong=not solved.solved, width=width)


def _verdict(solved: Solved) -> str:
    state = "solved" if solved.solved else "NOT solved"
    return (
        f"{state} in {solved.steps} steps, {solved.seconds:.3f} s, {solved.tokens_per_pass:.1f} tokens per pass "
        f"(seed {solved.seed})"
    )


def board(puzzle: str, draft: Draft, cells: list[str], status: str, wrong: bool = False, width: int = 80) -> Text:
    """The 9 x 9 board: clues bold on a tint, the rest coloured by entropy; without its frame on a narrow terminal."""
    has_frame = width >= FRAMED
    text, rule = Text(), "├───────┼───────┼───────┤\n" if has_frame else "───┼───┼───\n"
    edge, gap = ("│ ", " ") if has_frame else ("", "")
    text.append("┌───────┬───────┬───────┐\n" if has_frame else "", style="dim")
    for row in range(9):
        if row in (3, 6):
            text.append(rule, style="dim")
        for column in range(9):
            if column % 3 == 0:
                text.append(edge if has_frame or not column else "│", style="dim")
            cell = 9 * row + column
            if puzzle[cell] != "0":
                text.append(puzzle[cell], style=f"bold {CLUE}")
            else:
                shown = cells[cell] if len(cells[cell]) == 1 and cells[cell] in "123456789" else "·"
                text.append(shown, style="red" if wrong else colour(draft.entropies[cell]))
            text.append(gap)
        text.append("│\n" if has_frame else "\n", style="dim")
    text.append("└───────┴───────┴───────┘\n" if has_frame else "", style="dim")
    text.append(status, style="bold red" if wrong else "dim")
    return text
