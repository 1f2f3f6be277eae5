"""questions.py: questions are values of their own, and say which of their parts is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from sfumato import InputError
from sfumato.questions import Choice, Noul, Question, Score, Span, check_questions, question_of


def test_a_question_keeps_its_options_whatever_becomes_of_the_callers() -> None:
    options: dict[str, Any] = {"a": None, "b": "second"}
    meanings: dict[str, Any] = {"true": "so"}
    levels: list[Any] = ["low", "high"]
    choice, noul, score = Choice(options), Noul(criteria=meanings), Score(levels)
    before = [choice.text(), noul.text(), score.text()]
    options["c"], meanings["false"] = None, "not so"
    levels.append("higher")
    assert [choice.text(), noul.text(), score.text()] == before and choice.options == ["a", "b"]


@pytest.mark.parametrize(
    ("record", "what", "option"),
    [
        ({"type": "noul", "instructions": "\ud800"}, "instructions has", "instructions"),
        ({"type": "noul", "instructions": {"a": ["\udfff"]}}, "instructions has", "instructions"),
        ({"type": "choice", "criteria": {"a": "\ud800"}}, "a description has", "criteria"),
        ({"type": "choice", "criteria": {"\ud800": None}}, "option '.*' has", "criteria"),
        ({"type": "score", "criteria": ["\ud800"]}, "a level has", "criteria"),
        ({"type": "span", "instructions": "a", "depends_on": {"b": "\ud800"}}, "depends_on has", "depends_on"),
    ],
)
def test_half_a_character_is_refused_where_it_stands(record: Any, what: str, option: str) -> None:
    with pytest.raises(InputError, match=f"^{what} a lone surrogate \\(U.D[8F]..\\), which is no character") as refused:
        question_of(record)
    assert refused.value.option == option


@pytest.mark.parametrize("question", [Noul("ä 🙂"), Choice({"ä": "🙂"}), Score(["ä"], ["🙂"]), Span({"ä": "🙂"})])
def test_whole_characters_pass(question: Question) -> None:
    check_questions({"ä 🙂": question})
