"""Command-line options that commands share: one function call turns them into `Options`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.cli import text as texts
from sfumato.errors import InputError
from sfumato.options import Options

Model = Annotated[str, typer.Option("--model", "-m", help="Checkpoint folder, hub id, or nano.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, …; default: the checkpoint's.")]
Ops = Annotated[str, typer.Option(help="auto, reference, fused, cpu or triton operations.")]
Quantize = Annotated[
    str | None,
    typer.Option(help="Pack weights while loading: int8, fp8, int4, int4-fp8, nvfp4 or int4-small (sfumato quantize)."),
]
MemoryLimit = Annotated[
    float | None,
    typer.Option(help="GB of weights on the device; what is above is streamed from the host in each pass."),
]
Delay = Annotated[float, typer.Option(min=0, help="Seconds each step stays on the screen.")]
MaxTokens = Annotated[int | None, typer.Option(help="New tokens at most.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]
Mode = Annotated[
    str | None, typer.Option(help="diffusion or autoregressive; default: diffusion, if the model has a canvas.")
]
Thinking = Annotated[bool, typer.Option(help="Ask the model to think before it answers.")]
Schema = Annotated[
    str | None, typer.Option(metavar="FILE|JSON", help="The answer is JSON that obeys this JSON Schema.")
]
Regex = Annotated[str | None, typer.Option(help="The answer matches this regular expression, as a whole.")]
Choice = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="The answer is one of these; repeatable.")]
Early = Annotated[bool, typer.Option("--early", help="What has settled is committed before the rest of a canvas.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Any other option as NAME=VALUE, e.g. -s max_steps=16 -s stop=END."),
]

Force = Annotated[bool, typer.Option("--force", help="Replace what is there already.")]


def out_path(given: str, name: str) -> Path:
    """Where to write to, as the option or argument `name` says; InputError where it says nothing."""
    if not given.strip():
        raise InputError(f"{name} is empty; give a path to write to")
    return Path(given)


def in_bytes(gigabytes: float | None) -> int | None:
    """A --memory-limit; InputError where it is none."""
    if gigabytes is None:
        return None
    if not 0 < gigabytes < 1e6:
        raise InputError(f"memory-limit is {gigabytes} GB; give GB of weights, for example 12")
    return round(gigabytes * 1e9)


def build(pairs: list[str] | None, **given: Any) -> Options:
    """Options from named values (None: not given) and NAME=VALUE pairs; InputError names what is wrong. A schema is
    text here: JSON, or a file's name."""
    values = {name: value for name, value in given.items() if value is not None}
    for pair in pairs or []:
        name, is_pair, text = pair.partition("=")
        if name in ("stop", "choices"):
            values[name] = (*values.get(name, ()), text)
        elif name in ("schema", "regex", "grammar"):
            values[name] = text
        else:
            values[name] = read(text) if is_pair else True
    if "schema" in values:
        values["schema"] = read_schema(values["schema"])
    return Options.from_dict(values)


def build_free(pairs: list[str] | None, seed: int | None) -> Options:
    """Options for a text with places of its own to write: InputError for what the answer as a whole would obey."""
    options = build(pairs, seed=seed)
    if options.constraint is not None:
        raise InputError(f"{options.constraint[0]} is an option of generate; in a template a slot has its own (fill)")
    return options


def read_schema(given: str) -> dict[str, Any] | bool:
    """A JSON Schema from text that begins with a brace, else from the file of that name."""
    if not given.strip():
        raise InputError("schema is empty; give JSON that begins with a brace, or a file's name")
    is_json = given.lstrip().startswith("{")
    name = "--schema" if is_json else given
    schema = read_json(given if is_json else texts.read(given), name)
    if not isinstance(schema, (dict, bool)):
        raise InputError(f"{name} holds {json.dumps(schema)[:80]}; a schema is an object, true or false")
    return schema


def read_json(text: str, name: str) -> Any:
    """What JSON text says; InputError where it is none, or says a name twice."""

    def named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InputError(f"{name} says {key!r} twice; give each name once")
            found[key] = value
        return found

    try:
        return json.loads(text.removeprefix(texts.BOM), object_pairs_hook=named_once)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not JSON: {error}") from None


def read(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
