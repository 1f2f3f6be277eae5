"""`sfumato run`: a model and, if given, one prompt: the shortest way to `chat` and to `generate`."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Annotated

import typer

from sfumato.cli import files, flags, loading
from sfumato.cli import options as opt
from sfumato.cli.chat import talk
from sfumato.cli.generate import answer
from sfumato.cli.session import ChatStart
from sfumato.errors import InputError
from sfumato.options import LoadOptions, Options


@flags.takes(
    api=loading.API,
    options=opt.flags_of("max_tokens", "seed", "temperature", "max_steps", "mode", "thinking"),
    load=opt.load_flags_of(),
)
def command(
    place: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Hub id, checkpoint folder, .gguf file, or nano.", autocompletion=loading.known_models
        ),
    ],
    prompt: Annotated[str | None, typer.Argument(help="One message to answer; without it, a conversation.")] = None,
    *,
    api: loading.ApiFlags,
    system: opt.System = None,
    options: Options,
    load: LoadOptions,
    delay: opt.Delay = 0.0,
) -> None:
    """Talk with a model, or answer one prompt; a model that is not here is fetched from the hub first.

    Text that is piped in is the prompt, or stands behind it.

    Example: sfumato run google/diffusiongemma-26B-A4B-it

    Example: sfumato run google/diffusiongemma-26B-A4B-it "Why is the sky blue?"
    """
    if api.model not in (None, place):
        raise InputError(f"MODEL is {place} and --model is {api.model}; give one of them")
    piped = "" if sys.stdin is None or sys.stdin.isatty() else files.read("-")
    text = "\n\n".join(part for part in (prompt, piped.strip()) if part)
    if prompt is not None and not text:
        raise InputError("the prompt is empty; give at least one character")
    llm = loading.connect_or_load(replace(api, model=place), load)
    if text:
        answer(llm, [*opt.system_message(system), {"role": "user", "content": text}], options, delay)
    else:
        talk(llm, options, ChatStart(system=system, delay=delay))
