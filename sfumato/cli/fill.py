"""`sfumato fill`: a template of fixed texts and slots in, the text with its slots written out."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from sfumato.cli import files, flags, loading
from sfumato.cli import options as opt
from sfumato.cli.output import put, usage_record
from sfumato.cli.view import WRITTEN, hint, summary, visible, working
from sfumato.errors import InputError
from sfumato.options import LoadOptions
from sfumato.templates.slots import Slot, check_template, read_template


@flags.takes(
    api=loading.API,
    chosen=opt.with_names(opt.flags_of("seed", "max_steps", "temperature", is_template=True)),
    load=opt.load_flags_of(),
    output=opt.OUTPUT,
)
def command(
    template: Annotated[str, typer.Argument(help="A JSON file: a list of texts and slots; '-' reads standard input.")],
    *,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What the template answers.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="The template continues the prompt as it is, without the chat template.")
    ] = False,
    api: loading.ApiFlags,
    chosen: opt.NamedOptions,
    load: LoadOptions,
    output: opt.OutputFlags,
) -> None:
    """Write the slots of a template, all of them together; the texts between stay byte for byte.

    A slot is an object: name, length or at_most (in tokens), text and strength, or one of schema, regex, grammar,
    choices.

    Example: sfumato fill form.json --prompt "Who wrote the first program?"

    Example: echo '["Name: ", {"name": "who", "at_most": 8}, "."]' | sfumato fill -
    """
    if prompt == "" or (raw and prompt is None):
        raise InputError("--prompt is empty or missing; give a text, or leave --prompt and --raw out")
    target = output.file()
    pieces = check_template(read_template(files.read(template).removeprefix(files.BOM)))
    console = Console(highlight=False)
    llm = loading.connect_or_load(api, load)
    request: Any = prompt if raw or prompt is None else [{"role": "user", "content": prompt}]
    hint(llm, prompt or "")
    options = chosen.options
    if "redos" not in chosen.names and any(isinstance(piece, Slot) and piece.constraint for piece in pieces):
        options = replace(options, redos=0)  # a preset's or the user's settings', which a grammar cannot have
    began = time.perf_counter()
    with working("writing"):
        filled = llm.fill(pieces, request, options=options)
    seconds = time.perf_counter() - began
    if target is not None:
        target.write(filled.text)
    if output.as_json:
        record = {"text": filled.text, "values": filled.values, "lengths": filled.lengths, "seed": filled.seed}
        put(json.dumps(record | usage_record(filled.usage), ensure_ascii=False) + "\n")
    elif console.is_terminal:
        shown = (
            visible(filled.values[piece.name], WRITTEN) if isinstance(piece, Slot) else visible(piece)
            for piece in pieces
        )
        console.print(Text.assemble(*shown), end="" if filled.text.endswith("\n") else "\n", soft_wrap=True)
        written = f"{sum(filled.lengths.values())} tokens written · "
        console.print(Text(written + summary(filled.usage, seconds) + f" · seed {filled.seed}", style="dim"))
    elif target is None:
        put(filled.text)
