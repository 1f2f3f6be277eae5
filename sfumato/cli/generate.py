"""`sfumato generate`: continue a text, or answer one message, with the canvas live on the terminal."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer
from rich.console import Console

from sfumato.cli import files, flags, loading
from sfumato.cli import options as opt
from sfumato.cli.output import harmless, put, readable, speaks_unicode, usage_record
from sfumato.cli.view import hint, show, working
from sfumato.errors import InputError
from sfumato.events import Commit, Done
from sfumato.options import LoadOptions, Options
from sfumato.templates.interface import LanguageModel
from sfumato.templates.requests import Chat, Complete

FLAGS = (
    *("max_tokens", "seed", "temperature", "max_steps", "mode", "thinking"),
    *("schema", "regex", "choices", "early"),
)
"""The options with a flag of their own here."""


@dataclass(frozen=True)
class PromptFlags:
    """What to answer, or to continue."""

    prompt: Annotated[str | None, typer.Argument(help="The text; '-' or nothing reads standard input.")] = None
    context: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE", help="Text files that follow the prompt; '-' is standard input."),
    ] = None
    system: opt.System = None
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False

    def request(self) -> str | list[dict[str, Any]]:
        """A conversation, or with --raw the text; InputError for what does not go together."""
        if self.raw and (self.system is not None or self.context):
            raise InputError("--raw continues one text, so it goes with neither --system nor FILE; leave --raw out")
        text = prompt_of(self.prompt, self.context or [])
        return text if self.raw else [*opt.system_message(self.system), {"role": "user", "content": text}]


@flags.takes(
    source=flags.group_of(PromptFlags),
    api=loading.API,
    options=opt.flags_of(*FLAGS),
    load=opt.load_flags_of(),
    output=opt.OUTPUT,
)
def command(
    *,
    source: PromptFlags,
    api: loading.ApiFlags,
    options: Options,
    load: LoadOptions,
    output: opt.OutputFlags,
    extract: Annotated[
        bool, typer.Option("--extract", "-x", help="Only the first fenced block of the answer, or all if it has none.")
    ] = False,
    delay: opt.Delay = 0.0,
) -> None:
    """Answer one message. On a terminal the canvas denoises before your eyes; piped, only the text comes out.

    Each FILE stands behind the prompt in a fenced block under its name.

    Example: sfumato generate "Why is the sky blue?" -m google/diffusiongemma-26B-A4B-it --seed 1

    Example: sfumato generate "What does this do?" main.py --system "Answer in one sentence." -o answer.md

    Example: sfumato generate "A script that renames photographs by date" -x -o rename.py

    Example: sfumato generate "Is a whale a fish?" --choice yes --choice no

    Example: sfumato generate "Why is the sky blue?" --api http://localhost:8000
    """
    target, request = output.file(), source.request()
    llm = loading.connect_or_load(api, load)
    answer(llm, request, options, delay, as_json=output.as_json, target=target, extract=extract)


def answer(
    llm: LanguageModel,
    request: str | list[dict[str, Any]],
    options: Options,
    delay: float = 0.0,
    *,
    as_json: bool = False,
    target: files.NewFile | None = None,
    extract: bool = False,
) -> None:
    """Print the answer to a request: live on a terminal, as text elsewhere, as a record, or into a file.

    With `extract` its first fenced block alone, as `extracted` has it."""
    console = Console(highlight=False)
    hint(llm, request)
    is_live = console.is_terminal and not as_json and not extract
    has_drafts = is_live and llm.has_drafts and options.mode != "autoregressive"
    chosen = replace(options, drafts=has_drafts)
    events = llm.stream(Complete(request, chosen) if isinstance(request, str) else Chat(request, None, chosen))
    done: Done | None = None
    if is_live:
        done = show(llm, events, console, delay)
    with working("writing") if extract else nullcontext():
        for event in () if is_live else events:
            if isinstance(event, Commit) and target is None and not as_json and not extract:
                print(event.text, end="", flush=True)
            elif isinstance(event, Done):
                done = event
    assert done is not None
    if extract:
        done = replace(done, text=extracted(done.text))
    if target is not None:
        target.write(done.text if done.text.endswith("\n") else done.text + "\n")
    if as_json:
        line = json.dumps(_record(done, llm.has_token_ids), ensure_ascii=not speaks_unicode())
        print(harmless(line) if console.is_terminal else line)
    elif not is_live and target is None:
        put(done.text.removesuffix("\n") + "\n" if extract else "\n")


_BLOCK = re.compile(r"^ {0,3}(`{3,}|~{3,})[^`\n]*\n(.*?)(?:^ {0,3}\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
"""A fenced block of Markdown, up to its closing fence or the end."""


def extracted(text: str) -> str:
    """What stands in the first fenced block of a text; all of the text where it has none."""
    block = _BLOCK.search(text)
    return text if block is None else block[2]


def prompt_of(prompt: str | None, names: Sequence[str]) -> str:
    """The argument, or standard input where there is none, and the files behind it, each fenced under its name.

    InputError for a text that is empty, a file that is no text or too large, and standard input named twice."""
    if [prompt, *names].count("-") + (prompt is None) > 1:
        raise InputError("standard input is named twice; give '-' once, as the prompt or as a FILE")
    if prompt in (None, "-"):
        if sys.stdin.isatty():
            raise InputError("there is no text; give it as an argument or pipe it in")
        prompt = readable(sys.stdin.read())
    if not prompt:
        raise InputError("the text is empty; give at least one character")
    parts = [prompt]
    for name in names:
        text = files.read(name).removeprefix(files.BOM)
        parts.append(fenced(text, "standard input" if name == "-" else name))
        if sum(map(len, parts)) > files.LIMIT:
            raise InputError(f"the files together are larger than {files.LIMIT >> 20} MiB, the limit; give fewer")
    return "\n\n".join(parts)


def fenced(text: str, name: str) -> str:
    """A file's text under its name, between fences that are longer than any run of backticks in it."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{' '.join(name.split())}:\n{fence}\n{text}{'' if text.endswith(chr(10)) else chr(10)}{fence}"


def _record(done: Done, has_token_ids: bool) -> dict[str, Any]:
    """The whole answer, for a program."""
    record: dict[str, Any] = {"text": done.text, "tokens": done.tokens if has_token_ids else None}
    record |= {"finish_reason": done.finish_reason, "seed": done.seed} | usage_record(done.usage)
    return record | ({"logprobs": done.logprobs} if done.logprobs else {})
