"""`sfumato generate`: continue a text, or answer one message, with the canvas live on the terminal.

The model is loaded here, or runs behind a URL (`--api`); that way torch is never imported."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from sfumato.cli import options as opt
from sfumato.cli import text as texts
from sfumato.cli.view import CanvasView, canvas_frame, canvas_text, summary, visible
from sfumato.errors import InputError
from sfumato.events import Commit, Done, Draft, Event
from sfumato.options import Options
from sfumato.remote import Remote

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Checkpoint folder, hub id, or nano (the default); with --api, a model there."),
]
Api = Annotated[
    str | None, typer.Option("--api", metavar="URL", help="Use the model of this server, not one loaded here.")
]
ApiKey = Annotated[str | None, typer.Option(metavar="KEY", help="Its key; others on this machine can see it.")]
ApiKeyFile = Annotated[str | None, typer.Option(metavar="FILE", help="A file that holds the key.")]


def command(
    prompt: Annotated[str | None, typer.Argument(help="The text; '-' or nothing reads standard input.")] = None,
    model: Model = None,
    api: Api = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    max_tokens: opt.MaxTokens = None,
    seed: opt.Seed = None,
    mode: opt.Mode = None,
    thinking: opt.Thinking = False,
    schema: opt.Schema = None,
    regex: opt.Regex = None,
    choice: opt.Choice = None,
    early: opt.Early = False,
    set_: opt.Set = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    ops: opt.Ops = "auto",
    quantize: opt.Quantize = None,
    memory_limit: opt.MemoryLimit = None,
    delay: opt.Delay = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Answer one message. On a terminal the canvas denoises before your eyes; piped, only the text comes out.

    Example: sfumato generate "Why is the sky blue?" -m google/diffusiongemma-26B-A4B-it --seed 1

    Example: sfumato generate "Is a whale a fish?" --choice yes --choice no

    Example: sfumato generate "Why is the sky blue?" --api http://localhost:8000
    """
    given = {"max_tokens": max_tokens, "seed": seed, "mode": mode, "thinking": thinking, "early": early}
    options = opt.build(set_, **given, schema=schema, regex=regex, choices=choice or None)
    if prompt in (None, "-"):
        if sys.stdin.isatty():
            raise InputError("there is no text; give it as an argument or pipe it in")
        prompt = sys.stdin.read()
    assert prompt is not None
    if not prompt:
        raise InputError("the text is empty; give at least one character")
    console = Console(highlight=False)
    llm = connect_or_load(api, api_key, api_key_file, model, device, dtype, ops, quantize, memory_limit)
    request: Any = prompt if raw else [{"role": "user", "content": prompt}]
    is_live = console.is_terminal and not as_json
    events = llm.stream(request, replace(options, drafts=is_live and has_drafts(llm, options)))
    if as_json:
        done = next(event for event in events if isinstance(event, Done))
        tokens = None if isinstance(llm, Remote) else done.tokens  # a host sends no ids
        record: dict[str, Any] = {"text": done.text, "tokens": tokens}
        record |= {"finish_reason": done.finish_reason, "seed": done.seed}
        record |= {"usage": asdict(done.usage), "tokens_per_pass": done.usage.tokens_per_pass}
        line = json.dumps(record | ({"logprobs": done.logprobs} if done.logprobs else {}), ensure_ascii=False)
        print(texts.harmless(line) if console.is_terminal else line)
    elif is_live:
        show(llm, events, console, delay)
    else:
        for event in events:
            if isinstance(event, Commit):
                print(event.text, end="", flush=True)
        print()


def connect_or_load(
    api: str | None,
    api_key: str | None,
    api_key_file: str | None,
    model: str | None,
    device: str,
    dtype: str | None,
    ops: str,
    quantize: str | None,
    memory_limit: float | None,
) -> Any:
    """The `Remote` behind a URL, or a loaded `LLM`; InputError for what means nothing with the one or the other."""
    if api is None:
        if api_key is not None or api_key_file is not None:
            raise InputError("an API key is given without --api; give the server's URL too")
        return load("nano" if model is None else model, device, dtype, ops, quantize, memory_limit)
    here = {"device": device != "auto", "dtype": dtype, "ops": ops != "auto", "quantize": quantize}
    here["memory-limit"] = memory_limit is not None
    if name := next((name for name, is_given in here.items() if is_given), None):
        raise InputError(f"--{name} is for a model loaded here; leave it out with --api")
    if api_key_file is not None:
        if api_key is not None:
            raise InputError("--api-key and --api-key-file are given together; give one of them")
        api_key = texts.read(api_key_file).strip()
    remote = Remote(api, api_key, model)
    if remote.is_key_exposed:
        print(f"sfumato: the API key goes to {api} unencrypted; use https if the server has it", file=sys.stderr)
    return remote


def has_drafts(llm: Any, options: Options) -> bool:
    """Whether these answers come with drafts."""
    is_diffusion = llm.has_drafts if isinstance(llm, Remote) else llm.model.config.is_diffusion
    return is_diffusion and options.mode != "autoregressive"


def load(model: str, device: str, dtype: str | None, ops: str, quantize: str | None, memory_limit: float | None = None):
    """Load a model; what is left aside, and long loading, is told on stderr."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from sfumato.llm import LLM

    console = Console(stderr=True, highlight=False)
    columns = ("loading", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)
        return LLM.load(
            model,
            device=device,
            dtype=dtype,
            ops=ops,
            quantize=quantize,
            memory_limit=opt.in_bytes(memory_limit),
            notice=lambda text: console.print(visible(text, "dim")),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def show(llm: Any, events: Iterable[Event], console: Console, delay: float) -> Done:
    """Draw drafts live, print what is committed, end with a line of figures."""
    view = CanvasView(console, delay)
    is_remote = isinstance(llm, Remote)
    done = None
    try:
        for event in events:
            if isinstance(event, Draft):
                view.show(canvas_frame(event, canvas_text(event), console.height))
            elif isinstance(event, Commit):
                view.close()
                console.print(visible(event.thought, "dim italic"), end="", soft_wrap=True)
                console.print(visible(event.text), end="", soft_wrap=True)
            else:
                done = event
    finally:
        view.close()
    assert done is not None
    console.print()
    seconds = done.usage.seconds if is_remote else done.usage.seconds - view.spent
    ending = "" if done.finish_reason == "stop" else " · cut at the length limit"
    seed = f" · seed {done.seed}" if done.usage.passes else ""  # a host that counts no passes names no seed
    console.print(Text(summary(done.usage, seconds) + seed + ending, style="dim"))
    return done
