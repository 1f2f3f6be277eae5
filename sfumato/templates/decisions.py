"""Decisions: the answers of a question as a tree of tokens, and what reads of it say about each.

An answer is a path of tokens. Where paths part, a fork, the model is read once: a canvas that begins with the path so
far says how likely each way on is, and an answer's probability is the product along its path. So it neither gains nor
loses by being long, and one that is the beginning of another ends there with the token that ends a turn. All forks are
known beforehand, so that they are read together. It deliberately lacks the model: it is given logits.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sfumato.engine.reads import Glance
from sfumato.errors import InputError
from sfumato.events import Decision
from sfumato.questions import Question, Score, Span


class Fork(NamedTuple):
    """A place where answers part: the tokens up to there, and by the next token the answers that go on with it."""

    path: tuple[int, ...]
    branches: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class AnswerSet:
    """The answers that a question may have: a name each, the tokens that stand for it, and where they part."""

    names: tuple[str, ...]
    forks: tuple[Fork, ...]

    @classmethod
    def of(cls, names: Sequence[str], tokens: Sequence[Sequence[int]], end: int) -> AnswerSet:
        """`end` is the token behind a complete answer. InputError for two answers that are the same tokens."""
        forks = []
        groups: list[tuple[tuple[int, ...], int]] = [(tuple(range(len(tokens))), 0)]
        while groups:
            group, depth = groups.pop()
            while len(group) > 1:
                branches: dict[int, list[int]] = {}
                for n in group:
                    branches.setdefault(tokens[n][depth] if depth < len(tokens[n]) else end, []).append(n)
                ended = [n for n in group if depth >= len(tokens[n])]
                if len(ended) > 1:
                    first, second = (reprlib.repr(names[n]) for n in ended[:2])
                    raise InputError(f"the options {first} and {second} are the same tokens; reword one of them")
                if len(branches) > 1:
                    path = tuple(tokens[group[0]][:depth])
                    forks.append(Fork(path, {token: tuple(some) for token, some in branches.items()}))
                    groups += [(tuple(some), depth + 1) for some in branches.values() if len(some) > 1]
                    break
                depth += 1
        return cls(tuple(names), tuple(forks))

    @property
    def deepest(self) -> int:
        """Tokens of the longest path to a fork."""
        return max((len(fork.path) for fork in self.forks), default=0)

    def glances(self, samples: int) -> tuple[Glance, ...]:
        """A canvas for each fork and each draw of noise; of an answer without alternative there is none."""
        return tuple(Glance(fork.path, tuple(fork.branches), draw) for draw in range(samples) for fork in self.forks)

    def probabilities(self, logits: Sequence[Sequence[float]]) -> list[float]:
        """The probability of each answer, from the logits that `glances` show: the mean over the draws."""
        total, draws = [0.0] * len(self.names), max(1, len(logits) // max(1, len(self.forks)))
        for draw in range(draws):
            log_p = [0.0] * len(self.names)
            for fork, own in zip(self.forks, logits[draw * len(self.forks) :], strict=False):
                whole = log_sum(own)
                for value, members in zip(own, fork.branches.values(), strict=True):
                    for n in members:
                        log_p[n] += value - whole
            total = [before + math.exp(value) for before, value in zip(total, log_p, strict=True)]
        whole_total = sum(total)
        return [value / whole_total for value in total]


def log_sum(values: Sequence[float]) -> float:
    """The logarithm of the sum of the exponentials."""
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def tempered(probabilities: Sequence[float], temperature: float) -> list[float]:
    """Probabilities with their logarithms divided by a temperature: above 1 less sure, below 1 surer."""
    if temperature == 1.0:
        return list(probabilities)
    log_p = [math.log(max(p, 1e-300)) / temperature for p in probabilities]
    whole = log_sum(log_p)
    return [math.exp(value - whole) for value in log_p]


def decision_of(
    question: Question, names: Sequence[str], probabilities: Sequence[float], places: Sequence[tuple[int, int]] = ()
) -> Decision:
    """The decision that these probabilities of a question's answers make; `places` are those of passages.

    Of answers that are equally likely it is the first."""
    best = max(range(len(names)), key=probabilities.__getitem__)
    legend = dict(zip(names, question.criteria, strict=True)) if isinstance(question, Score) else None
    place = places[best] if isinstance(question, Span) else None
    return Decision(names[best], dict(zip(names, probabilities, strict=True)), question.kind, legend, place)
