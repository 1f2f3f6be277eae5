"""Command-line options that `generate` and `chat` share: one function call turns them into `Options`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sfumato.events import Options

Model = Annotated[str, typer.Option("--model", "-m", help="Checkpoint folder, hub id, or nano.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, …; default: the checkpoint's.")]
Ops = Annotated[str, typer.Option(help="auto, reference, fused, cpu or triton operations.")]
Quantize = Annotated[str | None, typer.Option(help="int8 weights (cpu, triton); fp8 or int4 (triton).")]
Delay = Annotated[float, typer.Option(min=0, help="Seconds each step stays on the screen.")]
MaxTokens = Annotated[int | None, typer.Option(help="New tokens at most.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]
Mode = Annotated[str, typer.Option(help="diffusion or autoregressive.")]
Thinking = Annotated[bool, typer.Option(help="Ask the model to think before it answers.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Any other option as NAME=VALUE, e.g. -s max_steps=16 -s stop=END."),
]


def build(pairs: list[str] | None, **given: Any) -> Options:
    """Options from named values (None: not given) and NAME=VALUE pairs; InputError names what is wrong."""
    values = {name: value for name, value in given.items() if value is not None}
    for pair in pairs or []:
        name, is_pair, text = pair.partition("=")
        value = read(text) if is_pair else True
        if name == "stop":
            values["stop"] = (*values.get("stop", ()), text)
        else:
            values[name] = value
    return Options.from_dict(values)


def read(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
