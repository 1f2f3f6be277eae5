"""evals/checkers.py and patterns.py: each check takes what is right and nothing else, and no answer makes it raise."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sfumato.errors import InputError
from sfumato.evals import patterns
from sfumato.evals.checkers import AnswerChecker, checker_of, strict_json, unfenced


def checker(check: str, problems: list[str] | None = None, **record: Any) -> AnswerChecker:
    return checker_of(check, record, ([] if problems is None else problems).append)


@pytest.mark.parametrize(
    ("check", "record", "right", "wrong"),
    [
        (
            "exact",
            {"answer": "two words"},
            ["two words", " two words\n"],
            ["Two words", "two  words", "two words.", ""],
        ),
        ("exact", {"answer": ["a", "b"]}, ["a", "b "], ["c", "ab", ""]),
        ("contains", {"answer": "42"}, ["42", "It is 42.", "142"], ["4 2", ""]),
        ("contains", {"answer": ["no", "never"]}, ["never!", "I know"], ["N0"]),
        (
            "json",
            {"answer": {"a": 1, "b": [True, None, "x"]}},
            [
                '{"b":[true,null,"x"],"a":1.0}',
                '```json\n{"a": 1, "b": [true, null, "x"]}\n```',
                ' {"a":1e0,"b":[true,null,"\\u0078"]} ',
            ],
            ['{"a":1,"b":[1,null,"x"]}', '{"a":1,"a":1,"b":[true,null,"x"]}', '{"a":1}', "", "{", "[" * 100_000, "NaN"],
        ),
        ("json", {"answer": 0}, ["0", "0.0", "-0"], ["false", '"0"', "null", "1e999", "Infinity", "1" * 5000]),
        ("json", {"answer": None}, ["null"], ["", "0", "None"]),
        ("regex", {"answer": "[0-9]{4}-[0-9]{2}"}, ["2026-11", "2026-11\n"], ["2026-111", "on 2026-11", ""]),
    ],
)
def test_texts_are_checked(check: str, record: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    one = checker(check, **record)
    assert [text for text in right if not one.is_right(text)] == []
    assert [text for text in wrong if one.is_right(text)] == []


def test_a_right_answer_is_known_where_there_is_one() -> None:
    assert checker("exact", answer=["a", "b"]).answer == "a"
    assert json.loads(checker("json", answer={"é": 1}).answer) == {"é": 1}
    assert checker("regex", answer="a+").answer == ""


PIECES: dict[str, Any] = {"template": "def f(a, b):\n    return ___", "inputs": [[1, 2], [5, 5]]}


def test_code_is_run() -> None:
    for more in {"answer": "a + b"}, {"outputs": [3, 10]}, {"answer": "b + a", "outputs": [3.0, 10]}:
        one = checker("python", **PIECES, **more)
        right = ["a + b", " b + a\n", "sum([a, b])", "```python\na + b\n```"]
        wrong = [
            "a - b",
            "a +",
            "",
            "c",
            "__import__('os').system('true')",
            "a ** 9 ** 9 ** 9",
            "[a] * 10 ** 9",
            "(" * 9999,
        ]
        assert [text for text in right if not one.is_right(text)] == []
        assert [text for text in wrong if one.is_right(text)] == []
    whole = checker("python", inputs=[[3], [[1, 2]]], outputs=[[3, 3], [[1, 2], [1, 2]]])
    assert whole.is_right("def twice(x):\n    return [x, x]\n") and whole.is_right("def twice(x):\n    return (x, x)")
    assert not whole.is_right("def twice(x):\n    return [x]") and not whole.is_right("[x, x]")
    assert not checker("python", inputs=[[1]], outputs=[True]).is_right("def f(x):\n    return x")


@pytest.mark.parametrize(
    ("check", "record", "sentence"),
    [
        ("fuzzy", {"answer": "a"}, "check is 'fuzzy'; give one of exact, contains, json, regex, python"),
        (7, {"answer": "a"}, "check is 7; give one of"),
        ("exact", {}, "it has no answer"),
        ("exact", {"answer": 42}, "answer is 42; give a text, or a list of texts that are right"),
        ("contains", {"answer": []}, r"answer is \[\]; give a text"),
        ("contains", {"answer": " "}, "answer is ' '; give a text"),
        ("regex", {"answer": 4}, "answer is 4; give a regular expression"),
        ("regex", {"answer": "(a"}, "the pattern '\\(a' is no regular expression: missing \\)"),
        ("regex", {"answer": "a" * 10_001}, "the pattern has 10001 characters; the limit is 10000"),
        ("python", {"answer": "1"}, "it has no inputs"),
        ("python", {"answer": "1", "inputs": []}, r"inputs is \[\]; give 1 to 100 lists of arguments"),
        ("python", {"answer": "1", "inputs": [1]}, "inputs has 1; give a list of arguments for each call"),
        ("python", {"inputs": [[1]]}, "answer is None; give code that is right, or outputs"),
        ("python", {"inputs": [[1]], "outputs": [1, 2]}, r"outputs is \[1, 2\]; give a value for each of the 1 inputs"),
        (
            "python",
            {"inputs": [[1]], "outputs": [1], "template": "f"},
            "template is 'f'; give the source of a function",
        ),
        ("python", {"inputs": [[{}]], "outputs": [1]}, "the evaluator does not know values of the type dict"),
        ("python", {"inputs": [[1]], "outputs": [{"a": 1}]}, "the evaluator does not know values of the type dict"),
        ("python", {**PIECES, "answer": "a +"}, "the source is no Python"),
        ("python", {**PIECES, "answer": "a", "outputs": [3, 10]}, "the code of answer does not give the outputs"),
    ],
)
def test_a_record_that_is_none_is_refused(check: Any, record: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        checker_of(check, record, lambda _: None)


def test_a_pattern_that_takes_years_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    problems: list[str] = []
    one = checker("regex", problems, answer="(a|aa)+b|c")
    assert one.is_right("c") and problems == []
    with monkeypatch.context() as soon:
        soon.setattr(patterns, "SECONDS", 0.5)
        assert not one.is_right("a" * 60)
    [sentence] = problems
    assert sentence.startswith("the pattern '(a|aa)+b|c' takes longer than the 0.5 seconds allowed")
    assert not one.is_right("c")  # it is not tried again
    assert checker("regex", answer="a+").is_right("aaa")  # another one has a child of its own


def test_a_pattern_that_python_warns_of_warns_nobody(recwarn: pytest.WarningsRecorder) -> None:
    one = checker("regex", answer="[[a]+")
    assert one.is_right("a[a") and not one.is_right("b") and not recwarn.list


def test_json_is_read_strictly() -> None:
    assert strict_json('{"a": [1, 2.5]}') == {"a": [1, 2.5]}
    for text in ('{"a": 1, "a": 2}', "NaN", "-Infinity", "1e400", "[1,]", "[" * 100_000, ""):
        with pytest.raises(ValueError, match=r"."):
            strict_json(text)


def test_a_fence_holds_the_answer() -> None:
    assert unfenced("Sure:\n```python\nx = 1\n```\nand\n```\ny\n```") == "x = 1"
    assert unfenced("``` json\n1") == "``` json\n1" and unfenced("plain") == "plain"
