"""The flags of `Options` and `LoadOptions`, read from their declarations, and options as NAME=VALUE.

A few options have a flag of their own in some commands, which the command names (`flags_of`); every option can be set
with --set NAME=VALUE. A new field of either record needs no change here. What no flag says, a preset says (--preset),
then the user's settings (`settings`), and what they leave open is the declared default.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.cli import files
from sfumato.cli.flags import Group, flag, group_of
from sfumato.cli.settings import GIGABYTE, read_settings
from sfumato.errors import InputError
from sfumato.options import CONSTRAINTS, LOAD_OPTIONS, OPTIONS, LoadOptions, Option, Options
from sfumato.presets import SAMPLING, Preset, with_preset
from sfumato.quant.recipes import RECIPES

Delay = Annotated[float, typer.Option(min=0, max=3600, help="Seconds each step stays on the screen.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there already.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")]


@dataclass(frozen=True)
class OutputFlags:
    """Where a text goes, if not to standard output, and as what."""

    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Write the text to this file, not the screen.")
    ] = None
    force: Force = False
    as_json: Json = False

    def file(self) -> files.NewFile | None:
        """The file, if one is named; InputError where it is there already and is not to be replaced."""
        return files.new_path(self.output, self.force)


HELP = 120
"""Characters of a sentence from which on only its first part is shown as help."""
_NAMES = {"choices": ("--choice",), "model": ("--model", "-m"), "adapters": ("--adapter",)}
"""The flags that are not just the option's name."""
_METAVARS: dict[type, str] = {dict: "FILE|JSON", tuple: "TEXT", Mapping: "NAME=DIR"}
_ADAPTER = (
    "An adapter beside the weights. Commands answer with the first, unless -s adapter=NAME; clients of a server give "
    "its name as their model. Repeatable."
)
_IN_GIGABYTES = ("memory_limit",)
"""Declared in bytes, and in GB on the command line."""
_VALUES = {
    "device": ("auto", "cpu", "cuda", "mps"),
    "dtype": ("auto", "bfloat16", "float16", "float32"),
    "ops": ("auto", "reference", "fused", "cpu", "triton"),
    "quantize": tuple(RECIPES),
}
"""What the shell offers for an option whose values are not declared as choices."""
_SAMPLING_PANEL, _LOADING_PANEL = "How to generate", "How to load the model"
"""The panels of --help."""
_SET = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="NAME=VALUE",
        help="Any other option of generating, e.g. -s entropy_bound=0.2 -s stop=END.",
        rich_help_panel=_SAMPLING_PANEL,
        autocompletion=lambda incomplete: [f"{name}=" for name in OPTIONS if name.startswith(incomplete)],
    ),
]
PRESET = flag(
    "preset",
    Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="FILE",
            help="Options of a file that `sfumato eval --sweep` wrote; flags are stronger.",
            rich_help_panel=_SAMPLING_PANEL,
        ),
    ],
    None,
)
"""The flag of both groups below: a preset says how to generate, and may say how to load."""

PRESET_OPTIONS = Group((PRESET,), lambda preset: {} if preset is None else Preset.read(preset).options)
"""What a preset says of how to generate, for a command that generates later."""

# ---- flags ----------------------------------------------------------------------------------------------------------


def flag_of(option: Option, flagged: Collection[str] = ()) -> inspect.Parameter:
    """The flag of one option, by its declared name, type, default and sentence; None stands for one that is not given.

    The sentence calls other options that have flags (`flagged`) by these."""
    kind: Any = option.kind if option.kind in (bool, int, float) else str
    sentence = option.about.sentence
    help_ = in_flags(sentence if len(sentence) <= HELP else option.brief, flagged).replace("None:", "default:")
    if option.kind is tuple:
        kind, help_ = list[str], f"{help_} Repeatable."
    elif option.kind is Mapping:
        kind, help_ = list[str], _ADAPTER
    elif option.name in _IN_GIGABYTES:
        kind, help_ = float, "GB" + help_.removeprefix("Bytes")
    known = [*(option.choices or _VALUES.get(option.name, ()))]
    declaration = typer.Option(
        *(() if kind is bool else names_of_flag(option.name)),
        metavar="|".join(option.choices) or _METAVARS.get(option.kind),
        help=help_,
        show_default=False,  # None, which says nothing: the sentence does
        rich_help_panel=_LOADING_PANEL if option.name in LOAD_OPTIONS else _SAMPLING_PANEL,
        autocompletion=(lambda incomplete: [one for one in known if one.startswith(incomplete)]) if known else None,
    )
    return flag(option.name, Annotated[kind | None, declaration], None)


def names_of_flag(name: str) -> tuple[str, ...]:
    """What the flag of an option is called."""
    return _NAMES.get(name, (f"--{name.replace('_', '-')}",))


def in_flags(text: str, flagged: Collection[str]) -> str:
    """A sentence about options, in which those of these names that are no plain words are the flags that they are."""
    names = [re.escape(name) for name in flagged if "_" in name]
    pattern = rf"(?<![\w'\"/.-])(?:{'|'.join(names)})(?![\w'\"=])"
    return re.sub(pattern, lambda match: f"--{match[0].replace('_', '-')}", text) if names else text


def _named_in(set_: list[str] | None) -> frozenset[str]:
    return frozenset(pair.partition("=")[0].replace("-", "_") for pair in set_ or ())


def flags_of(
    *names: str, is_template: bool = False, usual: Collection[str] = SAMPLING, preset_of: Collection[str] = SAMPLING
) -> Group:
    """The flags that make `Options`: one for each of these options, and --set for every other.

    `usual` are the options that the user's settings may fill in, and `preset_of` those that a preset may. In a template
    each slot has a constraint of its own, so options that constrain the whole answer are refused; of a preset it takes
    what it has. What a preset says yields where it contradicts a flag, as on a server."""
    parameters = (*(flag_of(OPTIONS[name], names) for name in names), flag("set_", _SET, None), PRESET)

    def make(set_: list[str] | None, preset: str | None = None, **values: Any) -> Options:
        allowed = {name for name in OPTIONS if not is_template or "templates" in OPTIONS[name].about.uses}
        base = {name: value for name, value in read_settings().options.items() if name in allowed & {*usual}}
        flags = {name: value for name, value in values.items() if value not in (None, [])}
        own = {} if preset is None else Preset.read(preset).options
        named = {*flags, *_named_in(set_)}
        rest = {name: value for name, value in own.items() if name in (allowed & {*preset_of}) - named}
        weaker = {name: value for name, value in base.items() if name not in rest}
        options = with_preset(build(set_, **weaker | flags), rest)
        if is_template and options.constraint is not None:
            name, _ = options.constraint
            raise InputError(f"{name} is an option of generate; in a template a slot has its own (fill)", option=name)
        return options

    return Group(parameters, make)


@dataclass(frozen=True)
class NamedOptions:
    """Options, and which of them --set named: a command may have to know who said one."""

    options: Options
    names: Collection[str]


def with_names(group: Group) -> Group:
    """The flags of `flags_of`, which make `NamedOptions`."""

    def make(set_: list[str] | None, **values: Any) -> NamedOptions:
        options = group.make(set_=set_, **values)
        assert isinstance(options, Options)
        return NamedOptions(options, _named_in(set_))

    return Group(group.parameters, make)


def load_flags_of(*, without: Sequence[str] = (), has_decisions: bool = False) -> Group:
    """The flags that make `LoadOptions`, but the model, which `loading` asks for; of bench also some others less.

    Only a command that decides has what decisions alone need."""
    without = ("model", *without) if has_decisions else ("model", "calibration", *without)
    names = [name for name in LOAD_OPTIONS if name not in without]

    def make(preset: str | None = None, **values: Any) -> LoadOptions:
        for name in values.keys() & _IN_GIGABYTES:
            values[name] = in_bytes(values[name], name)
        if values.get("adapters") is not None:
            values["adapters"] = adapter_folders(values["adapters"])
        base = {name: value for name, value in read_settings().load.items() if name in names}
        if preset is not None:
            base |= Preset.read(preset).load
        return LoadOptions(**base | {name: value for name, value in values.items() if value is not None})

    presets = () if "preset" in without else (PRESET,)
    return Group((*(flag_of(LOAD_OPTIONS[name], names) for name in names), *presets), make)


def adapter_folders(pairs: Sequence[str]) -> dict[str, str] | None:
    """Folders of adapters by name, from NAME=DIR, or DIR alone, whose last part is then the name; None: there are none.

    InputError for a name that comes twice."""
    folders: dict[str, str] = {}
    for pair in pairs:
        name, is_pair, folder = pair.partition("=")
        if not is_pair:
            name, folder = Path(pair).expanduser().resolve().name, pair
        if not name or not folder:
            raise InputError(f"--adapter is {pair!r}; give NAME=DIR, for example mine=run/adapter", option="adapter")
        if name in folders:
            raise InputError(f"--adapter names {name!r} twice; give each adapter its own name", option="adapter")
        folders[name] = folder
    return folders or None


def in_bytes(gigabytes: float | None, name: str = "memory_limit") -> int | None:
    """Bytes of the limit called `name`, in GB on the command line; InputError for a number that is no limit."""
    if gigabytes is None:
        return None
    if not 0 < gigabytes < 1e6:
        raise InputError(
            f"--{name.replace('_', '-')} is {gigabytes} GB; give GB of weights, for example 12", option=name
        )
    return round(gigabytes * GIGABYTE)


OUTPUT = group_of(OutputFlags)
"""The flags of commands that write a text."""


def system_message(text: str | None) -> list[dict[str, Any]]:
    """The message that begins a conversation: [] where no text is given."""
    return [{"role": "system", "content": text}] if text else []


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
        name = name if name in OPTIONS else name.replace("-", "_")
        kind = OPTIONS[name].kind if name in OPTIONS else None
        if kind is tuple:
            values[name] = (*(values.get(name) or ()), text)
        elif kind is dict and name not in CONSTRAINTS:
            values[name] = files.parse_json(text, name)
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
    """A JSON Schema from text that begins with a brace, or is true (any JSON); else from the file of that name."""
    if not text.strip():
        raise InputError("schema is empty; give JSON that begins with a brace, or a file's name", option="schema")
    is_json = text.lstrip().startswith("{") or text.strip() == "true"
    name = "--schema" if is_json else text
    schema = files.parse_json(text if is_json else files.read(text), name)
    if not isinstance(schema, (dict, bool)):
        message = f"{name} holds {json.dumps(schema)[:80]}; a schema is an object, true or false"
        raise InputError(message, option="schema")
    return schema
