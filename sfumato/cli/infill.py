"""`sfumato infill`: write the missing text at one place of a file; every other byte stays."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console

from sfumato.cli import files, flags, loading, places
from sfumato.cli import options as opt
from sfumato.cli.output import put, usage_record
from sfumato.cli.view import around, hint, summary, visible, working
from sfumato.errors import InputError
from sfumato.options import LoadOptions, Options


@dataclass(frozen=True)
class GapFlags:
    """Where to write, and how much."""

    at: Annotated[
        str | None, typer.Option(metavar="LINE:COL", help="Where to write; lines and columns from 1, in characters.")
    ] = None
    marker: Annotated[
        str | None,
        typer.Option(help="Or: the text to replace, which stands once in the file.", show_default=places.MARKER),
    ] = None
    length: Annotated[
        int | None, typer.Option(min=1, help="Exactly so many tokens. Default: the model finds the length.")
    ] = None
    at_most: Annotated[int | None, typer.Option(min=1, help="The most tokens of a length that the model finds.")] = None

    def check(self) -> None:
        """InputError for two lengths."""
        if self.length is not None and self.at_most is not None:
            raise InputError("--length and --at-most are given together; give one of them")


@flags.takes(
    gap=flags.group_of(GapFlags),
    api=loading.API,
    options=opt.flags_of("seed", "max_steps", "temperature", is_template=True),
    load=opt.load_flags_of(),
    output=opt.OUTPUT,
)
def command(
    file: Annotated[str, typer.Argument(help="A text file; '-' reads standard input.")],
    *,
    gap: GapFlags,
    only: Annotated[bool, typer.Option("--only", help="Print only the new text.")] = False,
    write: Annotated[
        bool, typer.Option("--write", "-w", help="Write the file instead of printing its new text.")
    ] = False,
    api: loading.ApiFlags,
    options: Options,
    load: LoadOptions,
    output: opt.OutputFlags,
) -> None:
    """Write what is missing at one place of a file, between the texts before and behind it.

    Prints the whole new text byte for byte; on a terminal, the place.

    Example: sfumato infill main.py --at 12:5 --at-most 40 --write

    Example: echo "Roses are <FILL>, violets are blue." | sfumato infill - --length 3
    """
    gap.check()
    target = output.file()
    if write and target is not None:
        raise InputError("--write and --output are given together; give one of them")
    if write:
        files.check_writable(file)
    text = files.read(file)
    prefix, suffix = places.cut(text, gap.at, gap.marker, "standard input" if file == "-" else file)
    console = Console(highlight=False)
    llm = loading.connect_or_load(api, load)
    hint(llm, text)
    began = time.perf_counter()
    with working("writing"):
        filled = llm.infill(prefix, suffix, gap.length, at_most=gap.at_most, options=options)
    seconds, middle = time.perf_counter() - began, filled.values["middle"]
    if write:
        files.write(file, text, filled.text)
    if target is not None:
        target.write(middle if only else filled.text)
    if output.as_json:
        record = {"text": filled.text, "middle": middle, "length": filled.lengths["middle"], "seed": filled.seed}
        put(json.dumps(record | usage_record(filled.usage), ensure_ascii=False) + "\n")
    elif console.is_terminal:
        console.print(visible(middle) if only else around(prefix, middle, suffix), soft_wrap=True)
        figures = f"{filled.lengths['middle']} tokens written · {summary(filled.usage, seconds)} · seed {filled.seed}"
        console.print(visible(figures + (f" · in {file}" if write else ""), "dim"))
    elif target is not None:
        return
    elif only:
        put(middle)
    elif not write:
        put(filled.text)
