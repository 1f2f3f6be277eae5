"""`sfumato infill`: write what is missing at one place of a file; every other byte stays."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from sfumato.cli import options as opt
from sfumato.cli import text as texts
from sfumato.cli.generate import load
from sfumato.cli.view import around, summary, visible, working
from sfumato.errors import InputError


def command(
    file: Annotated[str, typer.Argument(help="A text file; '-' reads standard input.")],
    at: Annotated[
        str | None, typer.Option(metavar="LINE:COL", help="Where to write; lines and columns from 1, in characters.")
    ] = None,
    marker: Annotated[
        str | None,
        typer.Option(help="Or: the text to replace, which stands once in the file.", show_default=texts.MARKER),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Exactly so many tokens. Default: the length is found.")
    ] = None,
    at_most: Annotated[int | None, typer.Option(min=1, help="Bound in tokens on a length that is found.")] = None,
    only: Annotated[bool, typer.Option("--only", help="Print only what was written.")] = False,
    write: Annotated[
        bool, typer.Option("--write", "-w", help="Write the file instead of printing its new text.")
    ] = False,
    model: opt.Model = "nano",
    seed: opt.Seed = None,
    set_: opt.Set = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    ops: opt.Ops = "auto",
    quantize: opt.Quantize = None,
    memory_limit: opt.MemoryLimit = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Write what is missing at one place of a file, between what stands before and behind it. Prints the whole new text
    byte for byte; on a terminal, the place.

    Example: sfumato infill main.py --at 12:5 --at-most 40 --write

    Example: echo "Roses are <FILL>, violets are blue." | sfumato infill - --length 3
    """
    options = opt.build_free(set_, seed)
    if length is not None and at_most is not None:
        raise InputError("--length and --at-most are given together; give one of them")
    if write:
        texts.check_writable(file)
    text = texts.read(file)
    prefix, suffix = texts.cut(text, at, marker, "standard input" if file == "-" else file)
    console = Console(highlight=False)
    llm = load(model, device, dtype, ops, quantize, memory_limit)
    began = time.perf_counter()
    with working("writing"):
        filled = llm.infill(prefix, suffix, length, options, at_most)
    seconds, middle = time.perf_counter() - began, filled.values["middle"]
    if write:
        texts.write(file, text, filled.text)
    if as_json:
        record = {"text": filled.text, "middle": middle, "length": filled.lengths["middle"], "seed": filled.seed}
        record |= {"usage": asdict(filled.usage), "tokens_per_pass": filled.usage.tokens_per_pass}
        texts.put(json.dumps(record, ensure_ascii=False) + "\n")
    elif console.is_terminal:
        console.print(visible(middle) if only else around(prefix, middle, suffix), soft_wrap=True)
        told = f"{filled.lengths['middle']} tokens written · {summary(filled.usage, seconds)} · seed {filled.seed}"
        console.print(visible(told + (f" · in {file}" if write else ""), "dim"))
    elif only:
        texts.put(middle)
    elif not write:
        texts.put(filled.text)
