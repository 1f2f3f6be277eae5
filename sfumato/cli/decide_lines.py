"""Many texts or requests to decide: JSON lines in, a line of answers out for each, in their order.

A few dozen are under way at a time, so that they share passes. A line that cannot be answered says why and the rest go
on; a file of answers can be gone on with behind its last whole line.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from sfumato.cli import files
from sfumato.cli.output import put
from sfumato.errors import InputError, SfumatoError
from sfumato.events import Decisions
from sfumato.templates.interface import LanguageModel
from sfumato.templates.patience import run_patiently
from sfumato.templates.requests import Decide

AT_ONCE = 32
"""Requests under way."""
AT_ONCE_ELSEWHERE = 8
"""The same at a server that is not Sfumato's, and may hold no more connections."""
ANSWERS = (b'{"line": ', b'{"model": ', b'{"detail": ')
"""What lines of answers begin with."""


@dataclass(frozen=True)
class LineRequest:
    """One line's request, or why it is none."""

    number: int
    """Of its line, from 1."""
    query: Decide | InputError
    line: Callable[[Decisions | InputError], dict[str, Any]]
    """The record that answers it."""

    @classmethod
    def of(
        cls,
        number: int,
        value: Any,
        query: Callable[[Any], Decide],
        line: Callable[[Decisions | InputError], dict[str, Any]],
    ) -> LineRequest:
        """The item of a line's value, of which `query` makes the request; InputError is kept for its answer."""
        try:
            return cls(number, value if isinstance(value, InputError) else query(value), line)
        except InputError as error:
            return cls(number, error, line)


@dataclass(frozen=True)
class LineFile:
    """A file of answers, of which the first lines may be there already."""

    path: Path
    lines: int = 0


def open_lines(name: str, force: bool, resume: bool, sources: Sequence[str] = ()) -> LineFile:
    """The file of this name. InputError where it is there, and neither to be replaced nor gone on with.

    `sources` are the files that are read; none of them is written."""
    path = Path(name).expanduser()
    files.check_not_read([path], sources)
    if not resume or not path.exists():
        files.new_path(name, force)
        return LineFile(path)
    if force:
        raise InputError("--resume and --force are given; give one of them")
    if not path.is_file():
        raise InputError(f"{path} is not a regular file, so there are no lines to go on behind; give another name")
    lines, whole = 0, 0
    with path.open("rb") as file:
        for line in file:
            is_whole = line.endswith(b"\n")
            if not any(line.startswith(one) or (not is_whole and one.startswith(line)) for one in ANSWERS):
                raise InputError(f"line {lines + 1} of {path} is no answer; give the file that this command wrote")
            if not is_whole:
                break
            lines, whole = lines + 1, whole + len(line)
    os.truncate(path, whole)  # a line that was cut off is answered again
    return LineFile(path, lines)


def json_lines(name: str) -> Iterator[tuple[int, Any]]:
    """The values of a file's lines that are not blank, with the lines' numbers; InputError for one that holds none.

    "-" is standard input. InputError is raised where the file cannot be read."""
    where = "standard input" if name == "-" else name
    try:
        with _standard_input() if name == "-" else open(name, "rb") as file:
            for number, line in enumerate(_lines(file), 1):
                try:
                    text = files.decode(line, f"line {number} of {where}").removeprefix(files.BOM)
                    if text.strip():
                        yield number, files.parse_json(text, f"line {number} of {where}")
                except InputError as error:
                    yield number, error
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}; give JSON lines, or - for standard input") from None


def _standard_input() -> AbstractContextManager[IO[bytes]]:
    """Standard input under a buffer of its own, as Python's cannot be closed while another thread waits for a line."""
    try:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except (OSError, ValueError):  # none of the system's
        return nullcontext(sys.stdin.buffer)


def read_requests(name: str) -> dict[str, Any] | Iterable[tuple[int, Any]]:
    """The one request of a file, or the requests of a JSON array or of JSON lines, numbered from 1.

    InputError where it holds neither."""
    if name.lower().endswith((".jsonl", ".ndjson")):
        return json_lines(name)
    text = files.read(name).removeprefix(files.BOM)
    try:
        value = files.parse_json(text, name)
    except InputError:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        if len(lines) < 2 or not lines[0][1].rstrip().endswith("}"):
            raise
        return [(number, _value(line, f"line {number} of {name}")) for number, line in lines]
    if isinstance(value, list) and value:
        return [*enumerate(value, 1)]
    if not isinstance(value, dict):
        raise InputError(f"{name} holds no request; give an object with state and questions, or several, one a line")
    return value


def _value(text: str, name: str) -> Any:
    try:
        return files.parse_json(text, name)
    except InputError as error:
        return error


def count_lines(name: str) -> int | None:
    """How many lines a file has that are not blank; None for what is no file that can be read twice.

    InputError where it cannot be read."""
    if name == "-" or (os.path.exists(name) and not os.path.isfile(name)):
        return None
    try:
        with open(name, "rb") as file:
            return sum(bool(line.strip()) for line in file)
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}; give JSON lines, or - for standard input") from None


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file; of one that is too long as much as shows that."""
    while line := file.readline(files.LIMIT + 1):
        rest = line
        while len(rest) > files.LIMIT and not rest.endswith(b"\n"):
            rest = file.readline(files.LIMIT + 1)
        yield line


def answer_lines(llm: LanguageModel, items: Iterable[LineRequest], target: LineFile | None, total: int | None) -> None:
    """Answer each item on a line of the file, or of standard output; SfumatoError at the end where some have no answer.

    Those whose lines the file holds are passed over."""
    done = 0 if target is None else target.lines
    rest = islice(items, done, None)
    screen = Console(stderr=True, highlight=False)
    is_shown = screen.is_terminal and (target is not None or not sys.stdout.isatty())
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        nullcontext() if target is None else target.path.open("ab" if done else "wb") as file,
        Progress(*columns, console=screen, disable=not is_shown, transient=True) as bar,
    ):
        task = bar.add_task("", total=total, completed=done)
        faults: list[tuple[int, InputError]] = []

        def write(item: LineRequest, outcome: Decisions | InputError) -> None:
            if isinstance(outcome, InputError):
                faults.append((item.number, outcome))
            _put(item.line(outcome), file)
            bar.advance(task)

        asyncio.run(_answer(llm, rest, write))
        count = bar.tasks[0].completed
    if faults:
        number, error = faults[0]
        what = str(error) if str(error).startswith(f"line {number} of ") else f"line {number}: {error}"
        raise SfumatoError(f"{len(faults)} of {count:.0f} lines have no answer; the first is {what}")


async def _answer(
    llm: LanguageModel, items: Iterable[LineRequest], write: Callable[[LineRequest, Decisions | InputError], None]
) -> None:
    """Answer items as they come, several at a time; answers are written in their order, each as soon as it can be."""
    waiting: deque[tuple[LineRequest, asyncio.Task[Decisions | InputError]]] = deque()
    is_elsewhere = llm.is_remote and not getattr(llm, "is_sfumato", True)
    feed = _Feed(items, AT_ONCE_ELSEWHERE if is_elsewhere else AT_ONCE)
    coming: asyncio.Task[LineRequest | None] | None = asyncio.create_task(feed.get())
    try:
        while coming is not None or waiting:
            heads = ([] if coming is None else [coming]) + [task for _, task in [*waiting][:1]]
            await asyncio.wait(heads, return_when=asyncio.FIRST_COMPLETED)
            while waiting and waiting[0][1].done():
                item, task = waiting.popleft()
                feed.room.release()
                write(item, task.result())
            if coming is not None and coming.done():
                following = coming.result()
                if following is not None:
                    waiting.append((following, asyncio.create_task(_outcome(llm, following.query))))
                coming = None if following is None else asyncio.create_task(feed.get())
    finally:
        feed.stop()
        tasks = [task for _, task in waiting] + ([] if coming is None else [coming])
        for one in tasks:
            one.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Feed:
    """Items that another thread reads, which may wait for whoever writes them; no more than there is room for."""

    def __init__(self, items: Iterable[LineRequest], most: int) -> None:
        self.room = threading.Semaphore(most)
        self._is_over = False
        self._queue: asyncio.Queue[LineRequest | Exception | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(items,), daemon=True).start()

    async def get(self) -> LineRequest | None:
        """The next item; None behind the last. What went wrong with reading is raised."""
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def stop(self) -> None:
        """Read no more."""
        self._is_over = True
        self.room.release()

    def _read(self, items: Iterable[LineRequest]) -> None:
        with suppress(RuntimeError):  # the loop has closed, so that nobody waits
            try:
                for item in items:
                    self.room.acquire()
                    if self._is_over:
                        return
                    self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
                self._loop.call_soon_threadsafe(self._queue.put_nowait, None)
            except Exception as error:  # it is raised where the items are taken
                self._loop.call_soon_threadsafe(self._queue.put_nowait, error)


async def _outcome(llm: LanguageModel, query: Decide | InputError) -> Decisions | InputError:
    """The decisions, or what is wrong with this one request; any other error is raised."""
    if isinstance(query, InputError):
        return query
    try:
        return await run_patiently(llm, query)
    except InputError as error:
        return error


def write_line(record: dict[str, Any], target: LineFile | None) -> None:
    """Write one record as a line of the file, or of standard output."""
    with nullcontext() if target is None else target.path.open("ab" if target.lines else "wb") as file:
        _put(record, file)


def _put(record: dict[str, Any], file: IO[bytes] | None) -> None:
    line = json.dumps(record, ensure_ascii=False) + "\n"
    if file is None:
        put(line)
    else:
        file.write(line.encode("utf-8", "backslashreplace"))  # \ud800 in the JSON of a name, say
        file.flush()
