"""Sorting: digits in, the same digits in order out; small, exact, and nothing that a model of Sudoku knows.

A list is a string of `COUNT` digits, each 1 to 9, so that every one is a token of its own in nano's vocabulary. An
answer is right or wrong, never nearly right: there are 43,758 different ones, so that a guess finds none.
"""

from __future__ import annotations

import numpy as np

from sfumato.errors import InputError

COUNT = 10
"""Digits of a list."""


def generate(rng: np.random.Generator, count: int = COUNT) -> str:
    """A random list of `count` digits, each equally likely. InputError for a count below 1."""
    if count < 1:
        raise InputError(f"a list of {count} digits has nothing to sort; give 1 or more")
    return "".join(map(str, rng.integers(1, 10, count)))


def prompt(digits: str) -> str:
    """The user's message for a list: one line of words, one of digits."""
    return "Sort these digits:\n" + digits


def answer_text(digits: str) -> str:
    """The answer to `prompt`: the same digits, smallest first, and nothing else."""
    return "".join(sorted(digits))


def is_sorted(answer: object, digits: str) -> bool:
    """Is `answer` exactly the digits of the list in order? Never raises."""
    return isinstance(answer, str) and answer == answer_text(digits)
