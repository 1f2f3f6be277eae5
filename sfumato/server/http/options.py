"""The fields of requests that set `Options`, and the list of GET /v1/options.

Both follow from the declaration of each option in `sfumato.options`: a body says which uses its options have, and a new
option needs no change here. Where a request says something else than `Options` does, a table below says so.
"""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from sfumato.errors import InputError
from sfumato.options import BIG, OPTIONS, Option, Options, Use
from sfumato.presets import with_preset
from sfumato.server.backend import ModelCard
from sfumato.server.http.bodies import Body, Choices, Most, only
from sfumato.server.http.checks import check_length

SET_BY_OTHERS = ("must_call", "adapter")
"""Options that no field of their own name sets: `tool_choice` sets the first, `model` the other."""

NARROWER = {"temperature": (0.0, 2.0)}
"""Ranges of requests that are not those of `Options`: an OpenAI client's temperature ends at 2."""

OTHER_TYPES: dict[str, Any] = {
    "stop": str | Annotated[list[str], Most("max_stops", "strings")],
    "schema": dict[str, Any] | bool,
}
"""Types of requests that do not follow from the kind of an option: one string to stop at, a schema that is true."""

_TYPES: dict[type, Any] = {tuple: Choices, dict: dict[str, Any]}
"""Types of requests by the kind of an option, where they are not the kind itself."""

_NAMES = {int: "integer", float: "number", bool: "boolean", str: "string", tuple: "array", dict: "object"}
"""What a kind is called in JSON."""


class OptionsBody(Body):
    """A request that generates: the options that apply to all of its `uses`, each under its own name.

    An option that is left out, or null, stays as it is. A field that the class declares itself comes before the option
    of the same name; `without` names options that the class has no field for. `neutral`: fields that would change the
    text and are not supported, with the values that ask for nothing."""

    model: str | None = None
    stream: bool | None = None
    user: str | None = None
    is_template: ClassVar[bool] = False
    """Whether its options are those of a template."""

    def __init_subclass__(
        cls,
        uses: Collection[Use] = (),
        without: Collection[str] = (),
        neutral: Mapping[str, tuple[Any, ...]] = MappingProxyType({}),
        **more: Any,
    ) -> None:
        super().__init_subclass__(**more)
        own, fields = inspect.get_annotations(cls), {}
        cls.is_template = "templates" in uses or cls.is_template
        for name, values in neutral.items():
            fields[name] = Any
            setattr(cls, name, only(*values))
        for name, option in OPTIONS.items():
            is_shared = bool(uses) and set(uses) <= set(option.about.uses)
            if is_shared and name not in (*SET_BY_OTHERS, *without, *own):
                is_reserved = hasattr(BaseModel, name)
                field = f"{name}_" if is_reserved else name
                fields[field] = type_of(option) | None
                setattr(cls, field, option_field(name, **{"alias": name} if is_reserved else {}))
        cls.__annotations__ = fields | own  # options first: of several faults theirs is named

    def requested(self) -> dict[str, Any]:
        """The options that it sets, by their names; not those that are null."""
        names = {field: info.alias or field for field, info in type(self).model_fields.items()}
        values = {names[field]: getattr(self, field) for field in self.model_fields_set}
        return {name: value for name, value in values.items() if name in OPTIONS and value is not None}

    def options(self, card: ModelCard, is_template: bool | None = None, **more: Any) -> Options:
        """What the request says of how to generate, its seed drawn if it gives none; `more` goes before it.

        `is_template` None: where the class says that its options are of a template."""
        values = self.requested() | more
        if values.get("drafts") and not self.stream:
            raise InputError("drafts needs stream; set stream to true, or leave drafts out", option="drafts")
        return resolved(values, card, self.is_template if is_template is None else is_template)


def resolved(values: Mapping[str, Any], card: ModelCard, is_template: bool = False) -> Options:
    """Options by their names, those that are None left open, with a seed; checked against the model.

    What is left out is as the server's preset has it, where that applies and does not contradict the request."""
    preset = {
        name: value
        for name, value in card.preset.items()
        if name not in values and (not is_template or "templates" in OPTIONS[name].about.uses)
    }
    values = {name: value for name, value in values.items() if value is not None} | adapter_of(card)
    options = with_preset(Options.from_dict(values), preset)
    if options.seed is None:
        options = replace(options, seed=0 if options.temperature == 0 else secrets.randbits(32))
    for name in ("max_tokens", "min_tokens"):
        check_length(name, getattr(options, name), card)
    if (options.mode or ("diffusion" if card.is_diffusion else "autoregressive")) == "diffusion":
        _check_canvas(options)
    return options


def adapter_of(card: ModelCard) -> dict[str, Any]:
    """The option that follows from what a request has asked for as a model."""
    return {} if card.adapter is None else {"adapter": card.adapter}


def _check_canvas(options: Options) -> None:
    """InputError for an option that a canvas does not have."""
    for name, option in OPTIONS.items():
        uses, value = option.about.uses, getattr(options, name)
        if "autoregressive" in uses and "canvas" not in uses and value != option.default:
            message = f"{name} is {value!r}; it applies to mode 'autoregressive' alone, leave it out"
            raise InputError(message, option=name)


def type_of(option: Option) -> Any:
    """The type of the field that sets an option, null apart."""
    if option.name in OTHER_TYPES:
        return OTHER_TYPES[option.name]
    return Literal[option.choices] if option.choices else _TYPES.get(option.kind, option.kind)


def option_field(name: str, **more: Any) -> Any:
    """The field of a request that sets this option; `more` are further arguments of `Field`."""
    minimum, maximum = range_of(OPTIONS[name])
    bounds: dict[str, Any] = {} if minimum is None else {"ge": minimum, "le": maximum}
    return Field(None, description=OPTIONS[name].about.sentence, **bounds, **more)


def range_of(option: Option) -> tuple[float | None, float | None]:
    """The least and the largest value that a request may give; None where there is none."""
    return NARROWER.get(option.name, (option.about.minimum, option.about.maximum))


def listed(defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every option that a request can set, as GET /v1/options has it; `defaults` are the checkpoint's own values."""
    return [_entry(option, defaults) for name, option in OPTIONS.items() if name not in SET_BY_OTHERS]


def _entry(option: Option, defaults: Mapping[str, Any]) -> dict[str, Any]:
    minimum, maximum = range_of(option)
    default = list(option.default) if isinstance(option.default, tuple) else option.default
    if defaults.get(option.name) is not None:
        default = defaults[option.name]
    return {
        "name": option.name,
        "type": _NAMES[option.kind],
        "default": default,
        "minimum": minimum,
        "maximum": None if maximum == BIG else maximum,
        "choices": list(option.choices) or None,
        "doc": option.about.sentence,
    }
