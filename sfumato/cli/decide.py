"""`sfumato decide`: questions with given answers about a text, or many, with the probability of each answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from sfumato.cli import files, flags, loading
from sfumato.cli import options as opt
from sfumato.cli.answers import record_of, screen
from sfumato.cli.decide_lines import (
    LineFile,
    LineRequest,
    answer_lines,
    count_lines,
    json_lines,
    open_lines,
    read_requests,
    write_line,
)
from sfumato.cli.output import put
from sfumato.cli.questions import QuestionFlags, ReadingFlags, read_state
from sfumato.cli.view import hint, working
from sfumato.errors import InputError
from sfumato.events import Decisions
from sfumato.options import LoadOptions, Options
from sfumato.questions import Question, state_text
from sfumato.templates.checks import check_query
from sfumato.templates.interface import LanguageModel
from sfumato.templates.requests import Decide
from sfumato.templates.systemone import answers_of, decide_of

Connect = Callable[[], LanguageModel]
"""Loads the model, or connects to its server."""


@dataclass(frozen=True)
class AnswerFlags:
    """As what answers are written, and where."""

    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object: each choice, all probabilities, confidence.")
    ] = False
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="With many texts or requests: write here.")
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="Go on behind the lines that FILE holds already.")] = False
    force: opt.Force = False

    def file(self, questions: QuestionFlags) -> LineFile | None:
        """The file, where one is named; InputError where that does not go with the rest."""
        is_many = questions.data is not None or questions.systemone is not None
        if self.output is None and self.resume:
            raise InputError("--resume is given without -o FILE; name the file that holds the lines so far")
        if self.output is not None and not is_many:
            raise InputError("-o is for --data and --systemone; leave it out, or give > FILE in a shell")
        return None if self.output is None else open_lines(self.output, self.force, self.resume, questions.files)


@flags.takes(
    questions=flags.group_of(QuestionFlags),
    reading=flags.group_of(ReadingFlags, "How to read"),
    answers=flags.group_of(AnswerFlags),
    api=loading.API,
    options=opt.flags_of("seed", is_template=True, usual=("seed",), preset_of=("seed",)),
    load=opt.load_flags_of(has_decisions=True),
)
def command(
    text: Annotated[str | None, typer.Argument(help="The text; '-' or nothing reads standard input.")] = None,
    *,
    questions: QuestionFlags,
    reading: ReadingFlags,
    answers: AnswerFlags,
    api: loading.ApiFlags,
    options: Options,
    load: LoadOptions,
) -> None:
    """Answer questions about a text, each from given answers: the likeliest, and how likely each one is.

    Example: sfumato decide "The soup was cold." --yes-no "Is it a complaint?" --field "about=food|service|price"

    Example: sfumato decide --state mail.txt --score "anger=calm|annoyed|furious" --span "order=Which order is meant?"

    Example: sfumato decide --data mails.jsonl --questions questions.json -o answers.jsonl

    Example: sfumato decide --systemone request.json
    """
    questions.check_sources(text)
    target = answers.file(questions)

    def connect() -> LanguageModel:
        return loading.connect_or_load(api, load)

    if questions.systemone is not None:
        _answer_requests(questions.systemone, reading, options, target, connect)
    elif questions.data is not None:
        _answer_data(questions.data, _Asking(questions.read(), reading, options), target, connect)
    else:
        state: Any = text if questions.state is None else read_state(questions.state)
        state = files.read("-") if state in (None, "-") else state
        _answer_one(state, _Asking(questions.read(), reading, options), answers.as_json, connect)


@dataclass(frozen=True)
class _Asking:
    """What is asked of a text, and how."""

    questions: dict[str, Question]
    reading: ReadingFlags
    options: Options

    def query(self, state: Any) -> Decide:
        """The query, checked before a model is loaded."""
        if state == "":
            raise InputError("the text is empty; give at least one character")
        query = Decide(state, self.questions, **self.reading.fields, options=self.options)
        check_query(query)
        return query


def _answer_one(state: Any, asking: _Asking, as_json: bool, connect: Connect) -> None:
    query = asking.query(state)
    llm = connect()
    hint(llm, state_text(state))
    with working("deciding"):
        decisions = llm.run(query)
    if as_json:
        put(json.dumps(_records(decisions), ensure_ascii=False) + "\n")
    else:
        _show(decisions, asking.questions)


def _answer_data(data: str, asking: _Asking, target: LineFile | None, connect: Connect) -> None:
    """The same questions about each line's text or data."""
    asking.query("any")  # before the model is loaded
    total = count_lines(data)

    def item(number: int, value: Any) -> LineRequest:
        def line(outcome: Decisions | InputError) -> dict[str, Any]:
            if isinstance(outcome, InputError):
                return {"line": number, "error": str(outcome)}
            return {"line": number, "answers": _records(outcome)}

        return LineRequest.of(number, value, asking.query, line)

    answer_lines(connect(), (item(*one) for one in json_lines(data)), target, total)


def _answer_requests(
    file: str, reading: ReadingFlags, options: Options, target: LineFile | None, connect: Connect
) -> None:
    """Whole requests, each answered as the server answers it."""

    def query(body: Any) -> Decide:
        try:
            query = decide_of(body, **reading.fields, options=options)
            check_query(query)
        except InputError as error:
            raise InputError(str(error)) from None  # of a field, not of the flag that is called so
        return query

    requests = read_requests(file)
    if isinstance(requests, dict):
        one = query(requests)  # before the model is loaded
        llm = connect()
        with working("deciding"):
            answer = answers_of(llm.run(one), llm.name)
        write_line(answer, target)
        return
    total = len(requests) if isinstance(requests, list) else count_lines(file)
    llm = connect()

    def line(outcome: Decisions | InputError) -> dict[str, Any]:
        if isinstance(outcome, InputError):
            return {"detail": {"error_type": "invalid_request_error", "message": str(outcome)}}
        return answers_of(outcome, llm.name)

    answer_lines(llm, (LineRequest.of(number, body, query, line) for number, body in requests), target, total)


def _show(decisions: Decisions, questions: dict[str, Question]) -> None:
    """The answers on the screen; on a terminal with what they took."""
    console = Console(highlight=False)
    console.print(screen(decisions, questions))
    if console.is_terminal:
        usage = decisions.usage
        passes = f" in {usage.passes} pass{'es' if usage.passes != 1 else ''}" if usage.passes else ""
        reused = f", {usage.reused_tokens} of them reused" if usage.reused_tokens else ""
        line = f"{len(decisions)} answers{passes}, {usage.seconds:.2f} s (prompt {usage.prompt_tokens} tokens{reused})"
        console.print(Text(f"{line} · seed {decisions.seed}", style="dim"))


def _records(decisions: Decisions) -> dict[str, Any]:
    """The answers for programs; null for a question that was not asked."""
    return {id: record_of(one) for id, one in decisions.items()} | dict.fromkeys(decisions.skipped)
