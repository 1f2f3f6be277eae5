"""One's own items as a task: JSON lines, each a prompt, an answer and how it is checked, read with care.

    {"prompt": "What is 6 times 7?", "answer": "42", "check": "contains"}
    {"prompt": [{"role": "system", "content": "Answer in JSON."}, …], "answer": {"n": 42}, "check": "json"}

`kind` makes rows of their own; fields that nothing here knows are passed over. A line that is none is kept apart with a
sentence that names it. It lacks tools, and images.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from sfumato.errors import InputError
from sfumato.evals.checkers import AnswerChecker, checker_of, strict_json
from sfumato.evals.tasks import Exercise
from sfumato.tasks.task import Task

LONGEST_LINE = 16 << 20
"""Bytes of a line at most."""
MOST_LINES = 1_000_000
LONGEST_KIND = 60
"""Characters of a kind's name."""
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class FileItem:
    """One line: a conversation that ends with the user, and what is right."""

    system: str
    turns: tuple[tuple[str, str], ...]
    """Before the prompt: the user's message and its answer each."""
    prompt: str
    kind: str
    checker: AnswerChecker


def exercise_of_file(
    path: str | Path,
    check: str | None = None,
    count: int | None = None,
    seed: int = 0,
    bad_lines: list[str] | None = None,
    problems: list[str] | None = None,
) -> Exercise:
    """The items of a file of JSON lines, named after the file; `check` is for lines that name none.

    Of more than `count` right lines so many are drawn, the same ones for the same seed, in the file's order. A sentence
    about each line that is wrong goes to `bad_lines`, and while answers are checked, about each check that could not be
    carried out to `problems`. InputError where the file cannot be read, or has no right line."""
    items: dict[str, FileItem] = {}
    sentences = [] if bad_lines is None else bad_lines
    complaints = [] if problems is None else problems
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(_lines(file, path), 1):
                if not line.strip():
                    continue
                try:
                    item = file_item(line, check, _problem(complaints, number))
                    items[_name(_text(line), items)] = item
                except InputError as error:
                    sentences.append(f"line {number}: {error}")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give JSON lines of prompts and answers") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {str(path)!r}: {error}") from None  # a name with a NUL
    if not items:
        first = f"; {sentences[0]}" if sentences else "; give JSON lines of prompts and answers"
        raise InputError(f"{path} has no item{first}")
    return Exercise(_task(Path(path).stem, items), _some([*items], count, seed))


def file_item(line: bytes, check: str | None = None, problem: Any = lambda sentence: None) -> FileItem:
    """The item of one line. InputError says what is wrong with it."""
    try:
        record = strict_json(_text(line))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"it is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise InputError("it is no object; give prompt, answer and check")
    if "prompt" not in record:
        raise InputError("it has no prompt; give prompt, answer and check")
    if (name := record.get("check", check)) is None:
        raise InputError("it has no check; give exact, contains, json, regex or python, for all lines with --check")
    kind = record.get("kind", "")
    if not isinstance(kind, str) or len(kind) > LONGEST_KIND or not (kind == "" or kind.isprintable()):
        raise InputError(f"kind is {reprlib.repr(kind)}; give a text of at most {LONGEST_KIND} characters")
    system, turns, prompt = _conversation(record["prompt"])
    return FileItem(system, turns, prompt, kind, checker_of(name, record, problem))


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _task(name: str, items: Mapping[str, FileItem]) -> Task:
    """A task whose items are the lines; it makes none of its own."""

    def generate(_: np.random.Generator) -> str:
        raise InputError(f"the items of {name} are a file's lines; there are no others")

    return Task(
        name,
        generate,
        lambda item: items[item].prompt,
        lambda item: items[item].checker.answer,
        lambda text, item: items[item].checker.is_right(text),
        earlier=lambda item: items[item].turns,
        kind=lambda item: items[item].kind,
        system=lambda item: items[item].system,
    )


def _name(text: str, items: Mapping[str, FileItem]) -> str:
    """The text of a line; of one that comes again with its number among its like."""
    number, name = 1, text
    while name in items:
        number += 1
        name = f"{text} ({number})"
    return name


def _some(items: list[str], count: int | None, seed: int) -> list[str]:
    if count is None or count >= len(items):
        return items
    places = np.random.default_rng(seed).choice(len(items), count, replace=False)
    return [items[place] for place in sorted(places)]


def _problem(problems: list[str], number: int) -> Any:
    return lambda sentence: problems.append(f"line {number}: {sentence}; its answer counts as wrong")


def _lines(file: IO[bytes], path: str | Path) -> Iterator[bytes]:
    """The lines; of one that is too long as much as shows that. InputError where there are too many."""
    for number in range(1, MOST_LINES + 2):
        line = file.readline(LONGEST_LINE + 1)
        if not line:
            return
        if number > MOST_LINES:
            raise InputError(f"{path} has more than {MOST_LINES:,} lines; cut it")
        rest = line
        while len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):
            rest = file.readline(LONGEST_LINE + 1)
        yield line


def _text(line: bytes) -> str:
    if len(line) > LONGEST_LINE:
        raise InputError(f"it has more than {LONGEST_LINE >> 20} MiB; shorten the prompt")
    try:
        return line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"byte {error.start} ({line[error.start]:#04x}) is not UTF-8; convert it first") from None


def _conversation(prompt: Any) -> tuple[str, tuple[tuple[str, str], ...], str]:
    """The system message, the turns before the last message, and that one."""
    if isinstance(prompt, str):
        return "", (), _content(prompt, "prompt")
    if not isinstance(prompt, list) or not prompt:
        raise InputError(f"prompt is {reprlib.repr(prompt)}; give a text, or a list of messages")
    messages = [_message(message, number) for number, message in enumerate(prompt, 1)]
    system = messages.pop(0)[1] if messages[0][0] == "system" else ""
    roles = [role for role, _ in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise InputError(
            f"the messages of prompt are by {', '.join(role for role, _ in _named(system, messages))}; after a system "
            "message, if any, user and assistant take turns, and the user's is the last"
        )
    texts = [text for _, text in messages]
    return system, tuple(zip(texts[:-1:2], texts[1::2], strict=True)), texts[-1]


def _named(system: str, messages: Sequence[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    return [*([("system", system)] if system else []), *messages[:6]]


def _message(message: Any, number: int) -> tuple[str, str]:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise InputError(
            f"message {number} of prompt is {reprlib.repr(message)}; give a role ({', '.join(_ROLES)}) and content"
        )
    return message["role"], _content(message.get("content"), f"the content of message {number}")


def _content(text: Any, name: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{name} is {reprlib.repr(text)}; give a text of at least one character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} holds half a character (a lone surrogate); give whole ones") from None
    return text
