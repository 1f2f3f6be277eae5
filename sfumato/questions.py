"""Questions with given answers: what `decide` asks about a text, each a frozen value, and how it is put into words.

    Noul("Is a refund requested?")                     yes or no
    Choice({"Billing": "Payments", "Technical": None}) one of several, each described or not
    Score(["Calm", "Frustrated", "Very angry"])        ordered levels, counted from 0
    Span("Where does the writer name the order?")      a passage of the text itself, word for word

The names of the first three, and their records (`question_of`, `record_of`), are those of TypeSafe's System One API;
what is ours alone begins with `x_` there, which other servers and clients pass over.
A question is put the same way whatever its id, its place and its neighbours: `text` knows nothing of them. Nothing here
knows a model.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain, islice
from typing import Any, ClassVar, Literal, get_args

from sfumato.errors import InputError

Content = str | Mapping[str, Any] | Sequence[Any]
"""What is said to the model: a text, or an object or array, which it reads as JSON."""

Unit = Literal["sentence", "line", "paragraph"]
"""What a `Span` may quote."""

AnswerKind = Literal["noul", "choice", "score", "span"]
"""Kinds of questions, by what answers them."""

MOST_OPTIONS = 10_000
"""Options that a question may have, levels and passages too."""

_ENDS: Mapping[str, str] = {
    "sentence": r"(?<=[.!?])[\"'”’)\]]*\s+|\n",
    "line": r"\n",
    "paragraph": r"\n\s*\n",
}
"""Patterns of what ends a passage, each found in time that grows with the text alone: white space around is cut off."""


@dataclass(frozen=True)
class Dependency:
    """A question is asked only where another has this answer."""

    id: str
    answer: str
    """"true" or "false", an option, or a level's number."""


@dataclass(frozen=True)
class Noul:
    """Yes or no. `criteria` may say what "true" and "false" mean; without any, instructions are needed."""

    instructions: Content | None = None
    criteria: Mapping[str, Content | None] | None = None
    depends_on: Dependency | None = None
    kind: ClassVar[AnswerKind] = "noul"

    def __post_init__(self) -> None:
        _prepare(self)
        criteria = self.criteria
        if criteria is not None and not isinstance(criteria, Mapping):
            raise InputError(
                f'criteria is {reprlib.repr(criteria)}; give what "true" and "false" mean', option="criteria"
            )
        for name in criteria or ():
            if name not in ("true", "false"):
                raise InputError(
                    f'criteria has {reprlib.repr(name)}; a noul describes "true" and "false" alone', option="criteria"
                )
        described = [value for value in (criteria or {}).values() if value is not None]
        if self.instructions is None and not described:
            raise InputError("a noul has neither instructions nor criteria; give one of them", option="instructions")
        if criteria is not None:
            object.__setattr__(self, "criteria", dict(criteria))  # not the caller's, which may change

    @property
    def options(self) -> list[str]:
        """The names of its answers."""
        return ["true", "false"]

    @property
    def words(self) -> list[str]:
        """What the model would write for each."""
        return ["Yes", "No"]

    def text(self) -> str:
        """The question as the model reads it."""
        described = [
            (word, (self.criteria or {}).get(name)) for word, name in zip(self.words, self.options, strict=True)
        ]
        lines = [f"{word}: {_plain(value)}" for word, value in described if value is not None]
        return _lines(self.instructions, *lines, "Answer Yes or No only.")


@dataclass(frozen=True)
class Choice:
    """One of several options: names with what each means (None: the name says it), or names alone."""

    criteria: Mapping[str, Content | None] | Sequence[str]
    instructions: Content | None = None
    depends_on: Dependency | None = None
    kind: ClassVar[AnswerKind] = "choice"

    def __post_init__(self) -> None:
        _prepare(self)
        options = self.criteria
        if isinstance(options, str) or not isinstance(options, Mapping | list | tuple):
            raise InputError(
                f"criteria is {reprlib.repr(options)}; give options with what each means", option="criteria"
            )
        _check_count("options", len(options))
        for name in options:
            if not isinstance(name, str):
                raise InputError(f"option {reprlib.repr(name)} is no text; give names", option="criteria")
            _check_characters(f"option {reprlib.repr(name)}", name, "criteria")
        if not isinstance(options, Mapping) and len({*options}) < len(options):
            raise InputError(f"criteria {reprlib.repr(options)} names an option twice; drop one", option="criteria")
        own = dict(options) if isinstance(options, Mapping) else dict.fromkeys(options)
        object.__setattr__(self, "criteria", own)  # not the caller's, which may change

    @property
    def options(self) -> list[str]:
        """The names of its answers."""
        return [*self.criteria]

    @property
    def words(self) -> list[str]:
        """What the model would write for each."""
        return self.options

    def text(self) -> str:
        """The question as the model reads it."""
        assert isinstance(self.criteria, Mapping)
        lines = [
            f"- {name}" if value is None else f"- {name}: {_plain(value)}" for name, value in self.criteria.items()
        ]
        return _lines(self.instructions, "Options:", *lines, "Answer with one of the options only.")


@dataclass(frozen=True)
class Score:
    """A level of an ordered scale, lowest first; its answer is the expectation of the level's number, from 0."""

    criteria: Sequence[Content]
    instructions: Content | None = None
    depends_on: Dependency | None = None
    kind: ClassVar[AnswerKind] = "score"

    def __post_init__(self) -> None:
        _prepare(self)
        if isinstance(self.criteria, str) or not isinstance(self.criteria, list | tuple):
            raise InputError(f"criteria is {reprlib.repr(self.criteria)}; give a list of levels", option="criteria")
        object.__setattr__(self, "criteria", tuple(self.criteria))
        _check_count("levels", len(self.criteria))
        for level in self.criteria:
            check_content("a level", level, is_needed=True, option="criteria")

    @property
    def options(self) -> list[str]:
        """The numbers of its levels."""
        return [str(level) for level in range(len(self.criteria))]

    @property
    def words(self) -> list[str]:
        """What the model would write for each."""
        return self.options

    def text(self) -> str:
        """The question as the model reads it."""
        lines = [f"{number}: {_plain(level)}" for number, level in enumerate(self.criteria)]
        return _lines(self.instructions, "Levels:", *lines, "Answer with the number of a level only.")


@dataclass(frozen=True)
class Span:
    """A passage of the text, quoted word for word: one of its sentences, lines or paragraphs (`unit`).

    The model does not write it freely: each passage is an option, so that the answer has a place in the text."""

    instructions: Content
    unit: Unit = "sentence"
    depends_on: Dependency | None = None
    kind: ClassVar[AnswerKind] = "span"

    def __post_init__(self) -> None:
        _prepare(self)
        if self.instructions is None:
            raise InputError("a span has no instructions; say which passage is meant", option="instructions")
        if self.unit not in get_args(Unit):
            raise InputError(f"unit is {self.unit!r}; choose {', '.join(get_args(Unit))}", option="unit")

    def text(self) -> str:
        """The question as the model reads it."""
        return _lines(self.instructions, f"Answer with one {self.unit} of the text, word for word.")

    def passages(self, text: str) -> list[tuple[int, int]]:
        """The passages of a text: from character, to character; InputError where there is none, or too many."""
        passages = list(islice(_between(text, _ENDS[self.unit]), MOST_OPTIONS + 1))
        _check_count("passages", len(passages))
        return passages


Question = Noul | Choice | Score | Span
"""A question of any kind."""

KINDS: Mapping[AnswerKind, type[Question]] = {kind.kind: kind for kind in get_args(Question)}
"""Kinds of questions by their names."""

FIELDS: Mapping[AnswerKind, tuple[str, ...]] = {
    name: tuple(one.name for one in fields(kind) if one.name != "depends_on") for name, kind in KINDS.items()
}
"""What a record of each kind may have beside "type"; `depends_on` any."""

OWN = "x_"
"""What the names in records begin with that System One does not have."""

TYPES: Mapping[AnswerKind, str] = {name: f"{OWN}span" if name == "span" else name for name in KINDS}
"""What a record says in "type" for each kind."""


def question_of(record: Any) -> Question:
    """The question of a record, as System One has it: `{"type": "noul", "instructions": …, "criteria": …}`.

    What is ours may leave out its `x_`; other names that begin with it are passed over. InputError for what is no
    question; its `option` is the field that is wrong. Fields that no kind has are refused."""
    if not isinstance(record, Mapping):
        raise InputError(f"a question is {reprlib.repr(record)}; give a record with type, instructions and criteria")
    type_name = record.get("type")
    kind = next((kind for kind, name in TYPES.items() if type_name in (kind, name)), None)
    if kind is None:
        raise InputError(f"type is {reprlib.repr(type_name)}; choose {', '.join(KINDS)}", option="type")
    known = ("type", "depends_on")
    values = {name: value for name, value in record.items() if name not in known and not str(name).startswith(OWN)}
    for name in values:
        if name not in FIELDS[kind]:
            raise InputError(
                f"a {kind} has no {reprlib.repr(name)}; it has {', '.join(FIELDS[kind])}", option=str(name)
            )
    if kind in ("choice", "score") and "criteria" not in values:
        raise InputError(
            f"criteria is missing; give the {'options' if kind == 'choice' else 'levels'}", option="criteria"
        )
    if kind == "span" and "instructions" not in values:
        raise InputError("a span has no instructions; say which passage is meant", option="instructions")
    question: Question = KINDS[kind](depends_on=_dependency(_below(record)), **values)
    return question


def record_of(question: Question) -> dict[str, Any]:
    """The record of a question, of which `question_of` makes the same one."""
    record: dict[str, Any] = {"type": TYPES[question.kind]}
    for name in FIELDS[question.kind]:
        if (value := getattr(question, name)) is not None:
            record[name] = list(value) if isinstance(value, tuple) else value
    if question.depends_on is not None:
        record[f"{OWN}depends_on"] = {question.depends_on.id: question.depends_on.answer}
    return record


def state_text(state: Any) -> str:
    """What questions are about, as the model reads it: a text as it is, anything else as JSON."""
    return _plain(state)


def choice_confidence(probabilities: Sequence[float]) -> float:
    """How sure a choice is, by System One's published formula: 0 where all options are alike, 1 for a certain one."""
    count = len(probabilities)
    return 1.0 if count < 2 else max(0.0, (max(probabilities) - 1 / count) / (1 - 1 / count))


def score_confidence(probabilities: Sequence[float]) -> float:
    """How sure a level is, by the formula's form for scales: what lies far from the likeliest level counts more."""
    count = len(probabilities)
    if count < 2:
        return 1.0
    top = max(range(count), key=probabilities.__getitem__)
    spread = sum(p * abs(level - top) for level, p in enumerate(probabilities))
    even = sum(abs(level - (count - 1) / 2) for level in range(count)) / count
    return max(0.0, 1 - spread / even)


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _plain(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _lines(instructions: Any, *lines: str) -> str:
    return "\n".join([*([] if instructions is None else [_plain(instructions)]), *lines])


def _between(text: str, ends: str) -> Iterator[tuple[int, int]]:
    """The parts of a text between these ends, without the white space around them."""
    start = 0
    for last, following in chain((match.span() for match in re.finditer(ends, text)), [(len(text), len(text))]):
        part = text[start:last]
        if part.strip():
            begin = start + len(part) - len(part.lstrip())
            yield begin, begin + len(part.strip())
        start = following


def _check_count(what: str, count: int) -> None:
    if not 1 <= count <= MOST_OPTIONS:
        some = f"more than {MOST_OPTIONS}" if count else "no"
        raise InputError(f"there are {some} {what}; give from 1 to {MOST_OPTIONS}", option="criteria")


def check_content(name: str, value: Any, is_needed: bool = False, option: str = "instructions") -> None:
    """InputError for what is no text and no plain data, or holds what JSON cannot."""
    if value is None and not is_needed:
        return
    if not isinstance(value, str | Mapping | list | tuple):
        raise InputError(f"{name} is {reprlib.repr(value)}; give a text, an object or a list", option=option)
    try:
        text = value if isinstance(value, str) else json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        message = f"{name} holds what JSON cannot: {error}; give texts, numbers, lists and records"
        raise InputError(message, option=option) from error
    _check_characters(name, text, option)


def _check_characters(name: str, text: str, option: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        message = f"{name} has a lone surrogate ({code}), which is no character; remove it"
        raise InputError(message, option=option) from None


def check_questions(questions: Any) -> None:
    """InputError for what is no record of questions by their ids, or has one that depends on none of them."""
    if not isinstance(questions, Mapping) or not questions:
        raise InputError(
            f"questions is {reprlib.repr(questions)}; give a record of ids and questions", option="questions"
        )
    for id, question in questions.items():
        if not isinstance(id, str) or not id or not isinstance(question, Question):
            message = f"question {reprlib.repr(id)} is {reprlib.repr(question)}; give a text and a question"
            raise InputError(message, option="questions", item=id if isinstance(id, str) else None)
        chain, at = {id}, question
        while at.depends_on is not None:
            above = questions.get(at.depends_on.id)
            if above is None or at.depends_on.id in chain:
                which = "which is not asked" if above is None else "in a circle"
                message = f"question {reprlib.repr(id)} depends on {reprlib.repr(at.depends_on.id)}, {which}; drop that"
                raise InputError(message, option="questions", item=id)
            if not isinstance(above, Span) and at.depends_on.answer not in above.options:
                raise InputError(
                    f"question {reprlib.repr(id)} depends on the answer {reprlib.repr(at.depends_on.answer)}, which "
                    f"{reprlib.repr(at.depends_on.id)} does not have; give one of its options",
                    option="questions",
                    item=id,
                )
            chain.add(at.depends_on.id)
            at = above


def _prepare(question: Any) -> None:
    """Check what all kinds have."""
    check_content("instructions", question.instructions)
    criteria = getattr(question, "criteria", None)
    for value in criteria.values() if isinstance(criteria, Mapping) else ():
        check_content("a description", value, option="criteria")
    object.__setattr__(question, "depends_on", _dependency(question.depends_on))


def _below(record: Mapping[str, Any]) -> Any:
    """What a record depends on, under either name."""
    own = record.get(f"{OWN}depends_on")
    return record.get("depends_on") if own is None else own


def _dependency(value: Any) -> Dependency | None:
    """One of a pair, of a record with one entry, or of itself."""
    if value is None or isinstance(value, Dependency):
        return value
    pairs = [*value.items()] if isinstance(value, Mapping) else [value]
    if len(pairs) == 1 and isinstance(pairs[0], list | tuple) and len(pairs[0]) == 2:
        id, answer = pairs[0]
        if isinstance(answer, (bool, int)):
            answer = str(answer).lower()
        if isinstance(id, str) and isinstance(answer, str):
            _check_characters("depends_on", answer, "depends_on")
            return Dependency(id, answer)
    raise InputError(
        f"depends_on is {reprlib.repr(value)}; give a question's id and the answer it must have, such as "
        '{"refund": true}',
        option="depends_on",
    )
