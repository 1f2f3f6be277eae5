"""The flags of `Options` and `LoadOptions`, read from their declarations, and options as NAME=VALUE.

A few options have a flag of their own in some commands, which the command names (`flags_of`); every option can be set
with --set NAME=VALUE. A new field of either record needs no change here.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from sfumato.cli import files
from sfumato.cli.flags import Group, flag
from sfumato.errors import InputError
from sfumato.options import LOAD_OPTIONS, OPTIONS, LoadOptions, Option, Options

Delay = Annotated[float, typer.Option(min=0, help="Seconds each step stays on the screen.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there already.")]

HELP = 120
"""Characters of a sentence from which on only its first part is shown as help."""
_NAMES = {"choices": ("--choice",), "model": ("--model", "-m")}
"""The flags that are not just the option's name."""
_METAVARS: dict[type, str] = {dict: "FILE|JSON", tuple: "TEXT"}
_IN_GIGABYTES = ("memory_limit",)
"""Declared in bytes, and in GB on the command line."""
_SET = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Any other option as NAME=VALUE, e.g. -s max_steps=16 -s stop=END."),
]

# ---- flags ----------------------------------------------------------------------------------------------------------


def flag_of(option: Option) -> inspect.Parameter:
    """The flag of one option, by its declared name, type, default and sentence."""
    kind: Any = option.kind if option.kind in (bool, int, float) else str
    default, sentence = option.default, option.about.sentence
    help_ = (sentence if len(sentence) <= HELP else option.brief).replace("None:", "default:")
    if option.kind is tuple:
        kind, default, help_ = list[str], None, f"{help_} Repeatable."
    elif option.name in _IN_GIGABYTES:
        kind, help_ = float, "GB" + help_.removeprefix("Bytes")
    names = _NAMES.get(option.name, () if kind is bool else (f"--{option.name.replace('_', '-')}",))
    metavar = "|".join(option.choices) or _METAVARS.get(option.kind)
    annotation = kind | None if option.is_optional or kind == list[str] else kind
    return flag(option.name, Annotated[annotation, typer.Option(*names, metavar=metavar, help=help_)], default)


def flags_of(*names: str, is_template: bool = False) -> Group:
    """The flags that make `Options`: one for each of these options, and --set for every other.

    In a template each slot has a constraint of its own, so options that constrain the whole answer are refused.
    """
    parameters = (*(flag_of(OPTIONS[name]) for name in names), flag("set_", _SET, None))

    def make(set_: list[str] | None, **values: Any) -> Options:
        options = build(set_, **values)
        if is_template and options.constraint is not None:
            name, _ = options.constraint
            raise InputError(f"{name} is an option of generate; in a template a slot has its own (fill)", option=name)
        return options

    return Group(parameters, make)


def load_flags_of(*, without: Sequence[str] = ()) -> Group:
    """The flags that make `LoadOptions`; a command that asks for an option in another way leaves its flag out."""
    parameters = tuple(flag_of(option) for name, option in LOAD_OPTIONS.items() if name not in without)

    def make(**values: Any) -> LoadOptions:
        for name in values.keys() & _IN_GIGABYTES:
            values[name] = in_bytes(values[name], name)
        return LoadOptions(**values)

    return Group(parameters, make)


def in_bytes(gigabytes: float | None, name: str = "memory_limit") -> int | None:
    """Bytes of the limit called `name`, in GB on the command line; InputError for a number that is no limit."""
    if gigabytes is None:
        return None
    if not 0 < gigabytes < 1e6:
        raise InputError(f"{name.replace('_', '-')} is {gigabytes} GB; give GB of weights, for example 12", option=name)
    return round(gigabytes * 1e9)


# ---- NAME=VALUE -----------------------------------------------------------------------------------------------------


def build(pairs: Sequence[str] | None, **values: Any) -> Options:
    """Options from named values (None: left open) and NAME=VALUE pairs; InputError names what is wrong."""
    return Options.from_dict(
        _set({name: value for name, value in values.items() if value not in (None, [])}, pairs or ())
    )


def changed(options: Options, pair: str) -> Options:
    """The same options but one, as NAME=VALUE says; InputError names what is wrong."""
    return Options.from_dict(_set({name: getattr(options, name) for name in OPTIONS}, (pair,)))


def _set(values: Mapping[str, Any], pairs: Sequence[str]) -> dict[str, Any]:
    """The values with NAME=VALUE pairs, read as the declared type of each option says. Texts of a list add up."""
    values = dict(values)
    for pair in pairs:
        name, is_pair, text = pair.partition("=")
        kind = OPTIONS[name].kind if name in OPTIONS else None
        if kind is tuple:
            values[name] = (*(values.get(name) or ()), text)
        elif kind in (str, dict):
            values[name] = text
        else:
            values[name] = read_value(text) if is_pair else True
    if isinstance(values.get("schema"), str):
        values["schema"] = read_schema(values["schema"])
    return values


def read_value(text: str) -> bool | int | float | str:
    """A number, true or false, where the text is one; else the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def read_schema(text: str) -> dict[str, Any] | bool:
    """A JSON Schema from text that begins with a brace, else from the file of that name."""
    if not text.strip():
        raise InputError("schema is empty; give JSON that begins with a brace, or a file's name", option="schema")
    is_json = text.lstrip().startswith("{")
    name = "--schema" if is_json else text
    schema = files.parse_json(text if is_json else files.read(text), name)
    if not isinstance(schema, (dict, bool)):
        message = f"{name} holds {json.dumps(schema)[:80]}; a schema is an object, true or false"
        raise InputError(message, option="schema")
    return schema
