"""templates/slots.py: templates as their callers write them, and as JSON."""

from __future__ import annotations

import json
import time

import pytest

from sfumato import LLM, Options, Slot
from sfumato.templates import slots
from sfumato.templates.decisions import AnswerSet
from sfumato.templates.slots import check_template, read_template, span_template


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("nano")


def test_a_template_from_json_is_the_template(llm: LLM) -> None:
    text = json.dumps(["a ", {"name": "x", "length": 2}, {"name": "y", "choices": ["b", "c"]}])
    assert read_template(text) == ["a ", Slot("x", length=2), Slot("y", choices=("b", "c"))]
    filled = llm.fill(read_template(text), options=Options(seed=1, max_steps=1))
    assert filled.values["y"] in ("b", "c") and filled.text == "a " + filled.values["x"] + filled.values["y"]


def test_spans_become_warm_slots() -> None:
    assert span_template("abcd", [(2, 3), (0, 1)], 0.3) == [
        Slot("1", text="a", strength=0.3),
        "b",
        Slot("2", text="c", strength=0.3),
        "d",
    ]


def test_checks_are_linear(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "SLOTS", "PIECES", "OPEN":
        monkeypatch.setattr(slots, name, 10**6)
    began = time.perf_counter()
    pieces = span_template("ab" * 50_000, [(2 * n, 2 * n + 1) for n in range(50_000)], 0.5)
    assert len(pieces) == 100_000
    assert len(check_template([Slot() for _ in range(100_000)])) == 100_000
    assert time.perf_counter() - began < 30
    answers = AnswerSet.of([str(n) for n in range(20_000)], [[n // 100, n % 100] for n in range(20_000)], 20_000)
    answers.probabilities([[0.0] * len(fork.branches) for fork in answers.forks])
    assert time.perf_counter() - began < 40
