"""cli/training_data.py: what `sfumato finetune --dry-run` shows of examples and of the whole set."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sfumato.cli.training_data import dry_run
from sfumato.errors import InputError
from sfumato.training.recipe import TrainingRecipe
from sfumato.training.spec import DataSpec


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def screen(tmp_path: Path, *records: Any, is_terminal: bool = False, width: int = 100, **options: Any) -> str:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    output = io.StringIO()
    console = Console(file=output, force_terminal=is_terminal, no_color=not is_terminal, highlight=False, width=width)
    dry_run("nano", DataSpec((path,), **{"held_out": "0", **options}), TrainingRecipe(batch=8), console)
    return output.getvalue()


def test_a_token_is_a_line_with_its_part_and_its_losses(tmp_path: Path) -> None:
    lines = screen(tmp_path, {"prompt": "7", "response": "12\x1b"}).splitlines()
    assert lines[0].startswith("Example 1: a.jsonl, line 1; ") and lines[0].endswith(" response in one canvas of 82")
    rows = [line.split() for line in lines[1 : lines.index("")]]
    assert rows[0][2:] == ["prompt", "-", "'<bos>'"]
    assert rows[1][2:] == ["prompt", "next", "'<|turn>'"]
    assert next(row[2:] for row in rows if row[2] == "canvas") == ["canvas", "1", "canvas", "+", "next", "'1'"]
    assert rows[-2][2:] == ["canvas", "1", "canvas", "+", "next", "'<turn|>'"]
    assert rows[-1][1:] == ["fill", "canvas", rows[-1][3], "×", "'<eos>'"]
    learned = sum(row[2] == "canvas" for row in rows[:-1])
    assert learned + int(rows[-1][3]) == 82
    assert "\x1b" not in "".join(lines)


def test_behind_a_cut_nothing_is_learned(tmp_path: Path) -> None:
    text = screen(tmp_path, {"prompt": "7", "response": "1" * 99}, max_tokens=30)
    assert "places of which nothing is learned" in text and "×" not in text.partition("\n\n")[0]
    assert "1 example cut at 30 tokens" in text


def test_a_terminal_shows_the_text_with_its_canvases_and_a_legend(tmp_path: Path) -> None:
    text = screen(tmp_path, {"prompt": "7", "response": "1" * 99}, {"text": "ab"}, is_terminal=True)
    assert "── canvas 1 ──" in text and "── canvas 2 ──" in text and "\x1b[2m<bos>" in text
    assert "end fill" in text and "unknown behind a cut" in text


def test_the_set_is_summed_up(tmp_path: Path) -> None:
    records = [{"text": "1" * count} for count in range(1, 60)] + [{"prompt": "2" * 80, "response": "3"}]
    text = screen(tmp_path, *records, max_tokens=70, held_out="10%")
    assert "53 examples to train on, and 6 held out, of 60 records in a.jsonl" in text
    assert "1 left out (prompt too long), from a.jsonl, line 60" in text
    assert "% of the positions are padding" in text
    bars = [line for line in text.splitlines() if "█" in line]
    assert len(bars) > 4 and sum(int(line.split()[-1]) for line in bars) == 53
    assert text.count("Example ") == 3
    edges = [(int(line.split()[0]), int(line.split()[2])) for line in bars]
    assert all(low <= high for low, high in edges)
    assert all(high < low for (_, high), (low, _) in pairwise(edges))  # no length belongs to two bars


def test_the_histogram_fits_a_narrow_terminal(tmp_path: Path) -> None:
    text = screen(tmp_path, *({"text": "1" * count} for count in range(1, 9)), width=40)
    bars = [line for line in text.splitlines() if "█" in line]
    assert len(bars) == 8
    assert max(map(len, bars)) <= 40


def test_a_bad_line_is_refused_by_its_number(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: "):
        screen(tmp_path, {"text": "a"}, {"text": 7})


def test_the_command_line_shows_it_and_needs_no_folder_of_a_run(
    sfumato: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "7", "response": "8"}\n')
    code, out, _ = sfumato("finetune", "-m", "nano", "--data", str(path), "--dry-run")
    assert (
        code == 0
        and out.startswith("Example 1: a.jsonl, line 1; ")
        and "1 example to train on, of 1 record in a.jsonl" in out
    )
    path.write_text('{"prompt": "7", "response": "8"}\n{"prompt": "7", "response": ""}\n')
    code, out, error = sfumato("finetune", "-m", "nano", "--data", str(path), "--dry-run")
    assert (code, out) == (2, "") and "a.jsonl, line 2: message 1 (assistant) is an answer of no tokens" in error
    for flags, why in (
        ((), "name them with --data"),
        (("--data", str(path), "--long", "bend"), "choose 'cut', 'drop'"),
    ):
        code, _, error = sfumato("finetune", "--dry-run", *flags)
        assert code == 2 and why in error
