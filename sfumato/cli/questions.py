"""The questions of `sfumato decide` and what they are about: from flags, and from files of JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast, get_args

import typer

from sfumato.cli import files
from sfumato.errors import InputError
from sfumato.options import MOST_STEPS
from sfumato.questions import Choice, Noul, Question, Score, Span, question_of
from sfumato.templates.checks import MOST_SAMPLES
from sfumato.templates.requests import Decide, Think

NAME = re.compile(r"([\w.-]{1,64})=(.+)", re.DOTALL)
"""A question behind the name of its answer; without one the question is the name."""


@dataclass(frozen=True)
class QuestionFlags:
    """What is asked, and of what, beside the text."""

    yes_no: Annotated[
        list[str] | None,
        typer.Option("--yes-no", "--noul", metavar="[NAME=]QUESTION", help="Ask yes or no; repeatable."),
    ] = None
    field: Annotated[list[str] | None, typer.Option(metavar="NAME=A|B|…", help="Choose one of these; repeatable.")] = (
        None
    )
    score: Annotated[
        list[str] | None, typer.Option(metavar="NAME=LOW|…|HIGH", help="Rate on these levels; repeatable.")
    ] = None
    span: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]QUESTION", help="Quote the sentence that says it; repeatable.")
    ] = None
    questions: Annotated[
        str | None,
        typer.Option(
            "--questions", "--fields", metavar="FILE", help='Or JSON: {"name": ["a", "b"] or a question\'s record, …}.'
        ),
    ] = None
    state: Annotated[
        str | None, typer.Option(metavar="FILE", help="The text is in this file; .json is read as data, or messages.")
    ] = None
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Many texts: JSON lines, a text or object each; one line of answers each."),
    ] = None
    systemone: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Whole System One requests: JSON, or one a line; answers as the server's."),
    ] = None

    def check_sources(self, text: str | None) -> None:
        """InputError where two things are to be read from standard input, or what is asked comes twice."""
        names = {"--state": self.state, "--data": self.data, "--systemone": self.systemone}
        sources = [name for name, value in names.items() if value is not None] + ["a text"] * (text is not None)
        if len(sources) > 1:
            raise InputError(f"{sources[0]} and {sources[1]} are given; give one of them")
        if self.systemone is not None and self.has_questions:
            raise InputError("--systemone has questions of its own; leave the others out")
        reads_text = not sources or text == "-" or "-" in names.values()
        if reads_text and self.questions == "-":
            raise InputError("standard input cannot be both the text and --questions; give one of them as it is")

    @property
    def files(self) -> list[str]:
        """The files that are read."""
        return [name for name in (self.questions, self.state, self.data, self.systemone) if name is not None]

    @property
    def has_questions(self) -> bool:
        """Whether any question is given."""
        return any((self.yes_no, self.field, self.score, self.span, self.questions is not None))

    def read(self) -> dict[str, Question]:
        """The questions by their names: those of the file first. InputError for one that is none, or comes twice."""
        if not self.has_questions:
            raise InputError(
                "there is no question; give --yes-no, --field, --score or --span, as often as needed, or --questions "
                "FILE.json"
            )
        questions = {} if self.questions is None else read_questions(files.read(self.questions), self.questions)
        makers: dict[str, Callable[[str], tuple[str, Question]]] = {
            "--yes-no": _noul,
            "--field": _choice,
            "--score": _score,
            "--span": _span,
        }
        pairs = (self.yes_no, self.field, self.score, self.span)
        for make, texts in zip(makers.values(), pairs, strict=True):
            for text in texts or ():
                name, question = make(text)
                if name in questions:
                    raise InputError(f"two questions are named {name!r}; give each its own name")
                questions[name] = question
        return questions


@dataclass(frozen=True)
class ReadingFlags:
    """How each question is read."""

    steps: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Denoising steps of a read.")] = 1
    samples: Annotated[
        int, typer.Option(min=1, max=MOST_SAMPLES, help="Draws of noise, whose probabilities are averaged.")
    ] = 1
    canvas: Annotated[int | None, typer.Option(min=1, help="Positions of the canvas; default: as few as fit.")] = None
    think: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(get_args(Think)),
            help="Think first: auto, where a first read is not sure enough. Default: never.",
            autocompletion=lambda incomplete: [one for one in get_args(Think) if one.startswith(incomplete)],
        ),
    ] = None
    threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="The confidence under which auto thinks, which this asks for. Default: 0.5."),
    ] = None
    calibrated: Annotated[
        bool, typer.Option("--calibrated/--not-calibrated", help="With the checkpoint's calibration, if it has one.")
    ] = True

    @property
    def fields(self) -> dict[str, Any]:
        """These, by the names of `Decide`."""
        usual = Decide("", {})
        think = self.think or ("never" if self.threshold is None else "auto")
        threshold = usual.threshold if self.threshold is None else self.threshold
        return {
            **{"steps": self.steps, "samples": self.samples, "canvas": self.canvas, "calibrated": self.calibrated},
            **{"think": cast(Think, think), "threshold": threshold},
        }


def read_state(file: str) -> Any:
    """What a file holds: data where its name ends with .json, else its text."""
    text = files.read(file)
    return files.parse_json(text, file) if file.lower().endswith(".json") else text


def read_questions(text: str, file: str) -> dict[str, Question]:
    """Name -> question from JSON: a list of options, or a record as Python and System One have it."""
    records = files.parse_json(text, file)
    if not isinstance(records, dict) or not records:
        raise InputError(
            f'{file} must be an object of names and questions, such as {{"mood": ["happy", "unhappy"], "refund": '
            '{"type": "noul", "instructions": "Is a refund requested?"}}'
        )
    questions = {}
    for name, record in records.items():
        try:
            questions[name] = _options(name, record) if isinstance(record, list) else question_of(record)
        except InputError as error:
            raise InputError(f"question {name!r} of {file}: {error}") from None
    return questions


# ---- one question a flag --------------------------------------------------------------------------------------------


def _noul(text: str) -> tuple[str, Question]:
    name, instructions = _named("--yes-no", text)
    return name, Noul(instructions)


def _span(text: str) -> tuple[str, Question]:
    name, instructions = _named("--span", text)
    return name, Span(instructions)


def _choice(text: str) -> tuple[str, Question]:
    name, options = _listed("--field", text, "A|B|…", "mood=happy|unhappy")
    return name, _options(name, options)


def _score(text: str) -> tuple[str, Question]:
    name, levels = _listed("--score", text, "LOW|…|HIGH", "anger=calm|annoyed|furious")
    if len(levels) < 2 or not all(levels):
        raise InputError(f"question {name!r} has the levels {levels}; give two or more, none empty")
    return name, Score(levels, name)


def _named(flag: str, text: str) -> tuple[str, str]:
    """A question, and its name: what stands before the first =, or the question itself."""
    match = NAME.fullmatch(text)
    name, question = match.groups() if match else (text, text)
    if not question.strip():
        raise InputError(f'{flag} is {text!r}; give a question, such as "refund=Is a refund requested?"')
    return name, question.strip()


def _listed(flag: str, text: str, form: str, example: str) -> tuple[str, list[str]]:
    """A name, and the parts behind it, spaces around each left out."""
    name, is_pair, parts = text.partition("=")
    if not name or not is_pair:
        raise InputError(f'{flag} is {text!r}; give NAME={form}, such as "{example}"')
    return name, [part.strip() for part in parts.split("|")]


def _options(name: str, options: Sequence[Any]) -> Choice:
    """A choice whose name is what is asked; InputError where there is nothing to choose."""
    if not all(isinstance(option, str) and option for option in options):
        raise InputError(f"question {name!r} has the options {options}; options are texts, none empty")
    if len(options) < 2 or len(set(options)) < len(options):
        raise InputError(f"question {name!r} has the options {options}; give two or more different ones")
    return Choice([*options], name)
