"""`sfumato edit`: rewrite a text file where it stands, and show what changed as a diff."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Annotated

import typer
from rich.console import Console

from sfumato.cli import files, flags, loading, places
from sfumato.cli import options as opt
from sfumato.cli.output import put, usage_record
from sfumato.cli.view import diff_text, hint, summary, visible, working
from sfumato.errors import InputError
from sfumato.options import LoadOptions, Options


@flags.takes(
    api=loading.API,
    options=opt.flags_of("seed", "max_steps", "temperature", is_template=True),
    load=opt.load_flags_of(),
    output=opt.OUTPUT,
)
def command(
    file: Annotated[str, typer.Argument(help="A text file; '-' reads standard input.")],
    *,
    instruction: Annotated[str | None, typer.Option("--instruction", "-i", help="What to change.")] = None,
    span: Annotated[
        list[str] | None,
        typer.Option(metavar="LINE:COL-LINE:COL", help="Change only this, from a place up to another; repeatable."),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of the text that starts as noise; 0.5 if not given.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", "-w", help="Write the file too.")] = False,
    api: loading.ApiFlags,
    options: Options,
    load: LoadOptions,
    output: opt.OutputFlags,
) -> None:
    """Rewrite a file, or spans of it, and print what changed as a unified diff.

    The file itself changes only with --write; --output writes the new text to another.

    Example: sfumato edit letter.txt --instruction "Make it more polite." --write

    Example: sfumato edit main.py --span 3:5-3:12 --strength 0.8 | git apply
    """
    if not instruction and not span:
        raise InputError("neither an --instruction nor a --span is given; say what to change, or where")
    target = output.file()
    if write and target is not None:
        raise InputError("--write and --output are given together; give one of them")
    if write:
        files.check_writable(file)
    text = files.read(file)
    if not text:
        raise InputError(f"{file} is empty, so there is nothing to edit")
    passages = places.spans(text, span or [])
    console = Console(highlight=False)
    llm = loading.connect_or_load(api, load)
    hint(llm, f"{instruction or ''}\n{text}")
    began = time.perf_counter()
    with working("editing"):
        edited = llm.edit(text, instruction or None, passages, strength, options=options)
    seconds, is_changed = time.perf_counter() - began, edited.text != text
    if write and is_changed:
        files.write(file, text, edited.text)
    if target is not None:
        target.write(edited.text)
    diff = edited.diff(_in_diff(file))
    if output.as_json:
        record = {"text": edited.text, "diff": diff, "seed": edited.seed} | usage_record(edited.usage)
        put(json.dumps(record, ensure_ascii=False) + "\n")
    elif console.is_terminal:
        console.print(diff_text(diff), end="", soft_wrap=True)
        figures = f"{summary(edited.usage, seconds)} · seed {edited.seed}"
        console.print(visible(figures + (f" · in {file}" if write and is_changed else ""), "dim"))
    else:
        put(diff)
    if not is_changed:
        print("sfumato: nothing changed", file=sys.stderr)


def _in_diff(file: str) -> str:
    """A file's name as a diff has it behind a/ and b/; `git apply` reads it where it is relative."""
    if file == "-":
        return "text"
    return os.fsencode(os.path.normpath(file)).decode("utf-8", "replace").lstrip("/")
