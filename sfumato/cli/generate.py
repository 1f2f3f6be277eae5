"""`sfumato generate`: continue a text, or answer one message, with the canvas live on the terminal."""

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
from sfumato.cli.view import CanvasView, canvas_frame, canvas_text, summary
from sfumato.events import Commit, Done, Draft, Event, InputError


def command(
    prompt: Annotated[str | None, typer.Argument(help="The text; '-' or nothing reads standard input.")] = None,
    model: opt.Model = "nano",
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
    llm = load(model, device, dtype, ops, quantize, memory_limit)
    request: Any = prompt if raw else [{"role": "user", "content": prompt}]
    is_live = console.is_terminal and not as_json
    has_drafts = is_live and llm.model.config.is_diffusion and options.mode != "autoregressive"
    events = llm.stream(request, replace(options, drafts=has_drafts))
    if as_json:
        done = next(event for event in events if isinstance(event, Done))
        record = {"text": done.text, "tokens": done.tokens, "finish_reason": done.finish_reason, "seed": done.seed}
        record |= {"usage": asdict(done.usage), "tokens_per_pass": done.usage.tokens_per_pass}
        print(json.dumps(record | ({"logprobs": done.logprobs} if done.logprobs else {}), ensure_ascii=False))
    elif is_live:
        show(llm, events, console, delay)
    else:
        for event in events:
            if isinstance(event, Commit):
                print(event.text, end="", flush=True)
        print()


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
            notice=lambda text: console.print(text, style="dim"),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def show(llm, events: Iterable[Event], console: Console, delay: float) -> Done:
    """Draw drafts live, print what is committed, end with a line of figures."""
    view = CanvasView(console, delay)
    ends = llm.model.config.eos_ids
    done = None
    try:
        for event in events:
            if isinstance(event, Draft):
                text = canvas_text(event, lambda token: llm.tokenizer.decode([token]), ends)
                view.show(canvas_frame(event, text, console.height))
            elif isinstance(event, Commit):
                view.close()
                console.print(Text(event.text), end="", soft_wrap=True)
            else:
                done = event
    finally:
        view.close()
    assert done is not None
    console.print()
    ending = "" if done.finish_reason == "stop" else " · cut at the length limit"
    console.print(
        Text(summary(done.usage, done.usage.seconds - view.spent) + f" · seed {done.seed}{ending}", style="dim")
    )
    return done
