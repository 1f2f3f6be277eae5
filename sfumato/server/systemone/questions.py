"""Questions as requests have them: records by id, each read where it stands, so that a fault has a place.

What a question may say is `sfumato.questions`' to know. Here its names on the wire are told apart (what is ours begins
with x_), what no question has is left out or refused as in any other body, and its size is bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sfumato.errors import InputError
from sfumato.questions import FIELDS, OWN, TYPES, AnswerKind, Question, Span, check_questions, question_of
from sfumato.server.http.bodies import BodyReading, beginning_of
from sfumato.server.http.errors import BodyPlace, Refusal, place_name, short

BOX = "box"
"""The kind of a question about an image: where in it something is."""


@dataclass(frozen=True)
class QuestionForm:
    """How a dialect writes questions."""

    types: Mapping[str, AnswerKind]
    """Kinds of questions by their names."""
    default: str | None = None
    """The name that is meant where a question has no type; None: it is missing."""
    has_lists: bool = False
    """Whether the options of a choice may be a list of names."""
    has_tags: bool = True
    """Whether the place of a fault names the type behind the id, as a tagged union of pydantic's does."""


SYSTEM_ONE = QuestionForm({name: kind for kind, name in TYPES.items()})
"""As /v1/systemone has them."""


class QuestionReader:
    """Reads the questions of one request. `reading` has the limits, `text` is what spans quote from."""

    def __init__(self, reading: BodyReading, text: str, form: QuestionForm = SYSTEM_ONE) -> None:
        self.reading, self.text, self.form = reading, text, form
        self.options = 0
        """Of all its questions so far, passages too."""
        self._passages: dict[str, int] = {}

    def read(self, records: Mapping[str, Any]) -> dict[str, Question]:
        """The questions by their ids, without those about images; a Refusal names the place of the first fault."""
        questions = {}
        for id, record in records.items():
            place: BodyPlace = ("questions", id)
            if not id:
                raise refused(place, "the id of a question is empty; give it one", "string_too_short")
            if not isinstance(record, dict):
                raise refused(place, f"a question is {beginning_of(record)}; give an object with a type", "model_type")
            if record.get("type") == BOX and self.form is SYSTEM_ONE:
                self._check_box(record, (*place, BOX))
                continue
            questions[id] = self._question(record, place)
        if questions:
            _check_dependencies(questions)
        return questions

    def _question(self, record: Mapping[str, Any], place: BodyPlace) -> Question:
        types, name = self.form.types, record.get("type", self.form.default)
        if name is None and "type" not in record:
            raise refused((*place, "type"), f"type is missing; choose {', '.join(types)}", "missing")
        if not isinstance(name, str) or name not in types:
            message = f"type is {beginning_of(name)}; choose {', '.join(types)}"
            raise refused((*place, "type"), message, "union_tag_invalid")
        kind = types[name]
        if self.form.has_tags:
            place = (*place, name)
        self._leave_out(record, (*FIELDS[kind], "type", f"{OWN}depends_on"), place)
        plain = {name: record[name] for name in FIELDS[kind] if name in record}
        if (above := record.get(f"{OWN}depends_on")) is not None:
            plain["depends_on"] = above
        if kind == "choice" and not self.form.has_lists and isinstance(plain.get("criteria"), list):
            message = "criteria is a list; give an object of options, each with what it means, or null"
            raise refused((*place, "criteria"), message, "dict_type")
        self._check_size(kind, plain.get("criteria"), place)
        try:
            question = question_of({"type": kind, **plain})
        except InputError as error:
            field = error.option if error.option in FIELDS[kind] else None
            field = f"{OWN}depends_on" if error.option == "depends_on" else field
            raise refused((*place, *([field] if field else [])), str(error)) from None
        if isinstance(question, Span):
            self._count(self._passages_of(question, place), "passages", (*place, "unit"))
        return question

    def _check_box(self, record: Mapping[str, Any], place: BodyPlace) -> None:
        """A question about an image, which is not answered: only its shape is checked."""
        self._leave_out(record, ("type", "instructions"), place)
        if not isinstance(record.get("instructions"), str | dict | list | None):
            message = f"instructions is {beginning_of(record['instructions'])}; give a text, an object or a list"
            raise refused((*place, "instructions"), message)

    def _leave_out(self, record: Mapping[str, Any], known: tuple[str, ...], place: BodyPlace) -> None:
        """Names that no question of this kind has."""
        for name, value in record.items():
            if name in known:
                continue
            if name == "depends_on":
                raise refused((*place, name), f"depends_on is called {OWN}depends_on here; rename it")
            if self.reading.is_strict and value is not None:
                message = f"there is no {short(name, 80)!r} in a question of this type; leave it out"
                raise refused((*place, name), message, "extra_forbidden")
            if value not in (None, [], {}):
                self.reading.leave_out(f"questions[].{name}")

    def _check_size(self, kind: str, criteria: Any, place: BodyPlace) -> None:
        """Before any option is read."""
        if kind in ("choice", "score") and isinstance(criteria, dict | list):
            what = "options" if kind == "choice" else "levels"
            self._count(len(criteria), what, (*place, "criteria"))

    def _count(self, count: int, what: str, place: BodyPlace) -> None:
        limits = self.reading.limits
        if count > limits.max_options:
            message = f"there are {count} {what}, more than the {limits.max_options} allowed; give fewer"
            raise refused(place, message, "too_long")
        self.options += count
        if self.options > limits.max_all_options:
            message = (
                f"the questions have more than the {limits.max_all_options} options allowed in one request; ask some "
                "in another"
            )
            raise refused(("questions",), message, "too_long")

    def _passages_of(self, question: Span, place: BodyPlace) -> int:
        if question.unit not in self._passages:
            try:
                self._passages[question.unit] = len(question.passages(self.text))
            except InputError as error:
                raise refused((*place, "unit"), str(error)) from None
        return self._passages[question.unit]


def _check_dependencies(questions: Mapping[str, Question]) -> None:
    try:
        check_questions(questions)
    except InputError as error:
        raise refused(place_of(error), str(error)) from None


def refused(place: BodyPlace, message: str, code: str = "value_error") -> Refusal:
    """The refusal of what stands at this place of a body."""
    return Refusal(400, message, param=short(place_name(place), 200) or None, code=code, place=place)


def place_of(error: InputError) -> BodyPlace:
    """The place of what a query is refused for: one of its questions, or another option."""
    return tuple(name for name in (error.option, error.item) if name is not None)
