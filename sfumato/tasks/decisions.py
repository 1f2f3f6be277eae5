"""Typed questions over small documents, whose right chances are known.

An item is a document of short lines, a question of one kind (`questions`), and a label. One line says how far labels
can be trusted: "trust 7 of 10". With that chance the label is the true answer, else another one: any other option
alike, or for a score the level next to it. So every item has exact chances, against which a model's probabilities can
be held: the best accuracy there is, and the least log loss.

    contains   noul     is a colour or a name in the document?
    larger     choice   which of the named has the largest number?
    count      score    how many lines have this colour?
    odd        choice   which line has another colour than the rest?
    route      choice   which option, each described by a colour, takes the named line?
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sfumato.errors import InputError
from sfumato.questions import Choice, Noul, Score, question_of, record_of, state_text

NAMES = tuple("ann bob cat dan eve fay gus hal ida jon kim leo may ned".split())
SECOND = tuple("fox lee ray".split())
"""Second words of a name: "ann" and "ann lee" may stand in one document."""
COLOURS = tuple("red blue green gold pink grey black white".split())
DESKS = tuple("billing repair sales orders support returns".split())
PARTS = tuple("desk team".split())
"""Second words of a desk."""
LEVELS = tuple("none one two three four five six seven eight nine".split())
TRUST: Mapping[int, float] = {10: 0.4, 9: 0.2, 8: 0.15, 7: 0.15, 6: 0.1}
"""How often a document says so many of ten."""

OptionQuestion = Noul | Choice | Score
"""A question with options."""

TrueItem = tuple[str, OptionQuestion, int]
"""The lines of a document, the question, and the number of its true answer."""


@dataclass(frozen=True)
class LabelledQuestion:
    """An item, taken apart."""

    kind: str
    state: str
    question: OptionQuestion
    chances: tuple[float, ...]
    """Of each option, in the question's order."""
    label: int
    """The option that was drawn."""

    @property
    def words(self) -> list[str]:
        """What a model would write for each option."""
        return self.question.words

    @property
    def likeliest(self) -> int:
        """The option with the largest chance: the true one."""
        return max(range(len(self.chances)), key=self.chances.__getitem__)

    def text(self) -> str:
        """The item as one line of JSON."""
        record = {"kind": self.kind, "state": self.state, "question": record_of(self.question)}
        return json.dumps({**record, "chances": self.chances, "label": self.label}, separators=(",", ":"))


def read(item: str) -> LabelledQuestion:
    """The parts of an item; InputError for a text that is none."""
    try:
        record = json.loads(item)
        question = question_of(record["question"])
        if not isinstance(question, Noul | Choice | Score):
            raise ValueError("its question has no options")
        return LabelledQuestion(
            record["kind"], record["state"], question, tuple(map(float, record["chances"])), record["label"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{item[:60]!r} is no item of decisions; take one that `generate` made") from error


def generate(rng: np.random.Generator, kind: str | None = None) -> str:
    """A random item, of a random kind unless one is named. InputError for a kind that there is not."""
    if kind is None:
        kind = _one(rng, [*KINDS])
    elif kind not in KINDS:
        raise InputError(f"there is no kind {kind!r}; the kinds are: {', '.join(KINDS)}")
    lines, question, truth = KINDS[kind](rng)
    trust = int(rng.choice([*TRUST], p=[*TRUST.values()]))
    chances = chances_of(question, truth, trust)
    label = int(rng.choice(len(chances), p=chances))
    return LabelledQuestion(kind, f"trust {trust} of 10\n{lines}", question, chances, label).text()


def chances_of(question: OptionQuestion, truth: int, trust: int) -> tuple[float, ...]:
    """The chance of each option: `trust` of ten for the true one, the rest for the others, or a score's neighbours."""
    count = len(question.options)
    others = [option for option in range(count) if option != truth]
    if question.kind == "score":
        others = [option for option in others if abs(option - truth) == 1]
    chances = np.zeros(count)
    chances[others] = (10 - trust) / 10 / len(others)
    chances[truth] = trust / 10
    return tuple(map(float, chances))


def prompt(item: str) -> str:
    """The user's message for an item: the text that `decide` reads for one question."""
    one = read(item)
    return f"{state_text(one.state)}\n\n{one.question.text()}"


def answer(item: str) -> str:
    """The word of the label, which may be wrong."""
    one = read(item)
    return one.words[one.label]


def is_right(text: str, item: str) -> bool:
    """Is this the word of the likeliest option? Never raises for an item of `generate`."""
    one = read(item)
    return text == one.words[one.likeliest]


# ---- kinds -----------------------------------------------------------------------------------------------------------


def _one(rng: np.random.Generator, values: Sequence[str]) -> str:
    return values[int(rng.integers(len(values)))]


def _some(rng: np.random.Generator, values: Sequence[str], count: int) -> list[str]:
    """Different ones, in random order."""
    return [values[place] for place in rng.permutation(len(values))[:count]]


def _people(rng: np.random.Generator, count: int) -> list[str]:
    """Different names; some of two words, which may begin with another one. Many are of one word each."""
    if count > 6:
        return _some(rng, NAMES, count)
    people: list[str] = []
    for name in _some(rng, NAMES, count):
        if people and len(people) < count and rng.random() < 0.1:
            people.append(f"{people[-1].split()[0]} {_one(rng, SECOND)}")
        people.append(f"{name} {_one(rng, SECOND)}" if rng.random() < 0.15 else name)
    people = list(dict.fromkeys(people))[:count]
    return [people[place] for place in rng.permutation(len(people))]


def _lines(people: Sequence[str], *values: Sequence[Any]) -> str:
    return "\n".join(f"{name}: {' '.join(map(str, rest))}" for name, *rest in zip(people, *values, strict=True))


def _colours(rng: np.random.Generator, count: int) -> list[str]:
    return [_one(rng, COLOURS) for _ in range(count)]


def _contains(rng: np.random.Generator) -> TrueItem:
    people = _people(rng, int(rng.integers(3, 7)))
    colours = _colours(rng, len(people))
    is_there = bool(rng.random() < 0.5)
    if rng.random() < 0.7:
        rest = [colour for colour in COLOURS if colour not in colours]
        word = _one(rng, colours if is_there else rest)
        texts = ["Is any line {}?", "Is there {}?", "Does the text have {}?"]
    else:
        firsts = {name.split()[0] for name in people}
        word = _one(rng, people) if is_there else _one(rng, [name for name in NAMES if name not in firsts])
        texts = ["Is there {}?", "Does the text name {}?"]
    question = Noul(_one(rng, texts).format(word))
    if rng.random() < 0.2:
        question = Noul(criteria={"true": f"there is {word}", "false": f"there is no {word}"})
    return _lines(people, colours), question, 0 if is_there else 1


def _larger(rng: np.random.Generator) -> TrueItem:
    people = _people(rng, int(rng.integers(3, 6)))
    digits = [int(digit) for digit in rng.permutation(10)[: len(people)]]
    options = _some(rng, people, int(rng.integers(2, 5)))
    truth = max(range(len(options)), key=lambda place: digits[people.index(options[place])])
    text = _one(rng, ["Who has more?", "Which has the largest number?", "Who has most?"])
    return _lines(people, digits), Choice(options, text), truth


def _count(rng: np.random.Generator) -> TrueItem:
    size = int(rng.integers(3, 10))
    people, colour = _people(rng, size), _one(rng, COLOURS)
    others = [other for other in COLOURS if other != colour]
    truth = int(rng.integers(0, len(people) + 1))
    colours = [colour] * truth + [_one(rng, others) for _ in range(len(people) - truth)]
    colours = [colours[place] for place in rng.permutation(len(people))]
    levels = int(rng.integers(max(len(people), 4), 10)) + 1 if len(people) < 9 else 10
    text = _one(rng, ["How many are {}?", "How many lines are {}?", "Count {}."]).format(colour)
    return _lines(people, colours), Score(LEVELS[:levels], text), truth


def _odd(rng: np.random.Generator) -> TrueItem:
    people = _people(rng, int(rng.integers(3, 9)))
    most, other = _some(rng, COLOURS, 2)
    place = int(rng.integers(len(people)))
    colours = [other if line == place else most for line in range(len(people))]
    options = _some(rng, people, len(people))
    text = _one(rng, ["Which line is odd?", "Which is not like the others?", "Who differs?"])
    return _lines(people, colours), Choice(options, text), options.index(people[place])


def _route(rng: np.random.Generator) -> TrueItem:
    people = _people(rng, int(rng.integers(3, 6)))
    colours = _colours(rng, len(people))
    place = int(rng.integers(len(people)))
    colour = colours[place]
    rest = _some(rng, [other for other in COLOURS if other != colour], int(rng.integers(1, 4)))
    meanings = _some(rng, [colour, *rest], len(rest) + 1)
    desks: list[str] = []
    for desk in _some(rng, DESKS, len(meanings)):
        share = rng.random()
        desks.append(f"{desk} {_one(rng, PARTS)}" if share < 0.2 else desk)
    if rng.random() < 0.15:
        desks[1] = f"{desks[0].split()[0]} {_one(rng, PARTS)}"
        desks[0] = desks[0].split()[0]
    text = _one(rng, ["Where does {} go?", "Which takes {}?"]).format(people[place])
    return _lines(people, colours), Choice(dict(zip(desks, meanings, strict=True)), text), meanings.index(colour)


KINDS: Mapping[str, Callable[[np.random.Generator], TrueItem]] = {
    "contains": _contains,
    "larger": _larger,
    "count": _count,
    "odd": _odd,
    "route": _route,
}
"""Makers of a document with its question, by the name of the kind."""
