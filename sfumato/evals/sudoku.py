"""Sudoku as a task: a puzzle becomes a chat with pinned clues, an answer is right or wrong, never nearly right."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sfumato.errors import InputError
from sfumato.evals.tasks import endings, template_of
from sfumato.events import Done, Usage
from sfumato.llm import LLM
from sfumato.options import Options
from sfumato.tasks import sudoku
from sfumato.templates.interface import LanguageModel


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
    return _judged(puzzle, done.text, done.usage, done.seed, done.usage.seconds if seconds is None else seconds)


def _judged(puzzle: str, text: str, usage: Usage, seed: int, seconds: float) -> Solved:
    answer = "".join(text.split())[:81]
    return Solved(
        puzzle=puzzle,
        answer=answer,
        solved=sudoku.is_solved(answer, puzzle),
        steps=usage.steps,
        seconds=round(seconds, 4),
        passes=usage.passes,
        tokens=usage.tokens,
        tokens_per_pass=round(usage.tokens_per_pass, 2),
        seed=seed,
    )


def solve_anywhere(llm: LanguageModel, puzzle: str, options: Options, pinned: bool = True) -> Solved:
    """Solve one puzzle with a model that may be behind a URL: pinned clues are the fixed texts of a template.

    One token after another, or without pins, it is an answer in a chat, 82 tokens at most."""
    messages = [{"role": "user", "content": sudoku.prompt(puzzle)}]
    began = time.perf_counter()
    if not pinned or options.mode == "autoregressive":
        completion = llm.chat(messages, options=replace(options, max_tokens=options.max_tokens or 82))
        text, usage, seed = completion.text, completion.usage, completion.seed
    else:
        template = template_of(81, {cell: digit for cell, digit in enumerate(puzzle) if digit != "0"})
        filled = llm.fill(template, messages, options=replace(options, mode=None))
        text, usage, seed = filled.text, filled.usage, filled.seed
    return _judged(puzzle, text, usage, seed, time.perf_counter() - began)


def solve(llm: LLM, puzzles: Sequence[str], options: Options, pinned: bool = True, batch: int = 1) -> Iterator[Solved]:
    """Solve puzzles in order, `batch` at a time. In a batch `seconds` is the batch's time until that row was done."""
    for start in range(0, len(puzzles), batch):
        some = puzzles[start : start + batch]
        ids, pins = zip(*(request(llm, puzzle, pinned) for puzzle in some), strict=True)
        yield from map(result, some, endings(llm, ids, [options] * len(some), pins))
