"""`sfumato decide`: choices for several questions on one canvas, with the probability of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sfumato.cli import files, flags, loading
from sfumato.cli import options as opt
from sfumato.cli.output import put
from sfumato.cli.tables import FittingTable
from sfumato.cli.view import SMOKE, hint, visible, working
from sfumato.errors import InputError
from sfumato.events import Decision
from sfumato.options import MOST_STEPS, LoadOptions, Options

BAR = 24
"""Characters of a bar at probability 1."""


@flags.takes(
    api=loading.API,
    options=opt.flags_of("seed", is_template=True, usual=("seed",)),
    load=opt.load_flags_of(has_decisions=True),
)
def command(
    prompt: Annotated[str | None, typer.Argument(help="The text; '-' or nothing reads standard input.")] = None,
    *,
    field: Annotated[
        list[str] | None, typer.Option(metavar="NAME=A|B|…", help="A question and its choices; repeatable.")
    ] = None,
    fields: Annotated[str | None, typer.Option(metavar="FILE", help='Or a JSON file: {"name": ["a", "b"], …}.')] = None,
    steps: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Denoising steps.")] = 1,
    raw: Annotated[bool, typer.Option("--raw", help="Behind the text as it is, without the chat template.")] = False,
    api: loading.ApiFlags,
    options: Options,
    load: LoadOptions,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object: each choice and all probabilities.")
    ] = False,
) -> None:
    """Decide between given choices: the likeliest for every field, and how likely each one is.

    Example: sfumato decide "The soup was cold." --field "mood=happy|unhappy" --field "about=food|service|price"
    """
    if (fields is None) == (not field):
        raise InputError('give one of: --field "NAME=A|B|…", as often as needed, or --fields FILE.json')
    questions = read_fields(files.read(fields), fields) if fields is not None else parse_fields(field or [])
    if prompt in (None, "-") and fields == "-":
        raise InputError("standard input cannot be both the text and --fields; give one of them as it is")
    if prompt in (None, "-"):
        prompt = files.read("-")
    if not prompt:
        raise InputError("the text is empty; give at least one character")
    llm = loading.connect_or_load(api, load)
    request: Any = prompt if raw else [{"role": "user", "content": prompt}]
    hint(llm, prompt)
    with working("deciding"):
        decisions = llm.decide(request, questions, steps=steps, options=options)
    if as_json:
        record = {name: asdict(decision) for name, decision in decisions.items()}
        put(json.dumps(record, ensure_ascii=False) + "\n")
    else:
        Console(highlight=False).print(FittingTable(table(decisions)))


def parse_fields(pairs: Sequence[str]) -> dict[str, list[str]]:
    """Field -> choices from NAME=A|B each, spaces around a choice left out."""
    fields: dict[str, list[str]] = {}
    for pair in pairs:
        name, is_pair, choices = pair.partition("=")
        if not name or not is_pair:
            raise InputError(f'--field is {pair!r}; give NAME=A|B|…, such as "mood=happy|unhappy"')
        if name in fields:
            raise InputError(f"two fields are named {name!r}; give each its own name")
        fields[name] = [choice.strip() for choice in choices.split("|")]
    return _checked(fields)


def read_fields(text: str, file: str) -> dict[str, list[str]]:
    """Field -> choices from JSON text."""
    fields = files.parse_json(text, file)
    if not isinstance(fields, dict) or not all(isinstance(choices, list) for choices in fields.values()):
        raise InputError(f'{file} must be an object of names and lists, such as {{"mood": ["happy", "unhappy"]}}')
    return _checked(fields)


def _checked(fields: dict[str, list[str]]) -> dict[str, list[str]]:
    """The same fields; InputError for those that `LLM.decide` would refuse, before a model is loaded."""
    if not fields:
        raise InputError("there are no fields to decide; give at least one with its choices")
    for name, choices in fields.items():
        if not name or not all(isinstance(choice, str) and choice for choice in choices):
            raise InputError(f"field {name!r} has the choices {choices}; a name and its choices are texts, none empty")
        if len(choices) < 2 or len(set(choices)) < len(choices):
            raise InputError(f"field {name!r} has the choices {choices}; give two or more different ones")
    return fields


def table(decisions: Mapping[str, Decision]) -> Table:
    """A line a choice, likeliest first; the bars are probabilities."""
    rows = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    rows.add_column(style="bold", overflow="fold")
    rows.add_column(overflow="fold")
    rows.add_column(no_wrap=True)
    rows.add_column(justify="right", no_wrap=True)
    for number, (name, decision) in enumerate(decisions.items()):
        if number:
            rows.add_row()
        ranked = sorted(decision.probabilities.items(), key=lambda item: -item[1])
        for rank, (choice, p) in enumerate(ranked):
            style = "bold" if choice == decision.choice else "dim"
            cells = visible("" if rank else name), visible(choice, style), bar(p), Text(f"{p:.1%}", style)
            rows.add_row(*cells)
    return rows


def bar(p: float) -> Text:
    """A bar of eighths of a character on a dim ground."""
    eighths = round(p * BAR * 8)
    drawn = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
    return Text(drawn, style=SMOKE[1]).append("·" * (BAR - len(drawn)), style="dim")
