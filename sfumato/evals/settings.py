"""Settings of a model, as changes to a reference: what a sweep tries, and the axes along which it does.

A setting is the reference with some options changed, of generating or of loading. An axis is an option, or several that
change together, with the values to try. It knows names and values, and nothing of what they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sfumato.errors import InputError
from sfumato.options import FALLBACK_DEFAULTS, LOAD_OPTIONS, OPTIONS, LoadOptions, Options
from sfumato.presets import PRECISION, SAMPLING

CostKind = Literal["steps", "passes", "milliseconds"]
"""What work is measured by: denoising steps, passes of the stack, or time."""
COSTS: tuple[CostKind, ...] = ("steps", "passes", "milliseconds")
Changes = tuple[tuple[str, Any], ...]
"""Options by name with their values, sorted."""
NOT_SWEPT = ("seed", "max_tokens", "min_tokens", "stop", "logprobs", "top_logprobs", "logit_bias", "thinking")
"""Options that no axis may be: they say what is asked for, not how well and how fast it is answered."""
AXES = tuple(name for name in (*SAMPLING, *PRECISION) if name not in NOT_SWEPT)
"""The options that an axis may be."""
MOST_VALUES = 32
"""Values of one axis."""


@dataclass(frozen=True)
class Setting:
    """The reference with these options changed; without any it is the reference itself."""

    changes: Changes = ()

    @classmethod
    def of(cls, changes: Mapping[str, Any]) -> Setting:
        """From options by name."""
        return cls(tuple(sorted(changes.items())))

    @property
    def name(self) -> str:
        """What it is called, wherever it is shown or kept: the same for the same changes."""
        return ", ".join(f"{name}={_text(value)}" for name, value in self.changes) or "reference"

    @property
    def options(self) -> dict[str, Any]:
        """What it changes of generating."""
        return {name: value for name, value in self.changes if name in OPTIONS}

    @property
    def load(self) -> dict[str, Any]:
        """What it changes of loading."""
        return {name: value for name, value in self.changes if name in LOAD_OPTIONS}

    def over(self, options: Options) -> Options:
        """The reference's options, changed. InputError for values that an option cannot have."""
        return options.with_changes(self.options)

    def loaded(self, load: LoadOptions) -> LoadOptions:
        """The reference's options of loading, changed."""
        return replace(load, **self.load)

    def combined(self, other: Setting) -> Setting:
        """Both changes together; the other's where they change the same option."""
        return Setting.of(dict(self.changes) | dict(other.changes))


@dataclass(frozen=True)
class Axis:
    """Options that a sweep changes together, and the values that it tries, each a value of every option."""

    names: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]

    @property
    def label(self) -> str:
        """The axis as --axis takes it."""
        values = ",".join(":".join(map(_text, one)) for one in self.values)
        return f"{'+'.join(self.names)}={values}"

    @property
    def settings(self) -> list[Setting]:
        """The reference changed along this axis alone, a setting for each value."""
        return [Setting.of(dict(zip(self.names, one, strict=True))) for one in self.values]


def axis_of(names: Sequence[str], values: Sequence[Sequence[Any]]) -> Axis:
    """An axis, checked: InputError for a name that no axis can be, no value, too many, or one that is refused."""
    label = "+".join(names)
    for name in names:
        if name not in AXES:
            raise InputError(f"{name} is no axis of a sweep; the axes are {', '.join(AXES)}")
    if len({*names}) < len(names):
        raise InputError(f"the axis {label} names an option twice; give each once")
    if not 1 <= len(values) <= MOST_VALUES:
        raise InputError(f"the axis {label} has {len(values)} values; give from 1 to {MOST_VALUES}")
    checked: dict[tuple[Any, ...], None] = {}
    for one in values:
        if len(one) != len(names):
            raise InputError(f"the axis {label} has a value of {len(one)} parts; give {len(names)}, as in 0.2:0.6")
        setting = Setting.of(dict(zip(names, one, strict=True)))
        options, load = setting.over(Options()), setting.loaded(LoadOptions())
        parts = [getattr(options if name in OPTIONS else load, name) for name in names]
        checked |= {tuple(parts): None}
    return Axis(tuple(names), (*checked,))


def usual_axes(options: Options, defaults: Mapping[str, Any]) -> list[Axis]:
    """The axes that a sweep takes where none is named, around these options on a checkpoint with these defaults.

    They are fewer steps, fewer with a second try from other noise, a larger entropy bound, a sooner stop, a colder
    schedule, and early answers."""
    own = options.with_defaults(defaults).with_defaults(FALLBACK_DEFAULTS)
    steps, bound, confidence = own.max_steps or 0, own.entropy_bound or 0.0, own.confidence or 0.0
    fractions = (2, 3, 4, 6, 8, 12)
    axes: dict[str, list[Any]] = {
        "max_steps": [steps // part for part in fractions if steps // part],
        "entropy_bound": [round(bound * times, 6) for times in (2, 4, 8, 16)] if bound else [0.1, 0.4],
        "confidence": [round(confidence * times, 6) for times in (4, 16, 64)] if confidence else [0.005, 0.08],
        "stability": [0] if own.stability else [],
        "repeats": [4, 6, 7, 8],
        "temperature": [0.75, 0.5],
        "temperature_steps": [steps // part for part in (2, 4, 8) if steps // part],
        "early": [] if own.early else [True],
    }
    each = {name: [(value,) for value in dict.fromkeys(values)] for name, values in axes.items()}
    tries = [(steps // part, steps, redos) for part, redos in ((4, 1), (3, 1), (3, 2), (2, 1)) if steps // part > 1]
    second = [] if own.redos or not tries else [axis_of(("max_steps", "temperature_steps", "redos"), tries)]
    return [*second, *(axis_of((name,), values) for name, values in each.items() if values)]


def singles(axes: Sequence[Axis], reference: Options) -> Iterator[tuple[Axis, Setting]]:
    """The settings with one change each, without those that change nothing or contradict the reference's options."""
    for axis in axes:
        for setting in axis.settings:
            try:
                is_change = bool(setting.load) or setting.over(reference) != reference
            except InputError:
                continue
            if is_change:
                yield axis, setting


def _text(value: Any) -> str:
    """A value as --set takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
