"""Questions with their right answers: JSON lines, checked one by one.

    {"state": "I want my money back.", "questions": {"refund": {"type": "noul", …}}, "answers": {"refund": true}}

An answer is true or false, an option's name, a level's number or its text, the passage of a span, or a System One
answer, whose likeliest option counts. A line that is none is kept apart with a sentence that names it, so that nothing
vanishes unsaid. It lacks assets: images are not read yet.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sfumato.errors import InputError
from sfumato.questions import TYPES, Noul, Question, Score, Span, check_content
from sfumato.templates.checks import check_query
from sfumato.templates.requests import Decide

LONGEST_LINE = 16 << 20
"""Bytes of a line at most."""
_FIELDS = ("state", "questions", "answers")


@dataclass(frozen=True)
class LabelledState:
    """A state, questions about it, and the right answers of those that have a label."""

    place: str
    """Where it is from: "line 7"."""
    state: Any
    questions: Mapping[str, Question]
    """Those with a label, and those that they depend on."""
    answers: Mapping[str, str]
    """The name of the right option by the question's id; of a span the passage."""


def labelled_states(lines: Iterable[bytes], bad_lines: list[str]) -> Iterator[LabelledState]:
    """The states of a file's lines, empty ones left out; a sentence about each that is wrong goes to `bad_lines`."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield labelled_state(line, f"line {number}")
        except InputError as error:
            bad_lines.append(f"line {number}: {error}")


def labelled_state(line: bytes, place: str) -> LabelledState:
    """The state of one line. InputError says what is wrong with it."""
    record = _record_of(line)
    state, questions = record["state"], record["questions"]
    check_content("the state", state, is_needed=True)
    query = Decide(state, questions)
    check_query(query)
    labels = record["answers"]
    if not isinstance(labels, dict) or not labels:
        raise InputError(f"answers is {reprlib.repr(labels)}; give a record of ids and right answers")
    answers = {}
    for id, label in labels.items():
        if id not in query.questions:
            raise InputError(f"answers has {reprlib.repr(id)}, which is not among the questions")
        try:
            answers[id] = answer_of(query.questions[id], label, query.text)
        except InputError as error:
            raise InputError(f"the answer of {reprlib.repr(id)} {error}") from None
    needed = {above for id in answers for above in _with_those_above(id, query.questions)}
    needed_questions = {id: question for id, question in query.questions.items() if id in needed}
    return LabelledState(place, state, needed_questions, answers)


def answer_of(question: Question, label: Any, text: str = "") -> str:
    """The name of the option that a label means, of a span a passage of the text. InputError for one that is none."""
    if isinstance(label, Mapping) and label.get("type") == TYPES[question.kind]:
        label = _likeliest(question, label)
    if isinstance(question, Span):
        return _passage_of(question, label, text)
    name = label
    if isinstance(question, Noul) and isinstance(label, bool):
        name = str(label).lower()
    elif isinstance(question, Score):
        name = _level_of(question, label)
    if isinstance(name, str) and name in question.options:
        return name
    known = ", ".join(map(reprlib.repr, question.options[:5])) + (", …" if len(question.options) > 5 else "")
    raise InputError(f"is {reprlib.repr(label)}; the question has {known}")


# ---- helpers --------------------------------------------------------------------------------------------------------


def _record_of(line: bytes) -> dict[str, Any]:
    if len(line) > LONGEST_LINE:
        raise InputError(f"it has more than {LONGEST_LINE >> 20} MiB; split the state")
    try:
        record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object_of)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"it is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise InputError("it is no object; give state, questions and answers")
    for name in _FIELDS:
        if name not in record:
            raise InputError(f"it has no {name}; give state, questions and answers")
    return record


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise InputError(f"it says {reprlib.repr(key)} twice; give each name once")
        values[key] = value
    return values


def _likeliest(question: Question, answer: Mapping[str, Any]) -> Any:
    """The label that a System One answer comes to; the answer itself where it says none."""
    if isinstance(question, Noul) and _is_probability(answer.get("noul")):
        return answer["noul"] >= 0.5
    chances = answer.get("probabilities")
    if isinstance(chances, dict) and chances and all(map(_is_probability, chances.values())):
        return max(chances, key=chances.__getitem__)
    return answer.get("choice", answer.get("passage", answer))


def _is_probability(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _level_of(question: Score, label: Any) -> Any:
    """A level's number as a name: of a number, of digits, or of the level's own content."""
    if isinstance(label, int) and not isinstance(label, bool):
        return str(label) if 0 <= label < len(question.criteria) else None
    if isinstance(label, float) and label.is_integer():
        return str(int(label)) if 0 <= label < len(question.criteria) else None
    places = [number for number, level in enumerate(question.criteria) if level == label]
    if len(places) == 1:
        return str(places[0])
    return label


def _passage_of(span: Span, label: Any, text: str) -> str:
    passages = [text[first:last] for first, last in span.passages(text)]
    if isinstance(label, str) and label.strip() in passages:
        return label.strip()
    raise InputError(f"is {reprlib.repr(label)}; give one {span.unit} of the state, word for word")


def _with_those_above(id: str, questions: Mapping[str, Question]) -> Iterator[str]:
    """A question, and those that it depends on."""
    yield id
    while (above := questions[id].depends_on) is not None:
        id = above.id
        yield id
