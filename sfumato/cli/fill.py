"""`sfumato fill`: a template of fixed texts and slots in, the text with its slots written out."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from sfumato.cli import options as opt
from sfumato.cli import text as texts
from sfumato.cli.generate import load
from sfumato.cli.view import WRITTEN, summary, visible, working
from sfumato.errors import InputError


def command(
    template: Annotated[str, typer.Argument(help="A JSON file: a list of texts and slots; '-' reads standard input.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What the template answers.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="The template continues the prompt as it is, without the chat template.")
    ] = False,
    model: opt.Model = "nano",
    seed: opt.Seed = None,
    set_: opt.Set = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    ops: opt.Ops = "auto",
    quantize: opt.Quantize = None,
    memory_limit: opt.MemoryLimit = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object: text, values, lengths, usage.")] = False,
) -> None:
    """Write the slots of a template, all of them together; the texts between stay byte for byte. A slot is an object:
    name, length or at_most (in tokens), text and strength, or one of schema, regex, grammar, choices.

    Example: sfumato fill form.json --prompt "Who wrote the first program?"

    Example: echo '["Name: ", {"name": "who", "at_most": 8}, "."]' | sfumato fill -
    """
    options = opt.build_free(set_, seed)
    if prompt == "" or (raw and prompt is None):
        raise InputError("--prompt is empty or missing; give a text, or leave --prompt and --raw out")
    from sfumato.templates.slots import Slot, check_template, read_template

    pieces = check_template(read_template(texts.read(template).removeprefix(texts.BOM)))
    console = Console(highlight=False)
    llm = load(model, device, dtype, ops, quantize, memory_limit)
    request: Any = prompt if raw or prompt is None else [{"role": "user", "content": prompt}]
    began = time.perf_counter()
    with working("writing"):
        filled = llm.fill(pieces, request, options)
    seconds = time.perf_counter() - began
    if as_json:
        record = {"text": filled.text, "values": filled.values, "lengths": filled.lengths, "seed": filled.seed}
        record |= {"usage": asdict(filled.usage), "tokens_per_pass": filled.usage.tokens_per_pass}
        texts.put(json.dumps(record, ensure_ascii=False) + "\n")
    elif console.is_terminal:
        shown = (
            visible(filled.values[piece.name], WRITTEN) if isinstance(piece, Slot) else visible(piece)
            for piece in pieces
        )
        console.print(Text.assemble(*shown), end="" if filled.text.endswith("\n") else "\n", soft_wrap=True)
        written = f"{sum(filled.lengths.values())} tokens written · "
        console.print(Text(written + summary(filled.usage, seconds) + f" · seed {filled.seed}", style="dim"))
    else:
        texts.put(filled.text)
