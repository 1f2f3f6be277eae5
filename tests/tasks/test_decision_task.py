"""tasks/decisions.py: chances add up, labels follow them, truths are true, and prompts are as the engine sends them."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from sfumato.errors import InputError
from sfumato.questions import Choice, Noul, Score, question_of
from sfumato.tasks import decisions
from sfumato.tasks.decisions import LabelledQuestion

LINE = re.compile(r"([a-z]+(?: [a-z]+)?) (\w+)")


def items(kind: str, count: int = 200, seed: int = 3) -> list[LabelledQuestion]:
    rng = np.random.default_rng(seed)
    return [decisions.read(decisions.generate(rng, kind)) for _ in range(count)]


def values_of(one: LabelledQuestion) -> dict[str, str]:
    """What the document says of each name; its first line is of trust."""
    first, *rest = one.state.split("\n")
    assert re.fullmatch(r"trust (10|[6-9]) of 10", first)
    values = {match[1]: match[2] for line in rest if (match := LINE.fullmatch(line))}
    assert len(values) == len(rest)
    return values


def truth(one: LabelledQuestion) -> str:
    """The true answer, worked out from the document and the question alone."""
    values, question = values_of(one), one.question
    wording, second, *_ = question.text().split("\n")
    if isinstance(question, Noul):
        word: str = re.split(r" there is | there | line | have ", wording.rstrip("?"))[-1]
        word = second if "this one" in word or "this one" in wording else word
        return "Yes" if word in values or word in values.values() else "No"
    if isinstance(question, Score):
        colour = wording.rstrip("?.").split()[-1]
        return str(list(values.values()).count(colour))
    assert isinstance(question, Choice) and isinstance(question.criteria, dict)
    if one.kind == "larger":
        return max(question.options, key=lambda option: int(values[option]))
    if one.kind == "odd":
        counts = Counter(values.values())
        return next(option for option in question.options if counts[values[option]] == 1)
    return str(next(desk for desk, lines in question.criteria.items() if lines.split()[0] in values.values()))


@pytest.mark.parametrize("kind", decisions.KINDS)
def test_the_likeliest_option_is_the_true_one_and_has_the_chance_that_the_document_says(kind: str) -> None:
    for one in items(kind):
        trust = int(one.state.split()[1]) / 10
        assert one.kind == kind and one.words[one.likeliest] == truth(one)
        assert one.chances[one.likeliest] == pytest.approx(trust)
        assert sum(one.chances) == pytest.approx(1) and len(one.chances) == len(one.words)
        others = [chance for place, chance in enumerate(one.chances) if place != one.likeliest]
        if kind != "count":
            assert others == pytest.approx([(1 - trust) / len(others)] * len(others))
        else:
            places = [place for place, chance in enumerate(one.chances) if chance > 0 and place != one.likeliest]
            assert all(abs(place - one.likeliest) == 1 for place in places)


def test_labels_follow_their_chances() -> None:
    some = [one for kind in decisions.KINDS for one in items(kind, 800)]
    for trust in (10, 9, 8, 7, 6):
        hits = [one.label == one.likeliest for one in some if one.state.startswith(f"trust {trust} ")]
        assert len(hits) > 300 and np.mean(hits) == pytest.approx(trust / 10, abs=0.06)
    for one in some:
        assert one.chances[one.label] > 0


def test_questions_vary() -> None:
    by_kind = {kind: items(kind, 400) for kind in decisions.KINDS}
    for some in by_kind.values():
        assert len({one.question.text() for one in some}) > 50
    for kind, counts in {"larger": {2, 3}, "route": {2, 3, 4}, "odd": {3, 4, 5}}.items():
        assert {len(one.words) for one in by_kind[kind]} == counts
    levels = {one.words[one.likeliest] for one in by_kind["count"]}
    assert levels == set("01234") and {len(one.words) for one in by_kind["count"]} >= {5, 8, 10}
    assert {one.words[one.likeliest] for one in by_kind["contains"]} == {"Yes", "No"}
    words = [word for some in by_kind.values() for one in some for word in one.words]
    assert sum(" " in word for word in words) > 100
    assert any(b.startswith(f"{a} ") for one in by_kind["larger"] for a in one.words for b in one.words)


def test_an_items_prompt_is_what_decide_sends_and_its_answer_the_drawn_word() -> None:
    item = (
        '{"kind":"larger","state":"trust 7 of 10\\nann: 3\\nbob: 5","question":{"type":"choice",'
        '"criteria":{"ann":null,"bob":null},"instructions":"Who has more?"},"chances":[0.3,0.7],"label":0}'
    )
    assert decisions.read(item).text() == item
    assert decisions.read(item).question == question_of(
        {"type": "choice", "criteria": ["ann", "bob"], "instructions": "Who has more?"}
    )
    assert decisions.prompt(item) == (
        "trust 7 of 10\nann: 3\nbob: 5\n\nWho has more?\nOptions:\n- ann\n- bob\nAnswer with one of the options only."
    )
    assert decisions.answer(item) == "ann"
    assert decisions.is_right("bob", item) and not decisions.is_right("ann", item)


def test_what_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="no kind 'what'; the kinds are: contains, larger"):
        decisions.generate(np.random.default_rng(0), "what")
    for text in ("", "{}", "[1]", '{"kind": "odd", "state": "", "question": {"type": "x"}, "chances": [], "label": 0}'):
        with pytest.raises(InputError):
            decisions.read(text)
