"""A terminal for tests: a screen that knows what rich, readline and prompt_toolkit write, and programs behind a pty.

The screen counts a character's cells as Unicode's tables do, so that what is laid out wrongly stands wrongly.
"""

from __future__ import annotations

import codecs
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rich.cells import get_character_cell_size

ROOT = Path(__file__).parents[1]
_SEQUENCE = re.compile(r"\x1b\[([?>]?)([0-9;]*)([A-Za-z@])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[=>78M]")


class Screen:
    """The rows of a terminal, and those that have left it at its top."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.cells = [[" "] * columns for _ in range(rows)]
        self.styles = [[""] * columns for _ in range(rows)]
        """The codes behind each cell's colours."""
        self._style = ""
        self.gone: list[str] = []
        self.row = self.column = 0
        self.wraps = self.shows_cursor = True
        self.is_pasting_announced = False
        self._rest = ""

    @property
    def text(self) -> str:
        """Everything, from the first row that has left, without spaces and empty rows at the ends."""
        return "\n".join([*self.gone, *("".join(row).rstrip() for row in self.cells)]).rstrip()

    @property
    def ansi(self) -> str:
        """The rows that are on the screen, with their colours."""
        rows = zip(self.cells, self.styles, strict=True)
        drawn = ["".join(f"\x1b[0{style}m{cell}" for cell, style in zip(*row, strict=True)) for row in rows]
        return "\n".join(drawn) + "\x1b[0m"

    def write(self, text: str) -> None:
        text, at = self._rest + text, 0
        self._rest = ""
        while at < len(text):
            if text[at] == "\x1b":
                match = _SEQUENCE.match(text, at)
                if match is None:
                    if len(text) - at < 40:  # the rest is still to come
                        self._rest = text[at:]
                        return
                    raise AssertionError(f"an unknown sequence: {text[at : at + 20]!r}")
                if match[3]:
                    self._obey(match[1], match[2], match[3])
                at = match.end()
            else:
                self._put(text[at])
                at += 1

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self._feed()
        elif character == "\t":
            self.column = min(self.columns - 1, self.column // 8 * 8 + 8)
        elif character == "\b":
            self.column = max(0, self.column - 1)
        elif character != "\x07":
            assert character.isprintable() or character in "\u200d\u200b\xad", repr(character)
            wide = get_character_cell_size(character)
            if not wide:
                return
            if self.column + wide > self.columns:
                if self.wraps:
                    self.column = 0
                    self._feed()
                else:
                    self.column = self.columns - wide
            self.cells[self.row][self.column : self.column + wide] = [character, ""][:wide]
            self.styles[self.row][self.column : self.column + wide] = [self._style] * wide
            self.column += wide

    def _feed(self) -> None:
        self.row += 1
        if self.row == self.rows:
            self.row -= 1
            self.gone.append("".join(self.cells.pop(0)).rstrip())
            self.cells.append([" "] * self.columns)
            self.styles.append(self.styles.pop(0))
            self.styles[-1] = [""] * self.columns

    def _obey(self, mark: str, numbers: str, letter: str) -> None:
        values = [int(number or 0) for number in numbers.split(";")] if numbers else []
        count = max(1, values[0]) if values else 1
        if mark == "?":
            if values == [7]:
                self.wraps = letter == "h"
            elif values == [25]:
                self.shows_cursor = letter == "h"
        elif letter == "m":
            self._style = "" if numbers in ("", "0") else f"{self._style};{numbers}"
        elif letter in "AB":
            self.row = min(self.rows - 1, max(0, self.row + (count if letter == "B" else -count)))
        elif letter in "CD":
            self.column = min(self.columns - 1, max(0, self.column + (count if letter == "C" else -count)))
        elif letter == "G":
            self.column = count - 1
        elif letter == "H":
            self.row, self.column = (value - 1 for value in [*values, 1, 1][:2])
        elif letter in "KJ":
            self._erase(letter, values[0] if values else 0)
        elif letter in "P@":
            row, blanks = self.cells[self.row], [" "] * count
            rest = row[self.column + count :] + blanks if letter == "P" else blanks + row[self.column :]
            self.cells[self.row] = (row[: self.column] + rest)[: self.columns]

    def _erase(self, letter: str, kind: int) -> None:
        row = self.cells[self.row]
        start = 0 if kind else self.column
        stop = self.column + 1 if kind == 1 else self.columns
        row[start:stop] = [" "] * (stop - start)
        if letter == "J":
            rows = range(self.row + 1, self.rows) if kind == 0 else range(self.rows)
            for number in rows:
                self.cells[number] = [" "] * self.columns


class Terminal:
    """A program behind a pty, and the screen that it writes on."""

    def __init__(
        self,
        command: Sequence[str],
        columns: int = 80,
        rows: int = 24,
        environment: Mapping[str, str | None] | None = None,
    ) -> None:
        import pty
        import termios

        self.screen, self.raw = Screen(columns, rows), ""
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (rows, columns))
        values = {
            "TERM": "xterm-256color",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "PROMPT_TOOLKIT_NO_CPR": "1",
        }
        values = {**os.environ, **values}
        for name, value in {"COLUMNS": None, "LINES": None, "NO_COLOR": None, **(environment or {})}.items():
            if value is None:
                values.pop(name, None)
            else:
                values[name] = value
        encoding = (values.get("PYTHONIOENCODING") or "utf-8").partition(":")[0]
        self._decoder = codecs.getincrementaldecoder(encoding)("strict")
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=values,
            cwd=ROOT / "tests",
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, words: str, seconds: float = 20.0, gone: str = "\0") -> str:
        """Read until the words are on the screen, and others are `gone`; returns all that is on it."""
        end = time.monotonic() + seconds
        while words not in self.screen.text or gone in self.screen.text:
            left = end - time.monotonic()
            assert left > 0 and self._read(left), f"no {words!r} on the screen:\n{self.screen.text}"
        return self.screen.text

    def until_ready(self, prompt: str = "›") -> str:
        """Read until the last thing on the screen is an empty prompt."""
        end = time.monotonic() + 20
        while not self.screen.text.endswith(f"\n{prompt}"):
            left = end - time.monotonic()
            assert left > 0 and self._read(left), f"no prompt on the screen:\n{self.screen.text}"
        return self.screen.text

    def until_written(self, code: str, times: int = 1, seconds: float = 20.0) -> None:
        """Read until the program has written this so often, seen or not."""
        end = time.monotonic() + seconds
        while self.raw.count(code) < times:
            left = end - time.monotonic()
            assert left > 0 and self._read(left), f"no {code!r} was written:\n{self.screen.text}"

    def code(self, seconds: float = 20.0) -> int:
        """Read to the end; returns the exit code."""
        end = time.monotonic() + seconds
        while self._read(end - time.monotonic()):
            assert time.monotonic() < end, f"it does not end:\n{self.screen.text}"
        return self.process.wait(5)

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._master)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, seconds: float) -> bool:
        """Take in what comes next; False at the end, or where nothing comes in this time."""
        if not select.select([self._master], [], [], max(0.0, seconds))[0]:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # how Linux says that the program is gone
            return False
        text = self._decoder.decode(data)
        self.raw += text
        self.screen.write(text)
        return bool(data)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
