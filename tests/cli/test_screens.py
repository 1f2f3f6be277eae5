"""cli/output.py, tables.py and help.py: every command on narrow terminals, and on those that lack characters."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from sfumato import cli
from sfumato.cli import output
from sfumato.cli.bench import show as show_bench
from sfumato.cli.tables import FittingTable
from sfumato.llm import LLM

if sys.platform == "win32":
    pytest.skip("Windows has no pty", allow_module_level=True)

from terminal import Screen, Terminal

PUZZLE = "800560790257001600040000152004050800038607041096348275085906320902704518370285400"
QUICK = ("--seed", "1", "--max-steps", "2")

Look = Callable[..., str]

COMMANDS = (
    ("sudoku", PUZZLE, "--seed", "1", "--delay", "0"),
    ("demo", "--list"),
    ("demo", "sudoku", "--seed", "1", "--delay", "0"),
    ("generate", f"Solve this Sudoku:\n{PUZZLE}", *QUICK),
    ("decide", "x", "--field", "mood=happy|unhappy, and how", "--score", "n=low|high", "--span", "Which?"),
    ("infill", "in.txt", "--length", "3", "--seed", "1"),
    ("edit", "in.txt", "-i", "x", *QUICK),
    ("info", "nano"),
    ("info", "nano", "--gpu", "H100"),
    ("list",),
    ("config",),
    ("--help",),
    ("generate", "--help"),
    ("generate", "x", "--max-tokens", "0"),
    ("chat", "--bogus"),
)


@pytest.fixture
def look(nano: LLM, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> Iterator[Look]:
    """Runs a command on nano with its output on a terminal; returns what is on the screen."""
    monkeypatch.setattr("sfumato.cli.loading.load_model", lambda load: nano)
    monkeypatch.chdir(str(tmp_path))
    with open("in.txt", "w", encoding="utf-8") as file:
        file.write("12<FILL>34 é 漢字\n")

    def run(act: Callable[[], object], columns: int, encoding: str) -> str:
        import pty
        import termios

        master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (200, columns))
        read: list[bytes] = []
        thread = threading.Thread(target=_drain, args=(master, read))
        thread.start()
        with monkeypatch.context() as patch, open(slave, "w", encoding=encoding, newline="") as stream:
            patch.setenv("COLUMNS", str(columns))
            patch.setenv("LINES", "200")
            patch.setenv("TERM", "xterm-256color")
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            output.prepare_streams()
            act()
            stream.flush()
        thread.join(10)
        os.close(master)
        screen = Screen(columns, 200)
        screen.write(b"".join(read).decode(encoding))
        return screen.text

    yield run


def _drain(master: int, read: list[bytes]) -> None:
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:
            return
        if not data:
            return
        read.append(data)


def is_squeezed(text: str) -> bool:
    """Whether three rows in a row hold a letter or two each."""
    rows = [row.strip("|+- ") for row in text.splitlines()]
    short = [0 < len(row) <= 2 and row.isalpha() for row in rows]
    return any(all(short[at : at + 3]) for at in range(len(short) - 2))


@pytest.mark.parametrize(("columns", "encoding"), [(40, "cp1252"), (40, "ascii"), (20, "utf-8"), (20, "ascii")])
def test_every_command_on_a_narrow_terminal(columns: int, encoding: str, look: Look) -> None:
    for arguments in COMMANDS:
        shown = look(lambda: cli.main(arguments), columns, encoding)  # noqa: B023
        assert shown and "Traceback" not in shown and "UnicodeEncodeError" not in shown, (arguments, shown)
        assert not is_squeezed(shown), (arguments, shown)


@pytest.mark.parametrize("columns", [20, 40])
def test_a_board_is_whole_on_a_narrow_terminal(columns: int, look: Look) -> None:
    shown = look(lambda: cli.main(["sudoku", PUZZLE, "--seed", "1", "--delay", "0"]), columns, "ascii")
    rows = ["".join(c for c in row if c.isdigit()) for row in shown.splitlines() if sum(c.isdigit() for c in row) == 9]
    assert len(rows) == 9 and all(c in ("0", d) for c, d in zip(PUZZLE, "".join(rows), strict=True))


def test_the_figures_of_bench_on_a_narrow_terminal(look: Look) -> None:
    part = {"seconds": 0.01, "fastest": 0.01, "slowest": 0.02, "floor_seconds": 0.001, "share_of_ceiling": 0.1}
    answer = {
        "tokens": 9,
        "seconds": 1.0,
        "first_tokens_seconds": 0.5,
        "tokens_per_pass": 3.0,
        "tokens_per_second": 9.0,
    }
    results = {
        "environment": {"hardware": {"gpu": None, "cpu": "a processor", "threads": 2}},
        "model": {"name": "nano", "parameters": 10**6, "active": 10**6},
        "dtype": "float32",
        "ops": "cpu",
        "prompt": 64,
        "parts": {"encode the prompt": part, "denoise": part},
        "requests": {"diffusion": answer},
        "ceilings": {"bytes_per_second": {"read": 1e10, "copy": 1e10}, "flops_per_second": {"float32": {"best": 1e11}}},
        "peak_bytes": 0,
    }
    shown = look(lambda: show_bench(results), 40, "cp1252")
    assert "encode the prompt\n  time" in shown and not is_squeezed(shown)


def test_a_pipe_of_any_encoding_gets_every_character(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    held, sys.stdout = sys.stdout, stream
    try:
        output.prepare_streams()
        print("é → 漢 · …")
        assert output.encodable("é → 漢 · …") == "e > ?? . ..."
        assert not output.speaks_unicode()
    finally:
        sys.stdout = held
    assert stream.buffer.getvalue() == rb"\xe9 > \u6f22 . ." + b"\n"
    assert output.encodable("é → 漢") == "é → 漢" and output.speaks_unicode()


def test_a_stand_in_is_as_wide_as_what_it_stands_for() -> None:
    for character, stand_in in output.STAND_INS.items():
        assert stand_in.isascii()
        assert cell_len(stand_in) == cell_len(character) or character == "\ufe0f", character


def test_bytes_that_an_encoding_lacks_are_read_as_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é 漢".encode()), encoding="ascii"))
    output.prepare_streams()
    assert output.readable(sys.stdin.read()) == "é 漢"
    assert output.readable("plain é") == "plain é"


@pytest.mark.parametrize("variables", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_the_c_locale_ends_no_command(variables: dict[str, str]) -> None:
    with Terminal(["-m", "sfumato", "config"], 40, 40, {"PYTHONIOENCODING": "ascii", **variables}) as terminal:
        assert terminal.code() == 0 and "options.max_tokens" in terminal.screen.text


def test_a_table_that_does_not_fit_becomes_records() -> None:
    table = Table(box=None)
    table.add_column("name", no_wrap=True)
    table.add_column("size", no_wrap=True)
    table.add_column("what it is")
    table.add_row("one", "[green]12 GB[/]", "a sentence of several words about it")
    table.add_row("two", "", "another")

    def drawn(width: int) -> list[str]:
        screen = io.StringIO()
        Console(file=screen, width=width).print(FittingTable(table))
        return [row.rstrip() for row in screen.getvalue().splitlines()]

    assert drawn(80)[0].split() == ["name", "size", "what", "it", "is"] and len(drawn(80)) == 3
    assert len(drawn(40)) > 3 and drawn(40)[0].split()[0] == "name"  # the sentence is wrapped in its column
    assert drawn(20)[:2] == ["one", "  size 12 GB"] and "  what it is another" in drawn(20)
