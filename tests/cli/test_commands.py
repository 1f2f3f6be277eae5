"""cli/generate.py, chat.py, sudoku.py, finetune.py and view.py: as a person or a program calls them, on nano."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from sfumato import cli
from sfumato.checkpoints.adapters import write_adapter
from sfumato.cli.sudoku import board
from sfumato.events import Draft
from sfumato.llm import LLM
from sfumato.model.adapters import new_adapter
from sfumato.options import Options
from sfumato.tasks.sudoku import is_solved

Capture = pytest.CaptureFixture[str]

PUZZLE = "800560790257001600040000152004050800038607041096348275085906320902704518370285400"
"""50 clues: nano solves it."""
BROKEN = "12" + "0" * 79
"""Two clues: no unique solution, and nano will not find one."""


def call(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    output = capsys.readouterr()
    return code, output.out, output.err


def test_sudoku_prints_a_checked_board(capsys: Capture) -> None:
    code, out, err = call(capsys, "sudoku", PUZZLE, "--seed", "0")
    assert code == 0 and err == ""
    assert "solved in" in out and "tokens per pass" in out
    assert is_solved("".join(c for c in out.split("solved in")[0] if c.isdigit()), PUZZLE)


def test_sudoku_json_is_a_line_a_puzzle_and_code_1_if_one_is_unsolved(capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "some.txt"
    file.write_text(f"# two\n{PUZZLE}\n{BROKEN.replace('0', '.')}\n")
    code, out, _ = call(capsys, "sudoku", "--file", str(file), "--json", "--max-steps", "3", "--seed", "0")
    first, second = map(json.loads, out.splitlines())
    assert code == 1
    assert first["puzzle"] == PUZZLE and first["solved"] is True and is_solved(first["answer"], PUZZLE)
    assert second["solved"] is False and second["answer"].startswith("12")
    assert {"steps", "seconds", "tokens_per_pass"} <= set(first)


def test_sudoku_random_is_the_same_for_the_same_seed(capsys: Capture) -> None:
    first = json.loads(call(capsys, "sudoku", "--random", "--clues", "50", "--seed", "4", "--json")[1])
    again = json.loads(call(capsys, "sudoku", "--random", "--clues", "50", "--seed", "4", "--json")[1])
    assert first["puzzle"] == again["puzzle"] and first["answer"] == again["answer"]
    assert 81 - first["puzzle"].count("0") == 50


def test_sudoku_counts_a_batch(capsys: Capture) -> None:
    code, out, _ = call(capsys, "sudoku", "--random", "--clues", "55", "--count", "3", "--batch", "3")
    assert code in (0, 1) and "of 3 solved" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["123"], "3 cells"),
        (["x" * 81], "'x'"),
        (["11" + "0" * 79], "row 1"),
        ([], "--random"),
        ([PUZZLE, "--random"], "one of"),
        (["--random", "--clues", "16"], "24 to 55"),
        (["--file", "no-such-file"], "no-such-file"),
        ([PUZZLE, "--mode", "slow"], "autoregressive"),
        ([PUZZLE, "--model", "no/where/at-all"], "no/where/at-all"),
    ],
)
def test_bad_sudoku_input_is_one_line_and_code_2(capsys: Capture, arguments: list[str], words: str) -> None:
    code, out, err = call(capsys, "sudoku", *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and words in err


def test_generate_piped_prints_the_text_alone(capsys: Capture) -> None:
    code, out, err = call(capsys, "generate", f"Solve this Sudoku:\n{PUZZLE}", "--seed", "1")
    assert code == 0 and err == "" and is_solved(out.strip(), PUZZLE)


def test_generate_json_has_text_tokens_and_usage(capsys: Capture) -> None:
    arguments = ("generate", f"Solve this Sudoku:\n{PUZZLE}", "--seed", "1", "--json", "-s", "logprobs=true")
    code, out, _ = call(capsys, *arguments)
    record = json.loads(out)
    assert code == 0 and record["seed"] == 1 and record["finish_reason"] == "stop"
    assert record["usage"]["tokens"] == len(record["tokens"]) == len(record["logprobs"])


def test_generate_answers_with_the_first_adapter_that_is_given(capsys: Capture, tmp_path: Path) -> None:
    llm = LLM.load("nano")
    for n in (1, 2):
        adapter = new_adapter(llm.model, 2, 2, seed=n)
        for factors in adapter.factors.values():
            factors.b.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(n))
        write_adapter(adapter, tmp_path / f"run{n}", llm.model, base="nano")
        llm.adapters.load(f"run{n}", tmp_path / f"run{n}")
    flags = [part for n in (1, 2) for part in ("--adapter", str(tmp_path / f"run{n}"))]
    arguments = ["generate", "1 2 3", "--seed", "1", "--max-tokens", "20", "-s", "max_steps=4"]
    code, out, err = call(capsys, *arguments, *flags)
    texts = [llm.chat("1 2 3", seed=1, max_tokens=20, max_steps=4, adapter=name).text for name in ("run1", "run2")]
    assert code == 0 and out.strip() == texts[0].strip() != texts[1].strip(), err
    code, out, err = call(capsys, *arguments, "--adapter", f"x={tmp_path / 'none'}")
    assert code == 2 and out == "" and "none" in err and len(err.splitlines()) == 1


def test_generate_reads_standard_input(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Solve this Sudoku:\n{PUZZLE}"))
    assert is_solved(call(capsys, "generate", "-", "--seed", "1")[1].strip(), PUZZLE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "-s", "warmth=1"], "warmth"),
        (["x", "-s", "t_max=0"], "t_max"),
        (["x", "--max-tokens", "0"], "--max-tokens is 0"),
        (["", "--raw"], "empty"),
        (["x", "--ops", "magic"], "magic"),
        (["x", "--dtype", "int1"], "int1"),
        (["x", "--device", "abacus"], "abacus"),
    ],
)
def test_bad_generate_input_is_one_line_and_code_2(capsys: Capture, arguments: list[str], words: str) -> None:
    code, _, err = call(capsys, "generate", *arguments)
    assert code == 2 and err.count("\n") == 1 and words in err


def test_chat_piped_answers_every_line(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"Solve this Sudoku:{PUZZLE}"
    monkeypatch.setattr(
        sys, "stdin", io.StringIO(f"{line}\n\n/new\n/nonsense\n/set t_max=oops\n{line}\n/quit\n{line}\n")
    )
    code, out, _ = call(capsys, "chat", "--seed", "1", "--max-tokens", "82", "-s", "max_steps=4")
    lines = out.splitlines()
    assert code == 0 and len([x for x in lines if len(x) == 81 and x.isdigit()]) == 2
    assert any("/nonsense" in x for x in lines) and any("t_max" in x for x in lines)
    answers = [x for x in lines if x.isdigit()]
    assert answers[0] == answers[1]  # /new forgot the first turn


def test_board_shows_clues_and_draft_in_their_places() -> None:
    draft = Draft(0, 0, 1, [0] * 81, [0.0] * 81, [True] * 81)
    text = board(PUZZLE, draft, ["7"] * 81, "status").plain
    digits = [c for c in text.split("status")[0] if c.isdigit()]
    assert digits == [c if c != "0" else "7" for c in PUZZLE]


def test_finetune_trains_saves_and_goes_on(capsys: Capture, tmp_path: Path) -> None:
    out = tmp_path / "run"
    common = ("--eval-every", "1", "--eval-items", "3", "-s", "batch=2", "-s", "warmup=1", "--pool", "70")
    assert call(capsys, "finetune", str(out), "-s", "steps=1", *common)[0] == 0
    code, _, err = call(capsys, "finetune", str(out), "-s", "steps=2", *common)
    assert code == 0 and "going on from step 1" in err
    assert len((out / "log.jsonl").read_text().splitlines()) == 2
    assert len((out / "evals.jsonl").read_text().splitlines()) == 2
    assert (out / "checkpoint" / "model.safetensors").exists() and (out / "loss.png").exists()
    assert "checkpoint" in "".join(err.split()) and LLM.load(out / "checkpoint").chat(
        [{"role": "user", "content": "x"}], options=Options(max_tokens=5, max_steps=1)
    )
    code, _, err = call(capsys, "finetune", str(out), "-s", "speed=9")
    assert code == 2 and "speed" in err and err.count("\n") == 1
