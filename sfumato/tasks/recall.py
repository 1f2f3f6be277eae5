"""Drills for `decisions`: conversations about one document, with several typed questions and a step that they need.

A model that begins from random weights learns from answers, and a typed question has one. Here a document of the same
kind has many, in turns; between typed questions stand some that ask what a name has. An item is JSON: the user's
messages and their answers in turn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from sfumato.tasks import decisions

TURNS = 5


def generate_noisy(rng: np.random.Generator) -> str:
    """Five turns about one document, each answer drawn by its chances."""
    return generate(rng, is_true=False)


def generate(rng: np.random.Generator, is_true: bool = True) -> str:
    """Five turns about one document. Answers are the true ones, whatever trust the document speaks of."""
    pairs = []
    some = decisions.conversation(rng, TURNS)
    for one in some:
        if is_true and rng.random() < 0.08:
            pairs.append(_step(rng, one.state))
        else:
            pairs.append((one.question.text(), one.words[one.likeliest if is_true else one.label]))
    (first, answer), *rest = pairs
    return json.dumps([[f"{some[0].state}\n\n{first}", answer], *rest], separators=(",", ":"))


def earlier(item: str) -> Sequence[tuple[str, str]]:
    """The turns before the last one."""
    return [(text, answer) for text, answer in json.loads(item)[:-1]]


def prompt(item: str) -> str:
    """The user's last message."""
    return str(json.loads(item)[-1][0])


def answer_text(item: str) -> str:
    """The answer to it."""
    return str(json.loads(item)[-1][1])


def _step(rng: np.random.Generator, state: str) -> tuple[str, str]:
    """What the document says of a name."""
    lines = state.split("\n")[1:]
    name, _, value = lines[int(rng.integers(len(lines)))].rpartition(" ")
    return f"This one?\n{name}", value
