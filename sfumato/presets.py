"""A preset: options of generating, and perhaps of loading, in a small JSON file beside what speaks for them.

    {"options": {"max_steps": 8}, "load": {"quantize": "int8"}, "evidence": {"model": "nano", …}}

`sfumato eval --sweep` writes one (`evals.settings`); commands take it with --preset, `sfumato serve` as the defaults of
all requests. What a caller says is stronger than the preset, and the preset stronger than the checkpoint's defaults.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.errors import InputError, SfumatoError
from sfumato.options import CONSTRAINTS, LOAD_OPTIONS, OPTIONS, LoadOptions, Option, Options
from sfumato.system.files import replacing

SAMPLING = tuple(name for name in OPTIONS if name not in (*CONSTRAINTS, "drafts", "strict", "must_call", "adapter"))
"""The options that a file may set for all requests: a constraint belongs to one request, and drafts to one screen."""
PRECISION = ("dtype", "ops", "quantize")
"""The options of loading that a preset may set: the others belong to a machine, or to one model."""
LIMIT = 1 << 20
"""The largest file that is read, in bytes."""
_SECTIONS = ("options", "load", "evidence")


class PresetError(InputError):
    """The file is wrong; the sentence names it, and its keys as they are called there."""


@dataclass(frozen=True)
class Preset:
    """Options by their names, as `llm.chat(…, options=preset.options)` takes them, and what speaks for them."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Of how to generate, checked as `Options` does; not what belongs to one request: constraints, drafts, adapter."""
    load: Mapping[str, Any] = field(default_factory=dict)
    """Of how to load: dtype, ops, quantize."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from: model, tasks, items, figures, date, versions. For people; nothing reads it."""

    @classmethod
    def read(cls, path: str | Path) -> Preset:
        """The preset in a file. PresetError, one sentence, for what is none."""
        return cls.of(_json_of(path), str(path))

    @classmethod
    def of(cls, raw: Any, source: str) -> Preset:
        """What such a file says; messages call it `source`. PresetError for what is wrong."""
        if not isinstance(raw, dict) or "options" not in raw:
            raise PresetError(f'{source} is no preset; write {{"options": {{…}}}}, as `sfumato eval --sweep` does')
        for name in raw:
            if name not in _SECTIONS:
                raise PresetError(f"{source}: there is no key {_repr(name)}; the keys are {', '.join(_SECTIONS)}")
            if not isinstance(raw[name], dict):
                raise PresetError(f"{source}: {name} is {_repr(raw[name])}; give a record")
        options, load = raw["options"], raw.get("load", {})
        _check_names(source, "options", options, SAMPLING)
        _check_names(source, "load", load, PRECISION)
        checked = _checked(source, "options", options, OPTIONS, Options.from_dict)
        loading = _checked(source, "load", load, LOAD_OPTIONS, lambda values: LoadOptions(**values))
        return cls(checked, loading, raw.get("evidence", {}))

    def to_dict(self) -> dict[str, Any]:
        """What the file says."""
        values = {name: dict(getattr(self, name)) for name in _SECTIONS}
        return {name: value for name, value in values.items() if value or name == "options"}

    @property
    def text(self) -> str:
        """The file's text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def write(self, path: Path) -> None:
        """Write the file, beside first and then renamed. SfumatoError where the disk says no."""
        try:
            with replacing(path) as file:
                file.write(self.text.encode())
        except OSError as error:
            raise SfumatoError(f"cannot write {path}: {error.strerror or error}") from error


def _json_of(path: str | Path) -> Any:
    """What a file holds. PresetError where it cannot be read, is too large, is no JSON, or names a key twice."""

    def record_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(record := dict(pairs)) < len(pairs):
            twice = next(name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number]))
            raise PresetError(f"{path} says {_repr(twice)} twice; give each name once")
        return record

    try:
        if not os.path.isfile(path) and os.path.exists(path):
            raise PresetError(f"{path} is not a file; give a preset that `sfumato eval --sweep` wrote")
        with open(path, "rb") as file:
            content = file.read(LIMIT + 1)
        if len(content) > LIMIT:
            raise PresetError(f"{path} is larger than {LIMIT >> 20} MiB, the limit of a preset")
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=record_of)
    except OSError as error:
        raise PresetError(f"cannot read {path}: {error.strerror or error}; give the file of a preset") from None
    except RecursionError:
        raise PresetError(f"{path} is nested too deeply; a preset is a record of records") from None
    except PresetError:
        raise
    except ValueError as error:  # no UTF-8, no JSON, a name with a NUL
        raise PresetError(f"{path} is not JSON: {error}; give the file of a preset") from None


def _check_names(source: str, section: str, values: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in values:
        if name not in names:
            raise PresetError(f"{source}: there is no key {section}.{_short(name)}; the keys are {', '.join(names)}")


def _checked(
    source: str,
    section: str,
    values: dict[str, Any],
    declared: Mapping[str, Option],
    make: Callable[[dict[str, Any]], object],
) -> dict[str, Any]:
    """The values as the record of these options keeps them. PresetError for those that it refuses."""
    for name, value in values.items():
        if declared[name].kind is str and not isinstance(value, str | None):
            raise PresetError(f"{source}: {section}.{name} is {_repr(value)}; give a text")
    try:
        record = make(values)
    except InputError as error:
        raise PresetError(f"{source}: {section}.{error}", option=error.option) from None
    return {name: getattr(record, name) for name in values}


def _repr(value: Any) -> str:
    return reprlib.repr(value)


def _short(name: str) -> str:
    """A key that a message can show."""
    return name if len(name) <= 40 and name.isprintable() else _repr(name)


def with_preset(options: Options, preset: Mapping[str, Any]) -> Options:
    """The options with the preset's; where it contradicts them, with as much of it as does not, whatever its order."""
    try:
        return options.with_changes(preset)
    except InputError:
        rest = dict(preset)
    while True:
        before = len(rest)
        for name in [*rest]:
            with suppress(InputError):
                options = options.with_changes({name: rest[name]})
                del rest[name]
        if len(rest) == before:
            return options
