"""`sfumato generate`: continue a text, or answer one message, with the canvas live on the terminal."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console

from sfumato.cli import flags, loading
from sfumato.cli import options as opt
from sfumato.cli.output import harmless, usage_record
from sfumato.cli.view import show
from sfumato.errors import InputError
from sfumato.events import Commit, Done
from sfumato.options import LoadOptions, Options
from sfumato.templates.requests import Complete

FLAGS = ("max_tokens", "seed", "mode", "thinking", "schema", "regex", "choices", "early")
"""The options with a flag of their own here."""


@flags.takes(
    api=flags.group_of(loading.ApiFlags),
    options=opt.flags_of(*FLAGS),
    load=opt.load_flags_of(without=("model",)),
)
def command(
    prompt: Annotated[str | None, typer.Argument(help="The text; '-' or nothing reads standard input.")] = None,
    *,
    api: loading.ApiFlags,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    options: Options,
    load: LoadOptions,
    delay: opt.Delay = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Answer one message. On a terminal the canvas denoises before your eyes; piped, only the text comes out.

    Example: sfumato generate "Why is the sky blue?" -m google/diffusiongemma-26B-A4B-it --seed 1

    Example: sfumato generate "Is a whale a fish?" --choice yes --choice no

    Example: sfumato generate "Why is the sky blue?" --api http://localhost:8000
    """
    text = _text_of(prompt)
    console = Console(highlight=False)
    llm = loading.connect_or_load(api, load)
    is_live = console.is_terminal and not as_json
    has_drafts = is_live and llm.has_drafts and options.mode != "autoregressive"
    chosen = replace(options, drafts=has_drafts)
    events = llm.stream(Complete(text, chosen)) if raw else llm.stream(text, options=chosen)
    if as_json:
        done = next(event for event in events if isinstance(event, Done))
        line = json.dumps(_record(done, llm.has_token_ids), ensure_ascii=False)
        print(harmless(line) if console.is_terminal else line)
    elif is_live:
        show(llm, events, console, delay)
    else:
        for event in events:
            if isinstance(event, Commit):
                print(event.text, end="", flush=True)
        print()


def _text_of(prompt: str | None) -> str:
    """The argument, or standard input where there is none; InputError for an empty text."""
    if prompt in (None, "-"):
        if sys.stdin.isatty():
            raise InputError("there is no text; give it as an argument or pipe it in")
        prompt = sys.stdin.read()
    if not prompt:
        raise InputError("the text is empty; give at least one character")
    return prompt


def _record(done: Done, has_token_ids: bool) -> dict[str, Any]:
    """The whole answer, for a program."""
    record: dict[str, Any] = {"text": done.text, "tokens": done.tokens if has_token_ids else None}
    record |= {"finish_reason": done.finish_reason, "seed": done.seed} | usage_record(done.usage)
    return record | ({"logprobs": done.logprobs} if done.logprobs else {})
