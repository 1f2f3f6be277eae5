"""cli/options.py: --preset, between the flags and the user's settings, of how to generate and of how to load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sfumato import cli
from sfumato.cli import loading
from sfumato.cli.options import PRESET_OPTIONS, flags_of, load_flags_of
from sfumato.errors import InputError
from sfumato.options import LOAD_OPTIONS, LoadOptions, Options

Command = Callable[..., tuple[int, str, str]]
NO_LOAD_FLAG = dict.fromkeys(name for name in LOAD_OPTIONS if name not in ("model", "calibration"))


@pytest.fixture
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A preset, and settings of the user that say something else."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "sfumato").mkdir()
    text = '[load]\ndtype = "float32"\nops = "fused"\n[options]\nmax_steps = 40\nmax_tokens = 7\n'
    (tmp_path / "sfumato" / "config.toml").write_text(text)
    path = tmp_path / "fast.json"
    options = {"max_steps": 8, "early": False, "mode": "autoregressive"}
    path.write_text(json.dumps({"options": options, "load": {"dtype": "bf16"}}))
    return str(path)


def test_a_flag_is_stronger_than_a_preset_and_that_than_the_settings(preset: str) -> None:
    group = flags_of("max_steps")
    assert group.make(set_=None, max_steps=None) == Options(max_steps=40, max_tokens=7)
    expected = Options(max_steps=8, max_tokens=7, mode="autoregressive")
    assert group.make(set_=None, max_steps=None, preset=preset) == expected
    chosen = group.make(set_=["mode=diffusion"], max_steps=5, preset=preset)
    assert chosen == Options(max_steps=5, max_tokens=7, mode="diffusion")
    assert flags_of(usual=()).make(set_=None, preset=preset) == Options(max_steps=8, mode="autoregressive")


def test_a_preset_yields_where_it_contradicts_a_flag(tmp_path: Path) -> None:
    place = tmp_path / "again.json"
    place.write_text('{"options": {"verify": 2, "redos": 1, "max_steps": 8}}')
    group = flags_of(usual=())
    assert group.make(set_=None, preset=str(place)) == Options(max_steps=8, redos=1, verify=2.0)
    assert group.make(set_=["regex=a+"], preset=str(place)) == Options(max_steps=8, regex="a+")
    ours = group.make(set_=["mode=autoregressive"], preset=str(place))
    assert ours == Options(max_steps=8, mode="autoregressive")
    with pytest.raises(InputError, match=r"^max_steps is 0"):
        group.make(set_=["max_steps=0"], preset=str(place))


def test_a_template_takes_of_a_preset_what_it_has(preset: str) -> None:
    assert flags_of(is_template=True).make(set_=None, preset=preset) == Options(max_steps=8)


def test_a_decision_takes_of_a_preset_what_it_has(preset: str, sfumato: Command) -> None:
    code, _, err = sfumato("decide", "3, 4", "-m", "nano", "--preset", preset, "--yes-no", "Is 3 here?")
    assert code == 0, err
    code, _, err = sfumato("decide", "3", "-m", "nano", "-s", "max_steps=8", "--yes-no", "Is 3 here?")
    assert code == 2 and "max_steps is 8; a decision reads the model's own probabilities" in err


def test_a_slot_with_a_grammar_does_without_a_presets_redos(tmp_path: Path, sfumato: Command) -> None:
    preset, form = tmp_path / "again.json", tmp_path / "form.json"
    preset.write_text('{"options": {"max_steps": 2, "redos": 1}}')
    for slot, more in (({"choices": ["oak", "elm"]}, ()), ({"at_most": 4}, ("-s", "redos=1"))):
        form.write_text(json.dumps(["A ", {"name": "tree", **slot}, "."]))
        code, _, err = sfumato("fill", str(form), "-m", "nano", "--preset", str(preset), *more)
        assert code == 0, err
    form.write_text(json.dumps(["A ", {"name": "tree", "choices": ["oak", "elm"]}, "."]))
    code, _, err = sfumato("fill", str(form), "-m", "nano", "--preset", str(preset), "-s", "redos=1")
    assert code == 2 and "redos cannot go with that, leave it out" in err


def test_a_preset_says_how_to_load(preset: str) -> None:
    group = load_flags_of()
    assert group.make(**NO_LOAD_FLAG) == LoadOptions(dtype="float32", ops="fused")
    load = group.make(**NO_LOAD_FLAG, preset=preset)
    assert load == LoadOptions(dtype="bfloat16", ops="fused")
    assert group.make(**NO_LOAD_FLAG | {"dtype": "float16"}, preset=preset) == LoadOptions(dtype="float16", ops="fused")
    with pytest.raises(InputError, match=r"--dtype is for a model loaded here.*a preset may set it too"):
        loading.connect_or_load(loading.ApiFlags(api="http://localhost:1"), load)


def test_a_server_takes_its_options(preset: str) -> None:
    assert PRESET_OPTIONS.make(preset=None) == {}
    assert PRESET_OPTIONS.make(preset=preset) == {"max_steps": 8, "early": False, "mode": "autoregressive"}


@pytest.mark.parametrize("command", ["generate", "chat", "run", "fill", "edit", "infill", "sudoku", "decide", "serve"])
def test_every_command_that_generates_takes_one(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "p.json"
    place.write_text('{"options": {"max_stops": 3}}')
    more = {"fill": ["x"], "edit": ["x"], "infill": ["x"], "decide": ["x"], "generate": ["x"], "run": ["nano", "x"]}
    assert cli.main([command, *more.get(command, []), "--preset", str(place)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"sfumato: {place}: there is no key options.max_stops; the keys are max_tokens")
    assert err.count("\n") == 1 and "--max-tokens" not in err


def test_nano_generates_by_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "one.json"
    place.write_text('{"options": {"max_steps": 1, "seed": 3}, "load": {"ops": "reference"}}')
    assert cli.main(["generate", "Hello", "-m", "nano", "--preset", str(place), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["seed"], record["usage"]["steps"]) == (3, 1)
