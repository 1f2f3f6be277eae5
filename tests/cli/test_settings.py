"""cli/settings.py, cli/config.py: the user's file, SFUMATO_MODEL, and which of flag, variable and file is stronger."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sfumato import cli
from sfumato.cli import loading, settings
from sfumato.cli.options import flags_of, load_flags_of
from sfumato.errors import InputError
from sfumato.options import LoadOptions, Options

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes the file where it is looked for; returns its path."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = tmp_path / "sfumato" / "config.toml"
    path.parent.mkdir()

    def put(text: str) -> Path:
        path.write_text(text)
        return path

    return put


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `connect_or_load` does with its choice: nothing but note it."""
    calls: list[tuple[Any, ...]] = []

    class Host:
        is_key_exposed = False

        def __init__(self, *arguments: Any) -> None:
            calls.append(arguments)

    monkeypatch.setattr(loading, "Remote", Host)
    monkeypatch.setattr(loading, "load_model", lambda load: calls.append((load,)))
    return calls


def load_options(**flags: Any) -> LoadOptions:
    group = load_flags_of()
    options = group.make(**dict.fromkeys(parameter.name for parameter in group.parameters) | flags)
    assert isinstance(options, LoadOptions)
    return options


def test_without_a_file_nothing_is_set(write: Write) -> None:
    user = settings.read_settings()
    assert (user.values, user.load, user.options, user.model, user.api) == ({}, {}, {}, None, None)
    assert load_options() == LoadOptions()


def test_the_file_is_weaker_than_a_flag(write: Write) -> None:
    write('[load]\ndevice = "cuda"\ndtype = "bf16"\nmemory_limit = 1.5\n[options]\nmax_tokens = 7\nstop = ["END"]\n')
    assert load_options() == LoadOptions(device="cuda", dtype="bfloat16", memory_limit=1_500_000_000)
    assert load_options(device="auto", memory_limit=2) == LoadOptions(dtype="bfloat16", memory_limit=2_000_000_000)
    group = flags_of("max_tokens")
    assert group.make(set_=None, max_tokens=None) == Options(max_tokens=7, stop=("END",))
    assert group.make(set_=None, max_tokens=3) == Options(max_tokens=3, stop=("END",))
    assert group.make(set_=["max-tokens=4"], max_tokens=None) == Options(max_tokens=4, stop=("END",))


def test_a_template_takes_what_it_has(write: Write) -> None:
    write("[options]\nmax_tokens = 7\nmax_steps = 3\nseed = 4\n")
    assert flags_of("seed", is_template=True).make(set_=None, seed=None) == Options(max_steps=3, seed=4)
    assert flags_of("seed", is_template=True, usual=("seed",)).make(set_=None, seed=None) == Options(seed=4)


@pytest.mark.parametrize(
    ("file", "variable", "flags", "choice"),
    [
        ("", None, {}, (LoadOptions(),)),
        ('model = "a/b"', None, {}, (LoadOptions("a/b"),)),
        ('model = "a/b"', "c/d", {}, (LoadOptions("c/d"),)),
        ('model = "a/b"', "c/d", {"model": "e/f"}, (LoadOptions("e/f"),)),
        ('api = "http://h"', None, {}, ("http://h", None, None)),
        ('api = "http://h"\nmodel = "a/b"', None, {}, ("http://h", None, "a/b")),
        ('api = "http://h"', "c/d", {}, (LoadOptions("c/d"),)),
        ('api = "http://h"', None, {"model": "e/f"}, (LoadOptions("e/f"),)),
        ('model = "a/b"', "c/d", {"api": "http://k"}, ("http://k", None, None)),
        ('api = "http://h"\n[load]\ndevice = "cuda"', None, {}, ("http://h", None, None)),
        ('[load]\ndevice = "cpu"', None, {"model": "e/f"}, (LoadOptions("e/f", device="cpu"),)),
    ],
)
def test_which_model_is_taken(
    file: str,
    variable: str | None,
    flags: dict[str, str],
    choice: tuple[Any, ...],
    write: Write,
    connected: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A flag counts before SFUMATO_MODEL, that before the file; a server of the file is for who names no model."""
    write(file)
    if variable is not None:
        monkeypatch.setenv("SFUMATO_MODEL", variable)
    loading.connect_or_load(loading.ApiFlags(**flags), load_options())
    named = [(key, url, name) for url, key, name in connected] if len(connected[0]) == 3 else connected
    assert connected == [choice] or named == [choice]


def test_a_key_of_the_file_lies_beside_it_and_goes_to_its_server_alone(
    write: Write, connected: list[tuple[Any, ...]]
) -> None:
    path = write('api = "http://h"\napi_key_file = "key.txt"')
    (path.parent / "key.txt").write_text("secret\n")
    loading.connect_or_load(loading.ApiFlags(), load_options())
    loading.connect_or_load(loading.ApiFlags(api="http://k"), load_options())
    assert connected == [("http://h", "secret", None), ("http://k", None, None)]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model = ", "is not TOML"),
        ("modle = 'a'", "there is no key modle; the keys are model, api, api_key_file"),
        ("model = 3", "model is 3; give a text"),
        ("load = 3", "load is 3; it is a section"),
        ("[load]\ndevise = 'cpu'", "there is no key load.devise; the keys are device, dtype"),
        ("[load]\ndevice = 3", "load.device is 3; give a text"),
        ("[load]\ndtype = 'int3'", "load.dtype is 'int3'; choose one of bfloat16"),
        ("[load]\nmemory_limit = 0", "load.memory_limit is 0; give GB"),
        ("[load]\nquantize = 'q4'", "there is no recipe 'q4'; choose one of int8"),
        ("api = 'localhost:8000'", "the URL is 'localhost:8000'; give http://HOST:PORT"),
        ("[load]\nmodel = 'a'", "there is no key load.model"),
        ("[options]\nschema = true", "there is no key options.schema"),
        ("[options]\nmax_tokens = 0", "options.max_tokens is 0; give a number from 1 to 2^62"),
        ("[options]\nmax_tokens = 'many'", "options.max_tokens is 'many'; give a whole number"),
    ],
)
def test_a_wrong_file_is_one_sentence_that_names_it_and_the_key(
    text: str, part: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(text)
    assert cli.main(["generate", "x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"sfumato: {path}") and part in err and err.count("\n") == 1


def test_a_broken_file_stops_no_help(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("model = ")
    path.write_bytes(b"\xff\xfe")
    for arguments in (["--help"], ["generate", "--help"], ["--version"], ["completion", "bash"]):
        assert cli.main(arguments) == 0
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="is not TOML"):
        settings.read_settings()


def test_config_says_what_applies_and_where_it_comes_from(
    write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write('model = "a/b"\n[load]\nmemory_limit = 12\n[options]\ntemperature = 0.5\n')
    assert cli.main(["config", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["path"] == str(path) and record["exists"] is True
    values = record["values"]
    assert values["model"] == {"value": "a/b", "from": "config.toml"}
    assert values["load.memory_limit"] == {"value": 12, "from": "config.toml"}
    assert values["load.device"] == {"value": "auto", "from": "default"}
    assert values["options.temperature"] == {"value": 0.5, "from": "config.toml"}
    assert values["options.max_steps"] == {"value": "the checkpoint's", "from": "default"}
    monkeypatch.setenv("SFUMATO_MODEL", "c/d")
    assert cli.main(["config"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(str(path)) and "SFUMATO_MODEL" in out and "c/d" in out


@pytest.mark.parametrize(
    ("platform", "variables", "place"),
    [
        ("linux", {}, "home/.config/sfumato/config.toml"),
        ("linux", {"XDG_CONFIG_HOME": "xdg"}, "xdg/sfumato/config.toml"),
        ("darwin", {}, "home/Library/Application Support/sfumato/config.toml"),
        ("win32", {"APPDATA": "roaming"}, "roaming/sfumato/config.toml"),
        ("win32", {}, "home/AppData/Roaming/sfumato/config.toml"),
    ],
)
def test_the_place_is_the_platforms(
    platform: str, variables: dict[str, str], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CONFIG_HOME", "APPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("home"))
    assert settings.config_path() == Path(place)
