"""presets.py: a file of options, and what is refused of it, each in one sentence that names the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sfumato.options import OPTIONS, Options
from sfumato.presets import LIMIT, SAMPLING, Preset, PresetError

GOOD = {"options": {"max_steps": 8, "stop": ["END"], "t_max": 0.5}, "load": {"dtype": "bf16"}, "evidence": {"x": [1]}}


def test_a_preset_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "fast.json"
    path.write_text(json.dumps(GOOD), encoding="utf-8-sig")
    preset = Preset.read(path)
    assert preset.options == {"max_steps": 8, "stop": ("END",), "t_max": 0.5}
    assert (preset.load, preset.evidence) == ({"dtype": "bfloat16"}, {"x": [1]})
    assert Options.from_dict(preset.options) == Options(max_steps=8, stop=("END",), t_max=0.5)
    preset.write(path)
    assert Preset.read(str(path)) == preset
    assert Preset.of({"options": {}}, "it").to_dict() == {"options": {}}


def test_every_option_of_a_request_alone_is_kept_out() -> None:
    left_out = {"schema", "regex", "grammar", "choices", "drafts", "strict", "must_call", "adapter"}
    assert {*SAMPLING} == {*OPTIONS} - left_out


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        ([], "is no preset"),
        ({"max_steps": 8}, "is no preset"),
        ({"options": {}, "option": {}}, "there is no key 'option'; the keys are options, load, evidence"),
        ({"options": 3}, "options is 3; give a record"),
        ({"options": {}, "evidence": "good"}, "evidence is 'good'; give a record"),
        ({"options": {"max_stops": 3}}, "there is no key options.max_stops; the keys are max_tokens"),
        ({"options": {"schema": True}}, "there is no key options.schema"),
        ({"options": {"\x1b[2J": 1}}, r"there is no key options.'\x1b[2J'"),
        ({"options": {"max_steps": "8"}}, "options.max_steps is '8'; give a whole number from 1 to 4096"),
        ({"options": {"max_steps": True}}, "options.max_steps is True; give a whole number"),
        ({"options": {"entropy_bound": float("nan")}}, "options.entropy_bound is nan; give a number from 0 to 1e9"),
        ({"options": {"early": None}}, "options.early is None; give true or false"),
        ({"options": {"mode": ["diffusion"]}}, "options.mode is ['diffusion']; give a text"),
        ({"options": {"t_min": 0.9, "t_max": 0.1}}, "options.t_min is 0.9, above t_max 0.1"),
        ({"options": {}, "load": {"device": "cuda"}}, "there is no key load.device; the keys are dtype, ops, quantize"),
        ({"options": {}, "load": {"quantize": 8}}, "load.quantize is 8; give a text"),
        ({"options": {}, "load": {"dtype": "int3"}}, "load.dtype is 'int3'; choose one of bfloat16"),
    ],
)
def test_what_is_no_preset_is_one_sentence(raw: Any, part: str) -> None:
    with pytest.raises(PresetError) as caught:
        Preset.of(raw, "fast.json")
    assert str(caught.value).startswith("fast.json") and part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"\xff\xfe{}", "is not JSON"),
        (b"", "is not JSON"),
        (b'{"options": {"max_steps": 1, "max_steps": 2}}', "says 'max_steps' twice"),
        (b'{"options": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"options": {"max_steps": ' + b"9" * 5000 + b"}}", "is not JSON"),
        (b" " * (LIMIT + 1), "larger than 1 MiB"),
    ],
)
def test_a_hostile_file_is_one_sentence(content: bytes, part: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(PresetError) as caught:
        Preset.read(path)
    assert str(path) in str(caught.value) and part in str(caught.value)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place, part in (
        (tmp_path / "pipe", "is not a file"),
        (tmp_path, "is not a file"),
        (tmp_path / "none", "cannot read"),
        (Path("a\0b"), "is not"),
    ):
        with pytest.raises(PresetError, match=part):
            Preset.read(place)
