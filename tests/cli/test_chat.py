"""cli/chat.py, lines.py and flow.py: a chat as a person has it, at a terminal."""

from __future__ import annotations

import importlib.util
import io
import json
import stat
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from sfumato.cli import lines
from sfumato.cli.flow import TextFlow

if sys.platform == "win32":
    pytest.skip("Windows has no pty", allow_module_level=True)

from scripted_chat import ANSWERING
from terminal import Terminal

Open = Callable[..., Terminal]

HAS_TOOLKIT = importlib.util.find_spec("prompt_toolkit") is not None
EDITOR = pytest.param(
    "prompt_toolkit",
    marks=pytest.mark.skipif(not HAS_TOOLKIT, reason="prompt_toolkit, the extra chat, is not installed"),
)
READERS = pytest.mark.parametrize("reader", ["readline", EDITOR])
LONG = (
    "He let one tone pass into the next, like smoke. Sfumato he called it: without lines or borders, in the manner of "
    "smoke, or beyond the plane of focus. Glaze lay upon glaze."
)


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Open]:
    """Begins a chat with the scripted model, its state in an empty folder; what is open at the end is killed."""
    running: list[Terminal] = []

    def begin(reader: str, *arguments: str, columns: int = 80, rows: int = 24, **environment: str | None) -> Terminal:
        environment = {"XDG_STATE_HOME": str(tmp_path), **environment}
        terminal = Terminal(["scripted_chat.py", reader, *arguments], columns, rows, environment)
        running.append(terminal)
        terminal.until_ready(">" if environment.get("PYTHONIOENCODING") == "ascii" else "›")
        return terminal

    yield begin
    for terminal in running:
        terminal.close()


def ask(terminal: Terminal, keys: str) -> str:
    """Type a message, and wait for its answer and the next prompt; returns what is on the screen."""
    times = terminal.raw.count(ANSWERING)
    terminal.type(keys)
    terminal.until_written(ANSWERING, times + 1)
    return terminal.until_ready()


def interrupt(terminal: Terminal) -> None:
    """Press Ctrl-C as a hand does: Python's readline misses a signal in the moment before it waits for a key."""
    time.sleep(0.2)
    terminal.type("\x03")


def saved(folder: Path) -> list[dict[str, object]]:
    """The messages of the one saved conversation."""
    (path,) = (folder / "sfumato" / "chats").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    messages: list[dict[str, object]] = json.loads(path.read_text())["chats"][0]["messages"]
    return messages


@READERS
def test_ctrl_c_stops_the_answer_keeps_what_there_is_and_the_prompt(reader: str, chat: Open, tmp_path: Path) -> None:
    terminal = chat(reader)
    terminal.type("stuck\r")
    terminal.until("step 8")
    terminal.type("\x03")
    shown = terminal.until_ready()
    assert "stopped; its end is a draft" in shown and "step 8" not in shown and "\nstuck" in shown
    ask(terminal, "and now\r")
    terminal.type("\x04")
    assert terminal.code() == 0 and terminal.screen.wraps and terminal.screen.shows_cursor
    messages = saved(tmp_path)
    assert [message["content"] for message in messages] == ["stuck", "stuck", "and now", "and now "]
    assert "Stopped" in str(messages[1]["note"]) and "note" not in messages[3]


@READERS
def test_ctrl_c_before_anything_is_written_takes_the_message_back(reader: str, chat: Open, tmp_path: Path) -> None:
    terminal = chat(reader)
    terminal.type("slow\r")
    terminal.until_written(ANSWERING)
    terminal.type("\x03")
    assert "the message is taken back" in terminal.until_ready()
    terminal.type("\x04")
    assert terminal.code() == 0 and not (tmp_path / "sfumato" / "chats").exists()


@READERS
def test_ctrl_c_at_an_empty_prompt_twice_ends_and_clears_a_line_that_is_not(reader: str, chat: Open) -> None:
    terminal = chat(reader)
    terminal.type("half a thou")
    terminal.until("half a thou")
    interrupt(terminal)
    if reader == "readline":
        terminal.until("half a thou\n›")
    else:
        terminal.until("›", gone="half a thou")
    interrupt(terminal)
    terminal.until("Ctrl-C again")
    terminal.until_ready()
    ask(terminal, "hello\r")  # a line in between: the count begins again
    interrupt(terminal)
    terminal.until_written("Ctrl-C again", 2)
    terminal.until_ready()
    interrupt(terminal)
    assert terminal.code() == 0
    assert terminal.screen.text.count("Ctrl-C again") == 2 and "there is" not in terminal.screen.text


@READERS
def test_lines_are_remembered_across_sessions_and_edited(reader: str, chat: Open, tmp_path: Path) -> None:
    terminal = chat(reader)
    ask(terminal, "first one\r")
    terminal.type("\x04")
    assert terminal.code() == 0
    history = tmp_path / "sfumato" / "history.jsonl"
    assert json.loads(history.read_text()) == "first one" and stat.S_IMODE(history.stat().st_mode) == 0o600
    terminal = chat(reader)
    terminal.type("\x1b[A")
    terminal.until("› first one")
    assert "the first one" in ask(terminal, "\x01the \r")  # Ctrl-A: to the beginning
    assert history.read_text().splitlines()[1:] == ['"the first one"']


@READERS
def test_a_paste_of_several_lines_is_one_message(reader: str, chat: Open, tmp_path: Path) -> None:
    terminal = chat(reader)
    ask(terminal, "\x1b[200~one\rtwo\r\x1b[201~\r" if reader != "readline" else "\x1b[200~one\ntwo\n\x1b[201~\r")
    assert saved(tmp_path)[0]["content"] == "one\ntwo"


@READERS
@pytest.mark.parametrize("keys", ["one\\\rtwo\r", '"""one\rtwo"""\r', "one\x1b\rtwo\r"])
def test_several_lines_are_typed(reader: str, keys: str, chat: Open, tmp_path: Path) -> None:
    if "\x1b" in keys and reader == "readline":
        pytest.skip("Alt-Enter is prompt_toolkit's")
    terminal = chat(reader)
    ask(terminal, keys)
    assert saved(tmp_path)[0]["content"] == "one\ntwo"


@READERS
def test_tab_completes_commands_and_options(reader: str, chat: Open) -> None:
    terminal = chat(reader)
    terminal.type("/set entro\t")
    terminal.until("/set entropy_bound=")
    terminal.type("0.2\r")
    terminal.until("entropy_bound = 0.2")


def test_a_chat_goes_on_where_the_last_one_ended(chat: Open, tmp_path: Path) -> None:
    terminal = chat("readline")
    ask(terminal, "remember this\r")
    terminal.type("\x04")
    assert terminal.code() == 0
    terminal = chat("readline", "--continue")
    assert "remember this" in terminal.until("\n›")
    ask(terminal, "and this\r")
    assert [message["content"] for message in saved(tmp_path)][::2] == ["remember this", "and this"]


def test_nothing_is_kept_with_no_save(chat: Open, tmp_path: Path) -> None:
    terminal = chat("readline", "--no-save")
    ask(terminal, "a secret\r")
    terminal.type("\x04")
    assert terminal.code() == 0 and [*tmp_path.iterdir()] == []


def test_an_answer_that_breaks_off_is_not_kept(chat: Open, tmp_path: Path) -> None:
    terminal = chat("plain")
    assert "broken off" in ask(terminal, "broken\r") and "the line broke" in terminal.screen.text
    ask(terminal, "next\r")
    assert [message["content"] for message in saved(tmp_path)] == ["next", "next "]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_unicode_gets_stand_ins(encoding: str, chat: Open) -> None:
    text = "caf\u00e9 “quoted” … 漢字 → 🙂 ½"
    terminal = chat("readline", columns=40, PYTHONIOENCODING=encoding)
    times = terminal.raw.count(ANSWERING)
    terminal.type(f"1: {json.dumps(text)}\r")
    terminal.until_written(ANSWERING, times + 1)
    terminal.until_ready(">" if encoding == "ascii" else "›")
    shown = terminal.screen.text
    if encoding == "ascii":
        assert 'cafe "quoted" ... ???? > ?? ?' in shown
    else:
        assert "café “quoted” … ???? > ?? ½" in shown
    assert "Error" not in shown and "Traceback" not in shown


def test_a_dumb_terminal_gets_text_alone(chat: Open) -> None:
    terminal = chat("readline", TERM="dumb")
    assert "A plain answer" in ask(terminal, "1: A plain answer\r") and "\x1b" not in terminal.raw.replace(
        ANSWERING, ""
    )


def test_no_colour_where_none_is_wanted(chat: Open) -> None:
    terminal = chat("plain", NO_COLOR="1")
    ask(terminal, "3: one two three four five six\r")
    assert "accepted" in terminal.raw and "38;" not in terminal.raw


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_the_text_of_several_canvases_stands_on_the_screen_in_whole_words(columns: int, chat: Open) -> None:
    terminal = chat("plain", columns=columns, rows=30)
    ask(terminal, f"3: {LONG}\r")
    rows = [row.strip() for row in terminal.screen.text.splitlines()]
    first = next(at for at in range(len(rows)) if rows[at].startswith("He let"))
    last = next(at for at in range(first, len(rows)) if rows[at].endswith("glaze."))
    assert " ".join(rows[first : last + 1]) == LONG and max(map(len, rows[first : last + 1])) <= columns


TEXTS = (
    "漢字かな交じり文 " * 8,
    "👩‍👩‍👧 👍🏽 🇨🇭 🙂 " * 9,
    "e\u0301\u0323 Z̴̛͇a̴͎͠l̵̙͝g̵̬̾o̶̖͒ " * 9,
    "\x1b[2J\x1b]0;title\x07 \x9b31m red \r\b\x7f \u202e back " * 4,
    "تجربة עברית नमस्ते " * 6,
)


@pytest.mark.parametrize("columns", [20, 60])
def test_no_text_breaks_the_canvas(columns: int, chat: Open) -> None:
    """The screen of these tests joins no emoji: what rich takes for two columns is six there."""
    terminal = chat("plain", columns=columns, rows=30)
    for number, text in enumerate(TEXTS, 1):
        message = f"2: {json.dumps(text)}"
        shown = ask(terminal, f"{message}\r")
        assert "".join(message.split()) in "".join(shown.split())
        assert shown.count("step") == number and terminal.screen.wraps and terminal.screen.shows_cursor
    written = terminal.raw.replace(ANSWERING, "")
    assert not any(code in written for code in ("\x1b[2J", "\x1b]", "\x9b", "\x07", "\x7f", "\u202e"))


@given(st.lists(st.text(st.sampled_from("ab 漢\n\t-`é🙂")), max_size=12), st.integers(8, 30), st.integers(0, 12))
@settings(deadline=None, max_examples=100)
def test_a_flow_loses_nothing_but_spaces_at_line_ends(parts: list[str], width: int, held: int) -> None:
    """Lines are held back between the first `held` parts, as canvases do."""
    screen, rest = io.StringIO(), Text()
    flow = TextFlow(Console(file=screen, force_terminal=True, width=width, color_system=None))
    for number, part in enumerate(parts):
        rest = flow.print(rest + Text(part), is_last=number >= held)
    flow.print(rest)
    assert "".join(screen.getvalue().split()) == "".join("".join(parts).split())


@given(st.lists(st.text(st.sampled_from("abc漢🙂"), min_size=1, max_size=4), min_size=1), st.integers(8, 30))
def test_a_flow_breaks_between_words(words: list[str], width: int) -> None:
    screen = io.StringIO()
    TextFlow(Console(file=screen, force_terminal=True, width=width, color_system=None)).print(Text(" ".join(words)))
    rows = screen.getvalue().split("\n")
    assert " ".join(row.strip() for row in rows) == " ".join(words) and max(map(cell_len, rows)) <= width
    for row, following in pairwise(rows):
        assert cell_len(row.strip()) + 1 + cell_len(following.split()[0]) > width  # none is broken early


@pytest.mark.parametrize(
    ("text", "is_open"),
    [
        ("a", False),
        ("a\\", True),
        ("a\\\\", False),
        ('"""a', True),
        ('"""a\nb"""', False),
        ('say """', False),
        ("", False),
    ],
)
def test_a_message_that_goes_on(text: str, is_open: bool) -> None:
    assert lines.is_open(text) is is_open


def test_the_marks_that_join_lines_are_not_sent() -> None:
    assert lines.unwrapped('"""one\ntwo"""') == "one\ntwo" and lines.unwrapped("one\\\ntwo\\\n") == "one\ntwo\n"
    assert lines.unwrapped('he said """') == 'he said """'
