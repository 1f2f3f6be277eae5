"""Questions that depend on others: which can be asked when, and what the model is told of the answers before.

Pure values, for whoever carries out a query: the plan of decisions, and a client whose server knows no dependencies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sfumato.events import Decision, Decisions, Usage
from sfumato.questions import Question, Span


@dataclass
class Waves:
    """The questions of a query, asked wave by wave as the answers come."""

    questions: Mapping[str, Question]
    answers: dict[str, Decision] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    """Those that are not asked, as what they depend on does not hold."""

    def __post_init__(self) -> None:
        self._waiting = dict(self.questions)

    def next(self) -> dict[str, Question]:
        """The questions that can be asked now; none when all were asked or skipped."""
        wave: dict[str, Question] = {}
        while not wave and self._waiting:
            wave, self._waiting = self._split()
        return wave

    def decisions(self, usages: Iterable[Usage], seed: int) -> Decisions:
        """All answers, in the order of their questions."""
        ordered = {id: self.answers[id] for id in self.questions if id in self.answers}
        return Decisions(ordered, Usage.total(usages), seed, tuple(self.skipped))

    def _split(self) -> tuple[dict[str, Question], dict[str, Question]]:
        now: dict[str, Question] = {}
        later: dict[str, Question] = {}
        for id, question in self._waiting.items():
            above = question.depends_on
            if above is None or above.id in self.answers:
                if above is None or self.answers[above.id].choice == above.answer:
                    now[id] = question
                else:
                    self.skipped.append(id)
            elif above.id in self.skipped:
                self.skipped.append(id)
            else:
                later[id] = question
        return now, later


def answer_sentence(question: Question, answer: Decision) -> str:
    """The question and its answer in words, for a question that depends on them."""
    word = answer.choice
    if not isinstance(question, Span):
        word = question.words[question.options.index(answer.choice)]
    return f"{question.text()}\nThe answer was: {word}\n"
