"""The user's own defaults: the file config.toml and the variable SFUMATO_MODEL; a flag is stronger than either.

A flag counts before SFUMATO_MODEL, that before the file, and that before the built-in default. This is the only place
that reads them, and only commands do, when they run: the library and the server's API know nothing of them, and a
broken file stops no `--help`. SFUMATO_MODEL is the one environment variable that changes behaviour.

    model = "google/diffusiongemma-26B-A4B-it"   # or: api = "http://localhost:8000", api_key_file = "key.txt"

    [load]                                       # what a command's load flags are, with _ for -
    device = "cuda"
    memory_limit = 24                            # GB

    [options]                                    # options of sampling
    max_tokens = 512
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.errors import InputError
from sfumato.options import LOAD_OPTIONS, OPTIONS, LoadOptions, Option, Options
from sfumato.presets import SAMPLING
from sfumato.quant.recipes import named
from sfumato.remote.host import split_url

VARIABLE = "SFUMATO_MODEL"
"""The environment variable that names the model of commands that are given none."""

PLACES = ("model", "api", "api_key_file")
"""The keys outside a section: which model."""
LOADING = tuple(name for name in LOAD_OPTIONS if name not in ("model", "adapters", "calibration"))
"""The keys of [load]: an adapter and a calibration belong to one model."""
GIGABYTE = 1e9


class SettingsError(InputError):
    """The file is wrong; its keys are called what they are called there."""


@dataclass(frozen=True)
class UserSettings:
    """What file and environment say; what they leave open is not in it."""

    path: Path
    """Where the file is, or would be."""
    values: dict[str, str] = field(default_factory=dict)
    """Of `PLACES`."""
    load: dict[str, Any] = field(default_factory=dict)
    """Of `LoadOptions`, memory_limit in bytes."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of `Options`."""
    variable: str | None = None
    """What the environment variable names."""

    @property
    def model(self) -> str | None:
        """The model of commands that are given none."""
        return self.variable or self.values.get("model")

    @property
    def api(self) -> str | None:
        """The server of commands that are given neither a model nor a server."""
        return None if self.variable else self.values.get("api")


def config_path() -> Path:
    """Where the file belongs: by XDG_CONFIG_HOME, else by the platform's rule."""
    if base := os.environ.get("XDG_CONFIG_HOME"):
        return Path(base) / "sfumato" / "config.toml"
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming") / "sfumato" / "config.toml"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "sfumato" / "config.toml"
    return Path.home() / ".config" / "sfumato" / "config.toml"


def read_settings() -> UserSettings:
    """The settings as they are now; SettingsError names the file, and the key that is wrong."""
    path, variable = config_path(), os.environ.get(VARIABLE) or None
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return UserSettings(path, variable=variable)
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}; mend it, or move it away") from None
    except ValueError as error:  # no UTF-8, or no TOML
        raise SettingsError(f"{path} is not TOML: {error}; mend it, or move it away") from None
    load, options = _section(path, table, "load"), _section(path, table, "options")
    for key, value in table.items():
        _check_known(path, key, PLACES, "", more=" and the sections [load] and [options]")
        if not isinstance(value, str) or not value:
            raise SettingsError(f"{path}: {key} is {value!r}; give a text")
    for key in load:
        _check_known(path, key, LOADING, "load.")
    for key in options:
        _check_known(path, key, SAMPLING, "options.")
    if "memory_limit" in load:
        load["memory_limit"] = _gigabytes(path, load["memory_limit"])
    _check(path, "load.", load, LOAD_OPTIONS, lambda values: LoadOptions(**values))
    _check(path, "options.", options, OPTIONS, Options.from_dict)
    try:
        if "api" in table:
            split_url(table["api"])
        if "quantize" in load:
            named(load["quantize"])
    except InputError as error:
        raise SettingsError(f"{path}: {error}") from None
    if "api_key_file" in table:  # beside the file, wherever the command runs
        table["api_key_file"] = str(path.parent / os.path.expanduser(table["api_key_file"]))
    return UserSettings(path, table, load, options, variable)


def _section(path: Path, table: dict[str, Any], name: str) -> dict[str, Any]:
    section = table.pop(name, {})
    if not isinstance(section, dict):
        raise SettingsError(f"{path}: {name} is {section!r}; it is a section, [{name}] with keys below it")
    return section


def _check_known(path: Path, key: str, names: tuple[str, ...], section: str, more: str = "") -> None:
    if key not in names:
        raise SettingsError(f"{path}: there is no key {section}{key}; the keys are {', '.join(names)}{more}")


def _gigabytes(path: Path, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise SettingsError(f"{path}: load.memory_limit is {value!r}; give GB of weights, for example 12")
    return round(value * GIGABYTE)


def _check(
    path: Path,
    section: str,
    values: dict[str, Any],
    declared: dict[str, Option],
    make: Callable[[dict[str, Any]], object],
) -> None:
    """SettingsError, which names file and key, for values that the record of these options refuses."""
    for name, value in values.items():
        if declared[name].kind is str and not isinstance(value, str):
            raise SettingsError(f"{path}: {section}{name} is {value!r}; give a text")
    try:
        make(values)
    except InputError as error:
        raise SettingsError(f"{path}: {section}{error}", option=error.option) from None
