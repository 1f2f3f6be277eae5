"""evals/files.py: lines become a task, and what is wrong with one is a sentence with its number."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfumato.errors import InputError
from sfumato.evals import files
from sfumato.evals.files import exercise_of_file, file_item
from sfumato.tasks.task import messages

GOOD = {"prompt": "6 times 7?", "answer": "42", "check": "contains"}


def lines(path: Path, *records: Any) -> Path:
    path.write_bytes(b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in records))
    return path


def test_lines_become_a_task(tmp_path: Path) -> None:
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    path = lines(tmp_path / "mine.jsonl", GOOD, b"", {"prompt": talk, "answer": {"n": 1}, "check": "json", "kind": "k"})
    path.write_bytes("\ufeff".encode() + path.read_bytes())
    task, items = (exercise := exercise_of_file(path)).task, exercise.items
    assert (task.name, len(items)) == ("mine", 2)
    assert messages(task, items[0]) == [{"role": "user", "content": "6 times 7?"}]
    assert messages(task, items[1]) == talk
    assert task.kind is not None and [task.kind(item) for item in items] == ["", "k"]
    assert [task.answer(item) for item in items] == ["42", '{"n": 1}']
    assert task.is_right("It is 42.", items[0]) and not task.is_right("It is 42.", items[1])
    with pytest.raises(InputError, match="the items of mine are a file's lines"):
        task.generate(np.random.default_rng(0))


def test_of_many_lines_some_are_drawn(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({**GOOD, "prompt": str(n)} for n in range(50)))
    every = exercise_of_file(path).items
    some = exercise_of_file(path, count=10, seed=3).items
    assert len(some) == 10 and [*some] == [item for item in every if item in some]
    assert exercise_of_file(path, count=10, seed=3).items == some != exercise_of_file(path, count=10, seed=4).items
    assert exercise_of_file(path, count=50).items == exercise_of_file(path, count=99).items == every


def test_lines_that_are_alike_are_items_each(tmp_path: Path) -> None:
    exercise = exercise_of_file(lines(tmp_path / "a.jsonl", GOOD, GOOD, GOOD))
    assert Counter(map(exercise.task.prompt, exercise.items)) == {"6 times 7?": 3} and len({*exercise.items}) == 3


def test_bad_lines_are_named_and_the_rest_are_there(tmp_path: Path) -> None:
    bad: list[str] = []
    path = lines(tmp_path / "a.jsonl", b"{", GOOD, {"prompt": "x"}, b'"\xff"', GOOD | {"check": "fuzzy"})
    assert len(exercise_of_file(path, bad_lines=bad).items) == 1
    assert [sentence.partition(":")[0] for sentence in bad] == ["line 1", "line 3", "line 4", "line 5"]
    assert "it is not JSON" in bad[0] and "it has no check; give exact" in bad[1]
    assert "byte 1 (0xff) is not UTF-8" in bad[2] and "check is 'fuzzy'" in bad[3]
    assert len(exercise_of_file(lines(tmp_path / "b.jsonl", {"prompt": "x", "answer": "y"}), check="exact").items) == 1


def changed_line(sentence: str, **changes: Any) -> tuple[bytes, str]:
    return json.dumps(GOOD | changes).encode(), sentence


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"[]", "it is no object; give prompt, answer and check"),
        (b"[" * 100_000, "it is not JSON: it is nested too deeply"),
        (b'{"prompt": "a", "prompt": "b"}', "it is not JSON: it says 'prompt' twice"),
        (b'{"prompt": "a", "answer": NaN, "check": "json"}', "it is not JSON: 'NaN' is no finite number"),
        (b'{"answer": "a"}', "it has no prompt"),
        changed_line("prompt is ' '; give a text of at least one character", prompt=" "),
        changed_line("prompt is 7; give a text, or a list of messages", prompt=7),
        changed_line(r"prompt is \[\]; give a text, or a list", prompt=[]),
        changed_line("prompt holds half a character", prompt="\ud800"),
        changed_line("message 1 of prompt is 'a'; give a role", prompt=["a"]),
        changed_line(
            "message 1 of prompt is {'content': 'a', 'role': 'tool'}; give a role",
            prompt=[{"role": "tool", "content": "a"}],
        ),
        changed_line("the content of message 1 is None; give a text", prompt=[{"role": "user"}]),
        changed_line("the messages of prompt are by assistant;", prompt=[{"role": "assistant", "content": "a"}]),
        changed_line("the messages of prompt are by system;", prompt=[{"role": "system", "content": "a"}]),
        changed_line("the messages of prompt are by user, user;", prompt=[{"role": "user", "content": "a"}] * 2),
        changed_line("kind is 3; give a text", kind=3),
        changed_line("kind is 'a.nb'; give a text", kind="a\nb"),
        changed_line("kind is 'k+.*; give a text of at most 60", kind="k" * 61),
        (b'{"prompt": "' + b"a" * (files.LONGEST_LINE + 1), "it has more than 16 MiB"),
    ],
)
def test_a_line_that_is_none_is_refused(line: bytes, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        file_item(line)


def test_a_file_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none.jsonl: No such file"):
        exercise_of_file(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"cannot read 'a.x00.jsonl': embedded null"):
        exercise_of_file("a\0.jsonl")
    with pytest.raises(InputError, match=r"a.jsonl has no item; give JSON lines"):
        exercise_of_file(lines(tmp_path / "a.jsonl", b"", b" "))
    with pytest.raises(InputError, match=r"a.jsonl has no item; line 1: it is not JSON"):
        exercise_of_file(lines(tmp_path / "a.jsonl", b"{"))
    monkeypatch.setattr(files, "MOST_LINES", 2)
    assert len(exercise_of_file(lines(tmp_path / "a.jsonl", GOOD, GOOD)).items) == 2
    with pytest.raises(InputError, match="has more than 2 lines; cut it"):
        exercise_of_file(lines(tmp_path / "a.jsonl", GOOD, GOOD, GOOD))


def test_a_line_that_is_too_long_takes_no_memory_and_ends_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 100)
    bad: list[str] = []
    path = lines(tmp_path / "a.jsonl", GOOD | {"prompt": "x" * 1000}, GOOD)
    assert len(exercise_of_file(path, bad_lines=bad).items) == 1 and bad == [
        "line 1: it has more than 0 MiB; shorten the prompt"
    ]


def test_a_check_that_could_not_be_carried_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_match(pattern: str, text: str, what: str) -> bool:
        raise InputError(f"{what} takes longer than the 1 seconds allowed; make it simpler")

    monkeypatch.setattr("sfumato.evals.patterns.is_match", is_match)
    problems: list[str] = []
    path = lines(tmp_path / "a.jsonl", GOOD, {"prompt": "x", "answer": "(a|aa)+b", "check": "regex"})
    exercise = exercise_of_file(path, problems=problems)
    assert not exercise.task.is_right("a" * 60, exercise.items[1])
    [sentence] = problems
    assert sentence.startswith("line 2: the pattern") and sentence.endswith("; its answer counts as wrong")
