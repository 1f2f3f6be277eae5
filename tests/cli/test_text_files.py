"""cli/files.py and cli/output.py: files of text, byte for byte, and what a terminal gets."""

from __future__ import annotations

import io
import os
import random
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.cli import files, output
from sfumato.errors import InputError, SfumatoError

Put = Callable[..., str]

file_texts = st.text(st.one_of(st.sampled_from("\r\n\t \ufeffé🙂\u2028a1:-"), st.characters(exclude_categories=["Cs"])))


@settings(deadline=None)
@given(file_texts.filter(lambda text: "\0" not in text))
def test_bytes_go_in_and_come_out(text: str) -> None:
    assert files.decode(text.encode(), "it").encode() == text.encode()


def test_a_file_that_changed_meanwhile_is_left(put: Put) -> None:
    put("mine")
    with pytest.raises(SfumatoError, match="has changed since it was read"):
        files.write("a.txt", "old", "new")
    assert Path("a.txt").read_text() == "mine" and os.listdir() == ["a.txt"]


def test_a_write_keeps_extended_attributes(put: Put) -> None:
    put("old")
    try:
        os.setxattr("a.txt", "user.origin", b"here\0there")
        os.setxattr("a.txt", "user.empty", b"")
    except (AttributeError, OSError):
        pytest.skip("this system, or this drive, has no extended attributes")
    os.chmod("a.txt", 0o751)
    os.symlink("a.txt", "link")
    files.write("link", "old", "new")
    assert Path("a.txt").read_text() == "new" and os.path.islink("link")
    assert os.getxattr("a.txt", "user.origin") == b"here\0there" and os.getxattr("a.txt", "user.empty") == b""
    assert stat.S_IMODE(os.stat("a.txt").st_mode) == 0o751


@pytest.mark.slow
def test_kills_at_any_moment_leave_the_old_text_or_the_new(put: Put) -> None:
    """SIGKILL, thirty times, in the middle of writes of 8 MB."""
    contents = ["a" * (8 << 20), "b" * (8 << 20)]
    put(contents[0])
    script = (
        "from sfumato.cli import files\na, b = 'a' * (8 << 20), 'b' * (8 << 20)\n"
        "held = files.read('a.txt')\nprint(flush=True)\n"
        "while True:\n    held, old = (b if held == a else a), held\n    files.write('a.txt', old, held)\n"
    )
    rng, numbers = random.Random(1), set()
    for _ in range(30):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        numbers.add(contents.index(Path("a.txt").read_text()))
    assert numbers == {0, 1}


def test_a_write_that_fails_leaves_the_file_and_nothing_beside(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    put("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        files.write("a.txt", "old", "new")
    assert Path("a.txt").read_text() == "old" and os.listdir() == ["a.txt"]


def test_a_terminal_gets_json_without_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON of a text may hold those above 127 as they are."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", terminal)
    output.put('{"text": "\x9b2J\x7f"}\n')
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    output.put('{"text": "\x9b2J\x7f"}\n')
    assert terminal.buffer.getvalue().decode() == '{"text": "\x9b2J\x7f"}\n{"text": "\ufffd2J␡"}\n'


def test_json_names_a_key_once() -> None:
    assert files.parse_json('\ufeff{"a": [1]}', "it") == {"a": [1]}
    with pytest.raises(InputError, match="it says 'a' twice"):
        files.parse_json('{"a": 1, "a": 2}', "it")
    with pytest.raises(InputError, match="it is not JSON"):
        files.parse_json("{", "it")
