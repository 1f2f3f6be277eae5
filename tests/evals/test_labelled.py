"""evals/labelled.py and labelled_reads.py: lines are checked one by one; reads are kept, and seeded by content."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sfumato.errors import BusyError, InputError, WorkerError
from sfumato.evals.labelled import LabelledState, answer_of, labelled_state, labelled_states
from sfumato.evals.labelled_reads import KeptReads, ReadingPlan, StateReads, read_states
from sfumato.llm import LLM
from sfumato.options import Options
from sfumato.questions import Choice, Dependency, Noul, Score, Span
from sfumato.templates import patience

NOUL, SCORE, SPAN = Noul("Is it?"), Score(["low", {"a": 1}, "2"]), Span("Which?", "line")
RECORD = {"type": "noul", "instructions": "Is it?"}


def line(state: Any = "a b", questions: Any = None, answers: Any = None, **more: Any) -> bytes:
    record = {"state": state, "questions": questions or {"q": RECORD}, "answers": answers or {"q": True}}
    return json.dumps(record | more).encode()


@pytest.mark.parametrize(
    ("question", "label", "name"),
    [
        (NOUL, True, "true"),
        (NOUL, "false", "false"),
        (NOUL, {"type": "noul", "noul": 0.7}, "true"),
        (NOUL, {"type": "noul", "noul": 0.2}, "false"),
        (Choice(["a", "b"]), "b", "b"),
        (Choice(["true", "false"]), "true", "true"),
        (Choice(["a", "b"]), {"type": "choice", "choice": "b", "confidence": 1}, "b"),
        (Choice(["a", "b"]), {"type": "choice", "choice": "a", "probabilities": {"a": 0.6, "b": 0.4}}, "a"),
        (SCORE, 1, "1"),
        (SCORE, 2.0, "2"),
        (SCORE, "low", "0"),
        (SCORE, {"a": 1}, "1"),
        (SCORE, "1", "1"),
        (SCORE, "2", "2"),
        (SCORE, {"type": "score", "score": 1.1, "probabilities": {"0": 0.2, "1": 0.5, "2": 0.3}}, "1"),
        (SPAN, " one ", "one"),
        (SPAN, {"type": "x_span", "passage": "two", "start": 4, "end": 7}, "two"),
        (SPAN, {"type": "x_span", "passage": "two", "probabilities": {"one": 0.6, "two": 0.4}}, "one"),
    ],
)
def test_labels_in_any_spelling(question: Any, label: Any, name: str) -> None:
    assert answer_of(question, label, "one\ntwo") == name


@pytest.mark.parametrize(
    ("question", "label"),
    [
        *((NOUL, label) for label in (1, None, "yes", {"type": "noul"}, {"type": "noul", "noul": 3})),
        (NOUL, []),
        *((Choice(["a", "b"]), label) for label in ("c", True, 0, None, {"type": "noul", "noul": 1})),
        *((SCORE, label) for label in (3, -1, 1.5, True, "high", float("nan"), float("inf"), 10**400)),
        *((SPAN, label) for label in ("three", None, "on")),
    ],
)
def test_a_label_that_is_none_is_named(question: Any, label: Any) -> None:
    with pytest.raises(InputError, match=r"^is .*; (the question has|give one line)"):
        answer_of(question, label, "one\ntwo")


def test_what_a_server_was_asked_and_answered_is_a_label() -> None:
    """Of a conversation, whose passages are those of its messages, too."""
    questions = {"q": RECORD, "s": {"type": "x_span", "instructions": "Which?", "x_depends_on": {"q": True}}}
    answers = {"s": {"type": "x_span", "passage": "Two.", "start": 5, "end": 9}}
    state = [{"role": "user", "content": "One. Two."}, {"role": "assistant", "content": "Three."}]
    labelled = labelled_state(line(state, questions, answers), "line 1")
    assert labelled.answers == {"s": "Two."} and [*labelled.questions] == ["q", "s"]
    with pytest.raises(InputError, match="question 's': type is 'box'"):
        labelled_state(line(questions={"s": {"type": "box"}}), "line 1")


def test_lines_that_are_wrong_are_named_and_the_others_read() -> None:
    bad: list[str] = []
    lines = [
        line(),
        b"\n",
        b"{",
        b"[1]",
        b'\xff"',
        b"[" * 100_000,
        b'{"state": 1, "state": 2}',
        b'{"state": "a", "questions": {}}',
        line(state=5),
        line(state=None),
        line(questions={"q": {"type": "box"}}),
        line(questions=[RECORD]),
        line(answers={"other": True}),
        line(answers={"q": "perhaps"}),
        line(answers=[True]),
        b'{"state": NaN, "questions": {"q": {"type": "noul", "instructions": "?"}}, "answers": {"q": true}}',
        line(state={"a": [1]}, note="more is let be"),
    ]
    states = list(labelled_states(lines, bad))
    assert [state.place for state in states] == ["line 1", "line 17"]
    assert [int(one.partition(":")[0].removeprefix("line ")) for one in bad] == list(range(3, 17))
    for part in ("not JSON", "no object", "'state' twice", "no answers", "'other', which is not", "is 'perhaps'"):
        assert any(part in one for one in bad), part


def test_only_what_is_needed_is_asked() -> None:
    """Questions with a label, and those that they depend on."""
    questions = {
        "a": RECORD,
        "b": RECORD | {"depends_on": {"a": True}},
        "c": RECORD | {"depends_on": {"b": True}},
        "d": RECORD,
    }
    state = labelled_state(line(questions=questions, answers={"c": True}), "here")
    assert [*state.questions] == ["a", "b", "c"] and state.answers == {"c": "true"}


def test_questions_may_be_written_as_a_request_has_them() -> None:
    names = {"type": "x_span", "instructions": "Which?", "x_depends_on": {"a": True}, "x_note": "passed over"}
    state = labelled_state(line(questions={"a": RECORD, "b": names}, answers={"b": "a b"}), "here")
    assert state.questions["b"] == Span("Which?", depends_on=Dependency("a", "true"))


# ---- reads ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("nano")


def states_of(count: int) -> list[LabelledState]:
    questions = {"q": RECORD, "n": {"type": "choice", "criteria": {"1": None, "2": "two", "3": None}}}
    lines = [line(f"{n}{n}", questions, {"q": n % 2 == 0, "n": "2"}) for n in range(count)]
    return list(labelled_states(lines, []))


def read(
    llm: LLM, states: Sequence[LabelledState], plan: ReadingPlan, kept: KeptReads, problems: list[str] | None = None
) -> list[StateReads]:
    async def gathered() -> list[StateReads]:
        return [one async for one in read_states(llm, states, plan, kept, problems if problems is not None else [])]

    return sorted(asyncio.run(gathered()), key=lambda one: one.reads)


def test_reads_are_kept_and_go_on(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was cut off within a line reads the rest alone, and says what an uninterrupted one says."""
    states, path, plan = states_of(12), tmp_path / "reads", ReadingPlan(model="nano")
    whole = read(llm, states, plan, KeptReads())
    assert len(whole) == 12 and all(len(one.reads) == 2 and one.skipped == 0 for one in whole)
    read(llm, states[:5], plan, KeptReads(path))
    path.write_bytes(path.read_bytes().rstrip()[:-9] + b'\n[]\n{"key": 1, "reads": [[1]]}')
    queries: list[Any] = []
    arun = llm.arun

    async def counted(query: Any) -> Any:
        queries.append(query)
        return await arun(query)

    monkeypatch.setattr(llm, "arun", counted)
    again = read(llm, states[::-1], plan, KeptReads(path))
    assert len(queries) == 8
    for one, other in zip(whole, again, strict=True):
        for mine, others in zip(one.reads, other.reads, strict=True):
            assert (mine.kind, mine.label, mine.state) == (others.kind, others.label, others.state)
            assert mine.probabilities == pytest.approx(others.probabilities, abs=1e-5)
    read(llm, states, plan, KeptReads(path))
    assert len(queries) == 8
    for changed in (ReadingPlan(model="another"), ReadingPlan(samples=2, model="nano"), ReadingPlan(steps=2)):
        assert changed.key(states[0]) != plan.key(states[0])
    assert ReadingPlan(options=Options(seed=5)).key(states[0]) != ReadingPlan().key(states[0])
    KeptReads(path).remove()
    assert not path.exists()


def test_a_busy_server_is_asked_again(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice busy and once lost it answers; no state is left out, and one that stays away ends the run."""
    arun, errors = llm.arun, [BusyError("busy"), WorkerError("lost"), BusyError("busy")]

    async def failing(query: Any) -> Any:
        if errors:
            raise errors.pop()
        return await arun(query)

    monkeypatch.setattr(llm, "arun", failing)
    monkeypatch.setattr(patience, "PAUSES", (0, 0, 0))
    problems: list[str] = []
    assert len(read(llm, states_of(1), ReadingPlan(), KeptReads(), problems)) == 1 and problems == []
    errors += [WorkerError("lost")] * 4
    with pytest.raises(WorkerError, match="lost"):
        read(llm, states_of(1), ReadingPlan(), KeptReads(), problems)


def test_what_the_model_cannot_read_is_named(llm: LLM) -> None:
    """Options that are the same tokens, and questions that are not called for."""
    alike = {"q": {"type": "choice", "criteria": {"a" * 300 + "b": None, "a" * 300 + "c": None}}}
    problems: list[str] = []
    long = labelled_state(line("x", alike, {"q": "a" * 300 + "b"}), "line 3")
    assert read(llm, [*states_of(1), long], ReadingPlan(), KeptReads(), problems)[0].reads
    assert len(problems) == 1 and problems[0].startswith("line 3: question 'q'")
    questions = {"a": RECORD, **{f"b{n}": RECORD | {"depends_on": {"a": n == 1}} for n in range(2)}}
    state = labelled_state(line("1", questions, {"b0": True, "b1": True}), "line 1")
    (result,) = read(llm, [state], ReadingPlan(), KeptReads())
    assert len(result.reads) == 1 and result.skipped == 1
