"""Several flags of the command line that reach a command as one record.

A command is a function annotated for typer. `takes` replaces one of its parameters, say `load`, by a group of flags,
and calls the command with the record that these flags make. What the flags of `Options` and `LoadOptions` are is
declared in `sfumato.options` and read in `cli.options`; a record of a command's own is a dataclass whose fields are
annotated for typer (`group_of`).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any, get_args, get_type_hints

from typer.models import OptionInfo

Command = Callable[..., object]


@dataclass(frozen=True)
class Group:
    """Flags, and the record that they make together."""

    parameters: tuple[inspect.Parameter, ...]
    """One parameter a flag, as `flag` makes it."""
    make: Callable[..., object]
    """Called with the flags' values by name."""


def flag(name: str, annotation: object, default: object = inspect.Parameter.empty) -> inspect.Parameter:
    """A parameter that typer reads: `annotation` is `Annotated[type, typer.Option(…)]`; no default: it is required."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def group_of(record: type, panel: str | None = None) -> Group:
    """The group of a dataclass whose fields are annotated for typer, one flag a field; `panel` of --help shows them."""
    hints, parameters = get_type_hints(record, include_extras=True), []
    for field in dataclasses.fields(record):
        is_required = field.default is dataclasses.MISSING
        default = inspect.Parameter.empty if is_required else field.default
        kind, declaration = get_args(hints[field.name])
        if panel is not None and isinstance(declaration, OptionInfo):
            declaration = copy(declaration)
            declaration.rich_help_panel = panel
        parameters.append(flag(field.name, Annotated[kind, declaration], default))
    return Group(tuple(parameters), record)


def takes(**groups: Group) -> Callable[[Command], Command]:
    """Decorate a command: its parameters of these names are given by the groups' flags, which stand in their places.

    Groups may have a flag in common, which stands in the first one's place."""

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        by_name: dict[str, inspect.Parameter] = {}
        for name, parameter in signature.parameters.items():
            own = groups[name].parameters if name in groups else [flag(name, parameter.annotation, parameter.default)]
            for one in own:
                by_name.setdefault(one.name, one)

        @wraps(command)
        def call(**arguments: Any) -> object:
            records = {
                name: group.make(**{one.name: arguments[one.name] for one in group.parameters})
                for name, group in groups.items()
            }
            of_groups = {one.name for group in groups.values() for one in group.parameters}
            return command(**{name: value for name, value in arguments.items() if name not in of_groups} | records)

        call.__signature__ = signature.replace(parameters=[*by_name.values()])  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in by_name.values()}
        return call

    return decorate
