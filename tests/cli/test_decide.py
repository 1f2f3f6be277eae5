"""cli/decide.py, questions.py, answers.py and decide_lines.py: questions on nano, as a person or program asks them."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from sfumato.cli import answers
from sfumato.cli.questions import QuestionFlags, ReadingFlags, read_questions
from sfumato.errors import BusyError, InputError, NumericError, WorkerError
from sfumato.events import Decision, Decisions, Usage
from sfumato.llm import LLM
from sfumato.questions import Choice, Dependency, Noul, Question, Score, Span
from sfumato.templates.requests import Decide

Call = Callable[..., tuple[int, str, str]]
Put = Callable[..., str]

RECORDS = {
    "refund": {"type": "noul", "instructions": "Is a refund requested?"},
    "mood": ["happy", "sad"],
    "level": {"type": "score", "criteria": ["low", {"x": "mid"}, "high"], "instructions": "How?"},
    "why": {"type": "x_span", "instructions": "Why?", "unit": "sentence"},
}
QUESTIONS: dict[str, Question] = {
    "refund": Noul("Is a refund requested?"),
    "mood": Choice(["happy", "sad"], "mood"),
    "level": Score(["low", {"x": "mid"}, "high"], "How?"),
    "why": Span("Why?"),
}


def drawn(decisions: Decisions, questions: dict[str, Question], width: int) -> list[str]:
    """The screen's lines."""
    console = Console(file=io.StringIO(), width=width)
    console.print(answers.screen(decisions, questions))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def decided(skipped: tuple[str, ...] = (), **each: Decision) -> Decisions:
    return Decisions(each, Usage(), 0, skipped)


# ---- one text -------------------------------------------------------------------------------------------------------


def test_json_has_every_answer_with_its_probabilities(sfumato: Call, put: Put) -> None:
    flags = ("--yes-no", "refund=Is a refund requested?", "--field", "mood=happy | sad", "--score", "n=1|2|3")
    code, out, err = sfumato("decide", "One. Two.", *flags, "--span", "Why?", "--json", "--seed", "1")
    records = json.loads(out)
    assert code == 0 and err == "" and list(records) == ["refund", "mood", "n", "Why?"]
    options = [["true", "false"], ["happy", "sad"], ["0", "1", "2"], ["One.", "Two."]]
    for record, names in zip(records.values(), options, strict=True):
        assert list(record["probabilities"]) == names and 0 <= record["confidence"] <= 1
        assert sum(record["probabilities"].values()) == pytest.approx(1)
        assert record["choice"] == max(names, key=record["probabilities"].__getitem__)
    assert records["n"]["legend"] == {"0": "1", "1": "2", "2": "3"} and 0 <= records["n"]["score"] <= 2
    assert records["Why?"]["place"] in ([0, 4], [5, 9]) and set(records["mood"]) == {
        *("choice", "probabilities", "kind", "confidence")
    }


def test_a_file_of_questions_asks_what_flags_ask_of_a_text_from_anywhere(sfumato: Call, put: Put) -> None:
    flags = ("--yes-no", "refund=Is a refund requested?", "--field", "mood=happy|sad", "--json", "--seed", "1")
    out = sfumato("decide", "x", *flags)[1]
    put(json.dumps({name: RECORDS[name] for name in ("refund", "mood")}), "q.json")
    put("x", "state.txt")
    put('{"a": ["é"]}', "state.json")
    for source, stdin in (((), b"x"), (("-",), b"x"), (("--state", "state.txt"), b""), (("--state", "-"), b"x")):
        assert sfumato("decide", *source, "--questions", "q.json", *flags[4:], stdin=stdin) == (0, out, "")
    as_data = sfumato("decide", "--state", "state.json", *flags)[1]
    assert as_data == sfumato("decide", '{"a": ["é"]}', *flags)[1] != out  # data are read as JSON
    assert sfumato("decide", "x", *flags, "--samples", "2")[1] != out
    assert sfumato("decide", "x", *flags, "--steps", "2", "--canvas", "32", "--not-calibrated")[0] == 0


def test_what_is_not_asked_is_null(sfumato: Call, put: Put) -> None:
    above = sfumato("decide", "x", "--yes-no", "a=A?", "--json", "--seed", "1")[1]
    other = "false" if json.loads(above)["a"]["choice"] == "true" else "true"
    records = {"b": {"type": "noul", "instructions": "B?", "depends_on": {"a": other}}}
    records["c"] = records["b"] | {"depends_on": {"a": json.loads(above)["a"]["choice"]}}
    put(json.dumps(records), "q.json")
    code, out, _ = sfumato("decide", "x", "--yes-no", "a=A?", "--questions", "q.json", "--json", "--seed", "1")
    answered = json.loads(out)
    assert code == 0 and answered.pop("b", "missing") is None and set(answered) == {"a", "c"}
    assert answered["a"]["probabilities"] == pytest.approx(json.loads(above)["a"]["probabilities"], abs=1e-5)


def test_a_threshold_asks_for_thinking_where_it_is_needed() -> None:
    assert ReadingFlags().fields == {
        **{"steps": 1, "samples": 1, "canvas": None, "calibrated": True, "think": "never", "threshold": 0.5}
    }
    assert ReadingFlags(threshold=0.9).fields["think"] == "auto" and ReadingFlags(think="always").fields["think"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x"], "there is no question; give --yes-no, --field"),
        (["x", "--field", "a"], "--field is 'a'; give NAME=A|B|…"),
        (["x", "--field", "=a|b"], "--field is '=a|b'"),
        (["x", "--field", "a=b"], "two or more different"),
        (["x", "--field", "a=b|b"], "two or more different"),
        (["x", "--field", "a=b|"], "none empty"),
        (["x", "--field", "a=b|c", "--yes-no", "a=Is it?"], "two questions are named 'a'"),
        (["x", "--yes-no", " "], "--yes-no is ' '; give a question"),
        (["x", "--score", "a=low"], "two or more"),
        (["x", "--score", "low|high"], "give NAME=LOW|…|HIGH"),
        (["", "--field", "a=b|c"], "the text is empty"),
        (["x", "--yes-no", "a?", "--steps", "0"], "--steps"),
        (["x", "--yes-no", "a?", "--think", "often"], "--think is 'often'; choose never, auto, always"),
        (["x", "--yes-no", "a?", "--threshold", "2"], "--threshold"),
        (["x", "--yes-no", "a?", "--raw"], "No such option: --raw"),
        (["x", "--yes-no", "a?", "-o", "f"], "-o is for --data and --systemone"),
        (["--data", "d.jsonl", "--yes-no", "a?", "--resume"], "--resume is given without -o"),
        (["--data", "d.jsonl", "--yes-no", "a?", "-o", "o.json"], "o.json is there already"),
        (["--data", "d.jsonl", "--yes-no", "a?", "-o", "o.json", "--resume"], "line 1 of o.json is no answer"),
        (["--data", "d.jsonl", "--yes-no", "a?", "-o", "./d.jsonl", "--resume"], "d.jsonl is read by this command"),
        (["--data", "d.jsonl", "--questions", "o.json", "-o", "o.json", "--force"], "o.json is read by this command"),
        (["--systemone", "o.json"], ": questions is missing; give an object"),
        (["--data", "d.jsonl"], "there is no question"),
        (["x", "--state", "d.jsonl", "--yes-no", "a?"], "--state and a text are given"),
        (["--state", "none.txt", "--yes-no", "a?"], "cannot read none.txt"),
        (["--systemone", "d.jsonl", "--yes-no", "a?"], "--systemone has questions of its own"),
        (["--systemone", "r.json"], "question 'a': type is 'box'"),
        (["x", "--questions", "none.json"], "cannot read none.json"),
        (["--questions", "-"], "cannot be both"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    sfumato: Call, no_model: None, put: Put, arguments: list[str], words: str
) -> None:
    put('"text"\n', "d.jsonl")
    put('{"state": "x"}', "o.json")  # no line is whole, and none an answer
    put('{"state": "x", "questions": {"a": {"type": "box"}}}', "r.json")
    code, out, err = sfumato("decide", *arguments, stdin=b'{"a": ["b", "c"]}')
    assert code == 2 and out == "" and err.count("\n") == 1 and words in err
    assert (Path("d.jsonl").read_text(), Path("o.json").read_text()) == ('"text"\n', '{"state": "x"}')


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "must be an object of names and questions"),
        ('{"a": "b|c"}', "question 'a' of file: a question is 'b|c'"),
        ('{"a": ["b", 1]}', "options are texts"),
        ('{"a": ["b", ["c"]]}', "options are texts"),
        ('{"a": {"type": "noul"}}', "neither instructions nor criteria"),
        ('{"a": ["b", "c"], "a": ["d", "e"]}', "says 'a' twice"),
        ("{}", "must be an object"),
        ("{", "file is not JSON"),
        ("9" * 5000, "file is not JSON"),
        ("[" * 100000, "file is not JSON"),
    ],
)
def test_questions_that_are_none(content: str, words: str) -> None:
    with pytest.raises(InputError) as refused:
        read_questions(content, "file")
    assert words in str(refused.value)


def test_names_stand_before_the_first_equals_sign_or_are_the_question() -> None:
    assert read_questions(json.dumps(RECORDS), "file") == QUESTIONS
    flags = QuestionFlags(yes_no=["Is 1 + 1 = 2?", "ok=Is a=b?"], span=["where=Which?"], field=["Which team?=A|B"])
    assert flags.read() == {
        "Is 1 + 1 = 2?": Noul("Is 1 + 1 = 2?"),
        "ok": Noul("Is a=b?"),
        "Which team?": Choice(["A", "B"], "Which team?"),
        "where": Span("Which?"),
    }


# ---- on the screen --------------------------------------------------------------------------------------------------


def test_answers_stand_beside_bars_with_how_sure_they_are() -> None:
    decisions = decided(
        ("never",),
        refund=Decision("false", {"true": 0.25, "false": 0.75}, "noul", thought="They\nask nothing."),
        mood=Decision("b", {"a": 0.0, "b": 0.75, "[c]": 0.25}),
        level=Decision("2", {"0": 0.125, "1": 0.25, "2": 0.625}, "score", {"0": "low", "1": {"x": 1}, "2": "high"}),
        why=Decision("Two\nlines.", {"One.": 0.0, "Two\nlines.": 1.0}, "span", place=(5, 15)),
    )
    questions = {**QUESTIONS, "never": Noul("Never?", depends_on=Dependency("refund", "true"))}
    lines = [line.split() for line in drawn(decisions, questions, 90) if line]
    assert [line[0] for line in lines] == [
        *("refund", "confidence", "mood", "confidence", "a", "level", "score", "confidence"),
        *("why", "at", "confidence", "never", "thought"),
    ]
    assert lines[0][1] == "no" and lines[1][2] == "yes" and lines[0][-1] == "75.0%" and lines[1][1] == "0.50"
    assert [line[-1] for line in lines[2:5]] == ["75.0%", "25.0%", "0.0%"] and "█" * 18 + "·" * 6 in lines[2]
    assert [line[-1] for line in lines[5:8]] == ["12.5%", "25.0%", "62.5%"]  # levels in their order
    assert lines[6][1:4] == ["1.50", "1", '{"x":'] and lines[7][2:4] == ["2", "high"]
    assert "“Two lines.”" in " ".join(lines[8]) and lines[9][:2] == ["at", "5–15"]
    assert " ".join(lines[11]) == "never not asked: needs refund = true"
    assert " ".join(lines[12]) == "thought on refund: They ask nothing."


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_a_screen_of_any_width_holds_every_answer(width: int) -> None:
    many = {f"Queue {number:03}": 2.0**-number for number in range(1, 255)} | {"x" * 500: 2.0**-254}
    decisions = decided(queue=Decision("Queue 001", many), one=Decision("", {"": 1.0}))
    text = "\n".join(drawn(decisions, {"queue": Choice([*many]), "one": Choice([""])}, width))
    assert "Queue 001" in text and "Queue 008" in text and "Queue 009" not in text and "247 more" in text
    assert "50.0%" in text and "100.0%" in text and "(empty)" in text
    assert all(len(line) <= width for line in text.splitlines())


def test_a_terminal_shows_bars_and_what_they_took(sfumato: Call) -> None:
    code, out, _ = sfumato("decide", "x", "--field", "[b]=yes|no", "--seed", "1")
    assert code == 0 and "[b]" in out and "%" in out and "█" in out and "confidence" in out and "seed" not in out


@settings(deadline=None)
@given(st.floats(0, 1))
def test_a_bar_is_always_as_wide(p: float) -> None:
    assert len(answers.bar(p).plain) == answers.BAR


# ---- many -----------------------------------------------------------------------------------------------------------


def test_each_line_of_data_gets_its_line_of_answers(sfumato: Call, put: Put) -> None:
    states: list[Any] = ["A text.", {"a": 1}, [{"role": "user", "content": "Hello."}], "A\u2028text."]
    lines = [json.dumps(state) for state in states]
    put("\ufeff" + "\n\n".join([*lines[:2], "nonsense", '""', *lines[2:]]), "d.jsonl")
    flags = ("--field", "mood=good|bad", "--yes-no", "ok=Ok?", "--seed", "1")
    code, out, err = sfumato("decide", "--data", "d.jsonl", *flags)
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and err == (
        "sfumato: 2 of 6 lines have no answer; the first is line 5 of d.jsonl is not JSON: Expecting value: "
        "line 1 column 1 (char 0)\n"
    )
    assert [record["line"] for record in records] == [1, 3, 5, 7, 9, 11]
    assert records[3] == {"line": 7, "error": "the text is empty; give at least one character"}
    for state, record in zip(states, [records[at] for at in (0, 1, 4, 5)], strict=True):
        put(json.dumps(state), "one.json")
        alone = json.loads(sfumato("decide", "--state", "one.json", *flags, "--json")[1])
        for name, answer in record["answers"].items():
            assert answer["probabilities"] == pytest.approx(alone[name]["probabilities"], abs=1e-5)


def test_a_file_of_answers_is_gone_on_with_behind_its_last_whole_line(
    sfumato: Call, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfumato.cli.decide_lines.AT_ONCE", 3)
    put("\n".join(f'"text {number}"' for number in range(7)), "d.jsonl")
    command = ("decide", "--data", "d.jsonl", "--yes-no", "ok=Ok?", "--seed", "1", "-o", "out.jsonl")
    assert sfumato(*command) == (0, "", "")
    whole = Path("out.jsonl").read_bytes()
    assert [json.loads(line)["line"] for line in whole.splitlines()] == [*range(1, 8)]
    for cut in (300, whole.rindex(b"\n", 0, -1) + 1, len(whole)):
        Path("out.jsonl").write_bytes(whole[:cut])
        assert sfumato(*command, "--resume")[0] == 0
        again = Path("out.jsonl").read_bytes()
        assert [json.loads(line)["line"] for line in again.splitlines()] == [*range(1, 8)]
        assert again.startswith(whole[: whole[:cut].rfind(b"\n") + 1])
    assert sfumato(*command)[0] == 2 and sfumato(*command, "--force")[0] == 0  # it is there already


@pytest.mark.parametrize("error", [BusyError("busy"), WorkerError("lost")])
def test_a_busy_or_lost_server_is_asked_again(
    sfumato: Call, nano: LLM, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    waits: list[float] = []
    tries: list[str] = []

    async def arun(query: Decide) -> Decisions:
        tries.append(query.state)
        if query.state == "b" and tries.count("b") < 3:
            raise error
        return decided(ok=Decision("true", {"true": 1.0, "false": 0.0}, "noul"))

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(nano, "arun", arun)
    monkeypatch.setattr("sfumato.templates.patience.asyncio.sleep", sleep)
    code, out, _ = sfumato("decide", "--data", "-", "--yes-no", "ok=Ok?", stdin=b'"a"\n"b"\n')
    assert code == 0 and len(out.splitlines()) == 2
    assert sorted(tries) == ["a", "b", "b", "b"] and waits == [1.0, 2.0]


def test_an_answer_is_written_while_the_next_line_is_waited_for(
    sfumato: Call, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    is_written = threading.Event()

    def lines(_: str) -> Iterator[tuple[int, str]]:
        yield 1, "first"
        assert is_written.wait(60)  # nobody types the second line before the first is answered
        yield 2, "second"

    def put_line(line: str) -> None:
        written.append(line)
        is_written.set()

    monkeypatch.setattr("sfumato.cli.decide.json_lines", lines)
    monkeypatch.setattr("sfumato.cli.decide_lines.put", put_line)
    assert sfumato("decide", "--data", "-", "--yes-no", "ok=Ok?") == (0, "", "")
    assert [json.loads(line)["line"] for line in written] == [1, 2]


def test_what_ends_a_run_leaves_the_lines_before_it(
    sfumato: Call, put: Put, nano: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def arun(query: Decide) -> Decisions:
        if query.state == "c":
            raise NumericError("the numbers are not finite")
        return decided(ok=Decision("true", {"true": 1.0, "false": 0.0}, "noul"))

    monkeypatch.setattr(nano, "arun", arun)
    monkeypatch.setattr("sfumato.cli.decide_lines.AT_ONCE", 2)
    put("\n".join(f'"{letter}"' for letter in "abcdefgh"), "d.jsonl")
    command = ("decide", "--data", "d.jsonl", "--yes-no", "ok=Ok?", "-o", "out.jsonl")
    assert sfumato(*command) == (1, "", "sfumato: the numbers are not finite\n")
    assert [json.loads(line)["line"] for line in Path("out.jsonl").read_text().splitlines()] == [1, 2]
    assert sfumato("decide", "--data", "none.jsonl", "--yes-no", "ok=Ok?")[0] == 2


# ---- System One -----------------------------------------------------------------------------------------------------


def test_a_request_file_is_answered_as_a_server_answers_it(sfumato: Call, put: Put) -> None:
    request = {"model": "jev-latest", "state": {"message": "Zweimal bezahlt. é"}, "questions": RECORDS}
    request["questions"] = {**RECORDS, "mood": {"type": "choice", "criteria": {"happy": None, "sad": "unhappy"}}}
    put(json.dumps(request), "r.json")
    code, out, err = sfumato("decide", "--systemone", "r.json")
    body = json.loads(out)
    assert code == 0 and err == "" and body["model"] == "nano" and body["x_seed"] == 0
    assert list(body["answers"]) == list(RECORDS) and body["usage"]["output_tokens"] == 0
    assert set(body["answers"]["mood"]) == {"type", "choice", "probabilities", "confidence"}
    piped = json.loads(sfumato("decide", "--systemone", "-", stdin=json.dumps(request).encode())[1])
    assert piped["answers"] == body["answers"]  # nothing in it is random
    other = json.loads(sfumato("decide", "--systemone", "r.json", "--seed", "3", "--samples", "2")[1])
    assert other["x_seed"] == 3 and other["answers"] != body["answers"]
    put(json.dumps(request | {"x_seed": 0, "x_samples": 1}), "r.json")  # what the file says wins
    same = json.loads(sfumato("decide", "--systemone", "r.json", "--seed", "3", "--samples", "2")[1])
    assert same["answers"] == body["answers"]


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.txt"])
def test_several_requests_are_answered_one_a_line(sfumato: Call, put: Put, name: str) -> None:
    good: dict[str, Any] = {"state": "x", "questions": {"a": {"type": "noul", "instructions": "A?"}}}
    bad = {"state": "x", "questions": {"a": {"type": "noul"}}}
    requests = [json.dumps(one) for one in (good, bad, good)]
    put(f"[{','.join(requests)}]" if name == "r.json" else "\n".join(requests) + "\n", name)
    code, out, err = sfumato("decide", "--systemone", name)
    first, second, third = (json.loads(line) for line in out.splitlines())
    assert code == 1 and "1 of 3 lines have no answer; the first is line 2: question 'a'" in err
    assert first["answers"] == third["answers"] and second["detail"]["error_type"] == "invalid_request_error"


def test_a_request_file_that_is_none(sfumato: Call, no_model: None, put: Put) -> None:
    for content, words in (
        ("[]", "holds no request"),
        ("3", "holds no request"),
        ("{", "not JSON"),
        ("{}", "state is"),
    ):
        code, out, err = sfumato("decide", "--systemone", put(content, "r.json"))
        assert code == 2 and out == "" and words in err
