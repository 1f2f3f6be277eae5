"""Typed questions over small documents, whose right chances are known.

An item is a document of short lines, a question of one kind (`questions`), and a label. One line says how far labels
can be trusted: "trust 7 of 10". With that chance the label is the true answer, else another one: any other option
alike, or for a score the level next to it. So every item has exact chances, against which a model's probabilities can
be held: the best accuracy there is, and the least log loss.

    contains   noul     is a colour or a name in the document?
    larger     choice   which of the named has the largest number?
    count      score    how many lines have this colour?
    odd        choice   which line has another colour than the rest?
    route      choice   which desk, each described by a colour, takes this document?
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sfumato.errors import InputError
from sfumato.questions import Choice, Noul, Score, question_of, record_of, state_text

NAMES = tuple("ann bob cat dan eve fay gus hal ida jon kim leo may ned".split())
SECOND = tuple("fox lee ray".split())
"""Second words of a name: "ann" and "ann lee" may stand in one document."""
COLOURS = tuple("red blue green gold pink grey black white".split())
PARTS = tuple("desk team".split())
"""Second words of a desk, which is named by its colour."""
LEVELS = tuple("none one two three four five six seven eight nine".split())
TRUST: Mapping[int, float] = {10: 0.5, 9: 0.2, 8: 0.1, 7: 0.1, 6: 0.1}
"""How often a document says so many of ten."""

OptionQuestion = Noul | Choice | Score
"""A question with options."""

Listing = Mapping[str, str]
"""What its lines say: a name and a colour or a digit."""


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
    document = KINDS[kind].document(rng)
    return _labelled(rng, kind, document, _trust(rng)).text()


def conversation(rng: np.random.Generator, turns: int) -> list[LabelledQuestion]:
    """Several questions about one document, of the kinds that it is for."""
    document, trust = KINDS[_one(rng, [*KINDS, "odd", "count", *["larger"] * 3])].document(rng), _trust(rng)
    kinds = [name for name, kind in KINDS.items() if kind.fits(document)]
    kinds += ["odd"] * (5 if "odd" in kinds else 0) + ["count"] * (2 if "count" in kinds else 0)  # the hardest
    return [_labelled(rng, _one(rng, kinds), document, trust) for _ in range(turns)]


def _trust(rng: np.random.Generator) -> int:
    return int(rng.choice([*TRUST], p=[*TRUST.values()]))


def _labelled(rng: np.random.Generator, kind: str, document: Listing, trust: int) -> LabelledQuestion:
    """A question about a document, and a label by its chances."""
    question, truth = KINDS[kind].question(rng, document)
    chances = chances_of(question, truth, trust)
    lines = "\n".join(f"{name} {value}" for name, value in document.items())
    return LabelledQuestion(
        kind, f"trust {trust} of 10\n{lines}", question, chances, int(rng.choice(len(chances), p=chances))
    )


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


def _size(rng: np.random.Generator, least: int, most: int) -> int:
    """A number of lines, half as likely where it is twice as large."""
    sizes = np.arange(least, most + 1)
    return int(rng.choice(sizes, p=(1 / sizes) / (1 / sizes).sum()))


def _people(rng: np.random.Generator, count: int) -> list[str]:
    """Different names, some of two words, which may begin with another one."""
    people: list[str] = []
    for name in _some(rng, NAMES, count):
        if people and len(people) < count and rng.random() < 0.05:
            people.append(f"{people[-1].split()[0]} {_one(rng, SECOND)}")
        people.append(f"{name} {_one(rng, SECOND)}" if rng.random() < 0.1 else name)
    people = list(dict.fromkeys(people))[:count]
    return [people[place] for place in rng.permutation(len(people))]


def _colours(rng: np.random.Generator, least: int, most: int) -> Listing:
    return {name: _one(rng, COLOURS) for name in _some(rng, NAMES, _size(rng, least, most))}


def _digits(rng: np.random.Generator) -> Listing:
    people = _people(rng, _size(rng, 2, 4))
    return {name: str(digit) for name, digit in zip(people, rng.permutation(10), strict=False)}


def _all_but_one(rng: np.random.Generator) -> Listing:
    people = _some(rng, NAMES, _size(rng, 3, 5))
    most, other = _some(rng, COLOURS, 2)
    place = int(rng.integers(len(people)))
    return {name: other if line == place else most for line, name in enumerate(people)}


def _mostly_one(rng: np.random.Generator) -> Listing:
    """Any number of lines of one colour, among others."""
    people = _some(rng, NAMES, _size(rng, 2, 4))
    colour, *others = _some(rng, COLOURS, len(COLOURS))
    count = int(rng.integers(0, len(people) + 1))
    colours = [colour] * count + [_one(rng, others) for _ in people[count:]]
    return {name: colours[place] for name, place in zip(people, rng.permutation(len(people)), strict=True)}


def _contains(rng: np.random.Generator, document: Listing) -> tuple[OptionQuestion, int]:
    is_there = bool(rng.random() < 0.5)
    if rng.random() < 0.7:
        values = [*document.values()]
        rest = [colour for colour in COLOURS if colour not in values]
        is_there = is_there or not rest
        word = _one(rng, values if is_there else rest)
        if rng.random() < 0.2:
            question = Noul(criteria={"true": f"there is {word}", "false": f"there is no {word}"})
            return question, 0 if is_there else 1
        text = _one(rng, ["Is any line {}?", "Is there {}?", "Does the text have {}?"])
    else:
        firsts = {name.split()[0] for name in document}
        word = _one(rng, [*document] if is_there else [name for name in NAMES if name not in firsts])
        text = _one(rng, ["Is there this one?\n{}", "Does the text name this one?\n{}"])
    return Noul(text.format(word)), 0 if is_there else 1


def _larger(rng: np.random.Generator, document: Listing) -> tuple[OptionQuestion, int]:
    options = _some(rng, [*document], min(len(document), int(rng.integers(2, 4))))
    text = _one(rng, ["Who has more?", "Which has the largest number?", "Who has most?"])
    return Choice(options, text), max(range(len(options)), key=lambda place: int(document[options[place]]))


def _count(rng: np.random.Generator, document: Listing) -> tuple[OptionQuestion, int]:
    values = [*document.values()]
    colour = max(values, key=values.count) if rng.random() < 0.7 else _one(rng, COLOURS)
    least = max(len(values), 3)
    levels = int(rng.integers(least, 10)) + 1
    text = _one(rng, ["How many are {}?", "How many lines are {}?", "Count {}."]).format(colour)
    return Score(LEVELS[:levels], text), values.count(colour)


def _odd(rng: np.random.Generator, document: Listing) -> tuple[OptionQuestion, int]:
    values = [*document.values()]
    options = _some(rng, [*document], len(document))
    text = _one(rng, ["Which line is odd?", "Which is not like the others?", "Who differs?"])
    return Choice(options, text), next(place for place, name in enumerate(options) if values.count(document[name]) == 1)


def _route(rng: np.random.Generator, document: Listing) -> tuple[OptionQuestion, int]:
    colour = _one(rng, [*document.values()])
    rest = [other for other in COLOURS if other not in document.values()]
    meanings = _some(rng, rest, _size(rng, 1, min(3, len(rest))))
    truth = int(rng.integers(len(meanings) + 1))
    meanings.insert(truth, colour)
    desks = {f"{name} {_one(rng, PARTS)}" if rng.random() < 0.3 else name: f"{name} lines" for name in meanings}
    return Choice(desks, _one(rng, ["Where does this go?", "Which takes this?"])), truth


class QuestionKind(NamedTuple):
    """How items of a kind are made."""

    document: Callable[[np.random.Generator], Listing]
    question: Callable[[np.random.Generator, Listing], tuple[OptionQuestion, int]]
    """A question about such a document, and the number of its true answer."""
    fits: Callable[[Listing], bool]
    """Whether a document can be asked this."""


def _is_coloured(document: Listing) -> bool:
    return not any(value.isdigit() for value in document.values())


def _leaves_a_colour(document: Listing) -> bool:
    return _is_coloured(document) and len({*document.values()}) < len(COLOURS)


def _has_one_odd(document: Listing) -> bool:
    values = [*document.values()]
    return len(values) > 2 and sorted(map(values.count, {*values})) == [1, len(values) - 1]


KINDS: Mapping[str, QuestionKind] = {
    "contains": QuestionKind(lambda rng: _colours(rng, 2, 6), _contains, _is_coloured),
    "larger": QuestionKind(_digits, _larger, lambda document: not _is_coloured(document)),
    "count": QuestionKind(_mostly_one, _count, _is_coloured),
    "odd": QuestionKind(_all_but_one, _odd, _has_one_odd),
    "route": QuestionKind(lambda rng: _colours(rng, 2, 5), _route, _leaves_a_colour),
}
"""The kinds by name."""
