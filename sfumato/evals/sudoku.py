"""Sudoku as a task: a puzzle becomes a chat with pinned clues, an answer is right or wrong, never nearly right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sfumato.errors import InputError
from sfumato.events import Done
from sfumato.llm import LLM
from sfumato.options import Options
from sfumato.tasks import sudoku


@dataclass(frozen=True)
class Solved:
    """What became of one puzzle. `seconds` is the whole request; `tokens_per_pass` counts no prompt pass."""

    puzzle: str
    answer: str
    solved: bool
    steps: int
    seconds: float
    passes: int
    tokens: int
    tokens_per_pass: float
    seed: int


def request(llm: LLM, puzzle: str, pinned: bool = True) -> tuple[list[int], Mapping[int, int]]:
    """Token ids of the prompt, and the clues as pins on the first canvas: cell n stands at position n."""
    prompt = llm.encode([{"role": "user", "content": sudoku.prompt(puzzle)}])
    digits = llm.tokenizer.encode("0123456789")
    if len(digits) != 10 or llm.model.config.canvas_length < 81:
        raise InputError(f"{llm.name} does not give every digit its own token on a canvas of 81; use nano")
    pins = {cell: digits[int(digit)] for cell, digit in enumerate(puzzle) if digit != "0"}
    return list(prompt), pins if pinned else {}


def result(puzzle: str, done: Done, seconds: float | None = None) -> Solved:
    """Judge a finished answer: its first 81 characters, blanks and line breaks left out."""
    answer = "".join(done.text.split())[:81]
    return Solved(
        puzzle=puzzle,
        answer=answer,
        solved=sudoku.is_solved(answer, puzzle),
        steps=done.usage.steps,
        seconds=round(done.usage.seconds if seconds is None else seconds, 4),
        passes=done.usage.passes,
        tokens=done.usage.tokens,
        tokens_per_pass=round(done.usage.tokens_per_pass, 2),
        seed=done.seed,
    )


def answer_options(options: Options, llm: LLM) -> Options:
    """Options with the answer's length filled in: one canvas, or as many tokens one at a time."""
    return options if options.max_tokens is not None else replace(options, max_tokens=llm.model.config.canvas_length)


def solve(llm: LLM, puzzles: Sequence[str], options: Options, pinned: bool = True, batch: int = 1) -> Iterator[Solved]:
    """Solve puzzles in order, `batch` at a time. In a batch `seconds` is the batch's time until that row was done."""
    options = answer_options(options, llm)
    for start in range(0, len(puzzles), batch):
        some = puzzles[start : start + batch]
        ids, pins = zip(*(request(llm, puzzle, pinned) for puzzle in some), strict=True)
        results: dict[int, Solved] = {}
        for event in llm.events(ids, options=options, pins=pins):
            if isinstance(event, Done):
                results[event.row] = result(some[event.row], event)
        yield from (results[row] for row in range(len(some)))
