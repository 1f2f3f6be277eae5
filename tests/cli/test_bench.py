"""cli/bench.py: the record as JSON and as a table, on a tiny model. No figure is checked."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from sfumato import cli
from sfumato.cli import bench
from sfumato.measure.plan import BenchPlan

PARTS = (
    "prefill", "denoise pass", "read-out", "soft embedding", "accept, renoise, stop", "commit", "commit and first pass",
    "whole step",
)  # fmt: skip


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with a small bandwidth buffer."""
    monkeypatch.setattr(bench, "BenchPlan", partial(BenchPlan, streamed=2**22))


@pytest.mark.usefixtures("quick")
def test_the_command_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    arguments = ["--size", "tiny", "--seconds", "0.02", "--prompt", "16", "--tokens", "32", "--dtype", "bf16"]
    assert cli.main(["bench", *arguments, "--steps", "2", "--device", "cpu", "--json", "-o", str(path)]) == 0
    output = capsys.readouterr()
    record = json.loads(output.out)
    assert record == json.loads(path.read_text())
    assert record["dtype"] == "bfloat16"
    assert "bench: denoise pass" in output.err
    assert [one["name"] for one in record["implementations"]] == ["reference", "fused", "cpu", "triton"]
    assert [one["name"] for one in record["implementations"] if one["is_auto"]] == [record["ops"]]


@pytest.mark.usefixtures("quick")
def test_the_command_shows_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--size", "tiny", "--seconds", "0.02", "--prompt", "16", "--tokens", "32", "--device", "cpu"]
    assert cli.main(["bench", *arguments]) == 0
    text = capsys.readouterr().out
    for part in (*PARTS, "diffusion", "autoregressive", "of ceiling", "Measured ceiling"):
        assert part in text
    assert "as auto does here" in text and "triton (" in text


def test_the_operations_that_ran_stand_beside_those_that_auto_takes() -> None:
    each = [
        {"name": "fused", "obstacle": None, "is_auto": False},
        {"name": "cpu", "obstacle": None, "is_auto": True},
        {"name": "triton", "obstacle": "they need a CUDA device", "is_auto": False},
    ]
    text = bench.standing({"ops": "fused", "implementations": each})
    assert text == "Ran: fused, where auto takes cpu. Not for these weights here: triton (they need a CUDA device)."


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--size", "huge"], "choose mid or tiny"),
        (["--dtype", "int3"], "choose one of bfloat16"),
        (["--dtype", "fp16", "--size", "tiny"], "times bfloat16 and float32"),
        (["nano", "-m", "other"], "MODEL is nano and --model is other"),
        (["--device", "abacus"], "abacus"),
        (["--size", "tiny", "--ops", "magic"], "magic"),
        (["--size", "tiny", "--quantize", "int3"], "choose one of int8, fp8, int4"),
        (["-o", "not/there/out.json"], "not/there"),
        (["nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("bench: ")]
    assert len(lines) == 1
    assert part in lines[0]
