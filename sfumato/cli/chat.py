"""`sfumato chat`: a conversation in the terminal; what was said stays encoded from turn to turn."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console

from sfumato.cli import options as opt
from sfumato.cli.generate import Api, ApiKey, ApiKeyFile, Model, connect_or_load, has_drafts, show
from sfumato.cli.text import harmless
from sfumato.cli.view import visible
from sfumato.errors import InputError, SfumatoError
from sfumato.events import Commit, Done
from sfumato.remote import Remote

HELP = "/new begins again · /seed N fixes the seed · /set NAME=VALUE changes an option · /quit ends"


def command(
    model: Model = None,
    api: Api = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: opt.MaxTokens = None,
    seed: opt.Seed = None,
    mode: opt.Mode = None,
    thinking: opt.Thinking = False,
    set_: opt.Set = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    ops: opt.Ops = "auto",
    quantize: opt.Quantize = None,
    memory_limit: opt.MemoryLimit = None,
    delay: opt.Delay = 0.0,
) -> None:
    """Talk to a model; each answer denoises live. Piped, every line of input is a message and every answer is printed.

    Example: sfumato chat -m google/diffusiongemma-26B-A4B-it --system "Answer in one sentence."

    Example: sfumato chat --api https://models.example.com --api-key-file key.txt
    """
    pairs = list(set_ or [])
    given = {"max_tokens": max_tokens, "seed": seed, "mode": mode, "thinking": thinking}
    options = opt.build(pairs, **given)
    console = Console(highlight=False)
    llm = connect_or_load(api, api_key, api_key_file, model, device, dtype, ops, quantize, memory_limit)
    if isinstance(llm, Remote):
        llm.check(options)
    messages: list[dict[str, Any]] = []
    start = [{"role": "system", "content": system}] if system else []
    is_live = console.is_terminal and sys.stdin.isatty()
    if is_live:
        console.print(visible(f"{llm.name} · {HELP}", "dim"))
    while True:
        try:
            line = console.input("[bold]› [/bold]") if is_live else sys.stdin.readline()
        except EOFError:
            break
        if not is_live and not line:
            break
        line = line.strip()
        if not line:
            continue
        if line.startswith("/"):
            name, _, value = line[1:].partition(" ")
            if name in ("quit", "exit"):
                break
            try:
                if name == "new":
                    messages = []
                    llm.forget()
                elif name in ("seed", "set"):
                    pairs.append(value if name == "set" else f"seed={value}")
                    wanted = opt.build(pairs, **given)
                    if isinstance(llm, Remote):
                        llm.check(wanted)
                    options = wanted
                else:
                    raise InputError(f"there is no command /{name}; {HELP}")
            except InputError as error:
                console.print(visible(str(error), "red"))
                pairs = pairs[:-1] if name in ("seed", "set") else pairs
            continue
        messages.append({"role": "user", "content": line})
        try:
            wanted = replace(options, drafts=is_live and has_drafts(llm, options))
            events = llm.stream(start + messages, wanted)
            if is_live:
                done = show(llm, events, console, delay)
            else:
                for event in events:
                    if isinstance(event, Commit):
                        text = harmless(event.text) if console.is_terminal else event.text
                        print(text, end="", flush=True)
                    elif isinstance(event, Done):
                        done = event
                print()
        except SfumatoError as error:
            console.print(visible(str(error), "red"))
            messages.pop()
            continue
        messages.append(_history(done))


def _history(done: Done) -> dict[str, Any]:
    """The message that carries an answer into the next prompt; its thought stays behind."""
    calls = [{"type": "function", "function": call} for call in done.tool_calls]
    return {"role": "assistant", "content": done.text} | ({"tool_calls": calls} if calls else {})
