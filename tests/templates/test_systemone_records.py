"""templates/systemone.py and waves.py: requests and answers as records, both ways, from anybody."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest

from sfumato.errors import InputError
from sfumato.events import Decision, Decisions, Usage
from sfumato.options import Options
from sfumato.questions import Choice, Dependency, Noul, Question, Score, Span, question_of, record_of
from sfumato.templates.requests import Decide
from sfumato.templates.systemone import answers_of, body_of, decide_of, decisions_of
from sfumato.templates.waves import Waves, answer_sentence

STATE = "I want my money back. Today!"
QUESTIONS: dict[str, Question] = {
    "refund": Noul("Is a refund requested?", {"true": "Money is asked back", "false": None}),
    "team 🙂": Choice({"Billing": "Payments", "": None, "Техника": {"means": ["repairs"]}}, {"task": "Route it"}),
    "anger": Score(["Calm", {"level": "Annoyed"}, "Furious"], depends_on=Dependency("refund", "true")),
    "order": Span("Which sentence asks?", depends_on=Dependency("anger", "2")),
    "praise": Noul("Is it praise?", depends_on=Dependency("refund", "false")),
}
DECISIONS = Decisions(
    {
        "refund": Decision("true", {"true": 0.75, "false": 0.25}, "noul", thought="They ask."),
        "team 🙂": Decision("", {"Billing": 0.25, "": 0.5, "Техника": 0.25}),
        "anger": Decision(
            "2", {"0": 0.125, "1": 0.25, "2": 0.625}, "score", {"0": "Calm", "1": {"level": "Annoyed"}, "2": "Furious"}
        ),
        "order": Decision("Today!", {"I want my money back.": 0.375, "Today!": 0.625}, "span", place=(22, 28)),
    },
    Usage(12, 0, 4, 4, 5, 0.5, None, 3),
    7,
    ("praise",),
)


def sent(value: Any) -> Any:
    """What comes out at the other end."""
    return json.loads(json.dumps(value, allow_nan=False))


def test_a_request_is_read_as_it_was_written() -> None:
    plain = Decide(STATE, {"refund": QUESTIONS["refund"], "mood": ["good", "bad"]})  # type: ignore[dict-item]
    assert body_of(plain, False) == {  # to another's server nothing of ours
        "state": STATE,
        "questions": {
            "refund": {
                "type": "noul",
                "instructions": "Is a refund requested?",
                "criteria": {"true": "Money is asked back", "false": None},
            },
            "mood": {"type": "choice", "criteria": {"good": None, "bad": None}, "instructions": "mood"},
        },
    }
    query = Decide(
        STATE,
        QUESTIONS,
        *(2, 3, 32, "auto", 0.25, False),
        options=Options(seed=5),
    )
    body = sent(body_of(query, True))
    assert decide_of(body | {"model": "any", "seed": 9, "x_other": 1}) == query
    assert decide_of(body | {"x_adapter": "mine"}).options == Options(seed=5, adapter="mine")
    assert body["questions"]["order"]["type"] == "x_span" and body["questions"]["anger"]["x_depends_on"] == {
        "refund": "true"
    }
    assert {name for name in body if name.startswith("x_")} == {
        *("x_steps", "x_samples", "x_canvas", "x_think", "x_threshold", "x_calibrated", "x_seed"),
    }


def test_a_state_that_is_no_text_is_data_unless_it_is_said_to_be_a_conversation() -> None:
    messages = [{"role": "user", "content": "Grüße"}]
    query = Decide(messages, {"refund": QUESTIONS["refund"]}, options=Options(seed=0))
    assert decide_of(sent(body_of(query, True))) == query and body_of(query, True)["x_chat"] is True
    data = decide_of(body_of(query, False))
    assert data.state == '[{"role": "user", "content": "Grüße"}]' and data.conversation is None


def test_what_a_request_leaves_open_is_the_callers() -> None:
    body = {"state": "a", "questions": {"b": {"type": "noul", "instructions": "c", "x_note": 1}}, "x_samples": 2}
    query = decide_of(body, samples=8, steps=4, options=Options(seed=3))
    assert (query.samples, query.steps, query.options.seed) == (2, 4, 3)
    assert decide_of(body).options.seed == 0  # the same request has the same answer
    assert decide_of(body | {"x_seed": 4}, options=Options(seed=3)).options.seed == 4


@pytest.mark.parametrize(
    ("body", "words", "option"),
    [
        ([1], "the request is \\[1\\]", None),
        ({"questions": {}}, "state is missing", "state"),
        ({"state": "a"}, "questions is missing", "questions"),
        ({"state": "a", "questions": ["b"]}, "give a record of ids", "questions"),
        ({"state": "a", "questions": {"b": 7}}, "question 'b' is 7; give a Noul", "questions"),
        ({"state": "a", "questions": {"b": {"type": "box"}}}, "question 'b': type is 'box'", "type"),
        ({"state": "a", "questions": {"b": {"type": "noul"}}}, "question 'b': a noul has neither", "instructions"),
        ({"state": "a", "questions": {"b": {"type": "noul", "instruction": "c"}}}, "no 'instruction'", "instruction"),
        ({"state": "a", "questions": {"b": {"type": "x_span"}}}, "question 'b': a span has no", "instructions"),
        ({"state": "a", "questions": {}, "assets": {"i": {}}}, "images are not read yet", "assets"),
        ({"state": "a", "questions": {}, "x_seed": -1}, "seed", "seed"),
        ({"state": 3, "questions": {}}, "state is 3; give a text", "state"),
        ({"state": ["a"], "questions": {}, "x_chat": "false"}, "x_chat is 'false'; give true or false", "x_chat"),
        ({"state": ["a"], "questions": {}, "x_chat": True}, "x_chat is true, and the state is no list", "x_chat"),
    ],
)
def test_a_request_that_is_none(body: Any, words: str, option: str | None) -> None:
    with pytest.raises(InputError, match=words) as refused:
        decide_of(body)
    assert refused.value.option == option


def test_records_of_questions_round_trip() -> None:
    for question in QUESTIONS.values():
        record = sent(record_of(question))
        assert question_of(record) == question
        assert question_of({name.removeprefix("x_"): value for name, value in record.items()}) == question


def test_answers_are_read_as_they_were_written() -> None:
    body = sent(answers_of(DECISIONS, "nano"))
    assert decisions_of(Decide(STATE, QUESTIONS), body, 9.0) == DECISIONS
    answers = body["answers"]
    assert set(body) == {"model", "answers", "usage", "x_usage", "x_seed", "x_skipped"} and body["model"] == "nano"
    assert answers["refund"] == {"type": "noul", "noul": 0.75, "x_confidence": 0.5, "x_thought": "They ask."}
    assert answers["anger"]["score"] == 1.5 and answers["anger"]["confidence"] == DECISIONS["anger"].confidence
    assert answers["order"]["type"] == "x_span" and (answers["order"]["start"], answers["order"]["end"]) == (22, 28)


def test_another_server_says_less() -> None:
    body = {
        "answers": {
            "refund": {"type": "noul", "noul": 1},
            "team 🙂": {
                "type": "choice",
                "choice": "Техника",
                "probabilities": {"Техника": 0.34, "Billing": 0.33, "": 0.33},
            },
            "strange": {"type": "box"},
        }
    }
    questions = {id: QUESTIONS[id] for id in ("refund", "team 🙂")}
    decisions = decisions_of(Decide(STATE, questions, options=Options(seed=4)), body, 2.0)
    assert decisions["refund"].probabilities == {"true": 1.0, "false": 0.0}
    assert [*decisions["team 🙂"].probabilities] == ["Billing", "", "Техника"] and decisions[
        "team 🙂"
    ].choice == "Техника"
    assert sum(decisions["team 🙂"].probabilities.values()) == pytest.approx(1, abs=1e-12)
    assert (decisions.usage, decisions.seed, decisions.skipped) == (Usage(seconds=2.0), 4, ())


@pytest.mark.parametrize(
    ("id", "change", "words"),
    [
        ("refund", None, "question 'refund' has no answer"),
        ("refund", 3, "the answer to 'refund' is 3"),
        ("refund", {"type": "choice"}, "'refund' is a 'choice', and a noul was asked"),
        ("refund", {"noul": 1.5}, "probability 1.5"),
        ("refund", {"noul": float("nan")}, "probability nan"),
        ("refund", {"noul": 10**400}, "probability 1000"),
        ("refund", {"noul": True}, "probability True"),
        ("refund", {"noul": "0.5"}, "probability '0.5'"),
        ("team 🙂", {"probabilities": None}, "has no probabilities"),
        ("team 🙂", {"probabilities": {"Billing": 1}}, "no probability of ''"),
        ("team 🙂", {"probabilities": {"Billing": 1, "": 0, "Техника": 0, "x": 0}}, "of 'x', which was no option"),
        ("team 🙂", {"probabilities": {"Billing": 0.5, "": 0.5, "Техника": 0.5}}, "add up to 1.5"),
        ("team 🙂", {"probabilities": {"Billing": 0, "": 0, "Техника": 0}}, "add up to 0"),
        ("team 🙂", {"choice": "x"}, "'x', which is none of the options"),
        ("team 🙂", {"choice": ["Billing"]}, "which is none of the options"),
        ("team 🙂", {"choice": "Billing"}, "is 'Billing', and '' is likelier"),
        ("anger", {"probabilities": {"1": 0.5, "2": 0.5, "3": 0}}, "of '3', which was no option"),
        ("order", {"start": 0}, "does not stand at 0 to 28"),
        ("order", {"start": -6}, "does not stand at -6 to 28"),
        ("order", {"end": None}, "does not stand at 22 to None"),
        ("order", {"end": True}, "does not stand at 22 to True"),
        ("order", {"probabilities": {"I wish": 0.5, "Today!": 0.5}}, "of 'I wish', which is no passage"),
        ("order", {"passage": "today!"}, "is 'today!', which is none of the passages"),
        ("order", {"passage": "I want my money back."}, "and 'Today!' is likelier"),
    ],
)
def test_an_answer_that_cannot_be_is_refused_in_a_few_words(id: str, change: Any, words: str) -> None:
    body = sent(answers_of(DECISIONS, "nano"))
    if change is None:
        del body["answers"][id]
    elif isinstance(change, dict):
        body["answers"][id] |= change
    else:
        body["answers"][id] = change
    with pytest.raises(ValueError) as refused:
        decisions_of(Decide(STATE, QUESTIONS), body, 0.0)
    assert words in str(refused.value) and not isinstance(refused.value, InputError)


def test_no_body_does_more_than_be_refused() -> None:
    """Mutations of a right answer at any depth: decisions that hold what they promise, or a ValueError."""
    dice, whole, query = random.Random(0), sent(answers_of(DECISIONS, "nano")), Decide(STATE, QUESTIONS)
    strange: list[Any] = [
        None,
        True,
        -1,
        2,
        1e308,
        float("nan"),
        float("inf"),
        10**400,
        "",
        "x",
        [],
        [[]],
        {},
        {"a": {}},
    ]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(600):
        body = copy.deepcopy(whole)
        for _ in range(dice.randint(1, 3)):
            at: Any = body
            while isinstance(at, dict | list) and at:
                key = dice.choice([*at] if isinstance(at, dict) else range(len(at)))
                if dice.random() < 0.3 or not isinstance(at[key], dict | list) or not at[key]:
                    at[key] = dice.choice(strange)
                    break
                at = at[key]
        try:
            decisions = decisions_of(query, body, 0.0)
        except ValueError:
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        for decision in decisions.values():
            assert (
                sum(decision.probabilities.values()) == pytest.approx(1) and decision.choice in decision.probabilities
            )
            assert 0 <= decision.confidence <= 1
    assert min(outcomes.values()) > 30, outcomes


def test_waves_ask_what_depends_on_an_answer_behind_it_or_never() -> None:
    waves, order = Waves(QUESTIONS), []
    while wave := waves.next():
        order.append([*wave])
        waves.answers |= {id: DECISIONS[id] for id in wave}
    assert order == [["refund", "team 🙂"], ["anger"], ["order"]] and waves.skipped == ["praise"]
    waves = Waves(QUESTIONS)
    waves.next()
    waves.answers |= {"refund": Decision("false", {"true": 0.1, "false": 0.9}, "noul")}
    assert [*waves.next()] == ["praise"] and waves.next() == {}
    assert waves.skipped == ["anger", "order"]  # what depends on what was skipped is skipped
    assert answer_sentence(QUESTIONS["refund"], DECISIONS["refund"]).endswith("\nThe answer was: Yes\n")
    assert answer_sentence(QUESTIONS["order"], DECISIONS["order"]).endswith("\nThe answer was: Today!\n")
