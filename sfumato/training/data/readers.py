"""Files to records, one at a time: lines of JSON, JSON arrays, plain text, parquet and arrow, gzipped or not.

What a file is, its content says: the name counts only where the content leaves it open. No more than one record is in
memory. What is wrong with a line is an `Unreadable` in its place, so that the reader goes on and a caller can name all
of them.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from sfumato.errors import InputError, missing_extra

LONGEST = 16 << 20
"""Bytes of one line, or of one record of an array."""
SECTION = 64 << 10
"""Bytes of plain text that are one record: a text file is cut there, at the end of a paragraph or line."""
SUFFIXES = (".jsonl", ".ndjson", ".json", ".txt", ".text", ".md", ".parquet", ".arrow")
"""Names of files that are taken from a folder, with or without `.gz` behind them."""

_NOT_DATA = ("README.md", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What the libraries of data sets write beside the data."""
_TABLES = {".csv", ".tsv", ".xlsx"}
_CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"


class Section(NamedTuple):
    """A piece of a plain text file; `is_last`: the text ends with it."""

    text: str
    is_last: bool


class Unreadable(NamedTuple):
    """Why there is no record here."""

    reason: str


@dataclass(frozen=True)
class FileRecord:
    """One record of a file."""

    number: int
    """Of its line, from 1; in an array or a table, of the record."""
    value: Any
    """What JSON holds, a Section of plain text, or Unreadable."""
    content: bytes
    """What equal records have in common."""
    position: int
    """Bytes of the file that are read so far; 0 where that is not known."""
    unit: str = "line"
    """What the number counts: lines, or records."""


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The files of data at these paths, each a file or a folder of them; a folder's files are in the order of names.

    InputError where there is none."""
    if not paths:
        raise InputError("no data is named; give a file or a folder")
    files = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file() and _is_data(file, path))
            if not inside:
                raise InputError(
                    f"the folder {path} holds no data; files end with {', '.join(SUFFIXES)}, or .gz behind"
                )
            files += inside
        elif path.is_file():
            files.append(path)
        elif path.exists():
            raise InputError(f"{path} is no regular file; give a file or a folder")
        else:
            raise InputError(f"there is no {path}; give a file or a folder of data")
    return files


def _is_data(file: Path, folder: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not is_hidden and file.name not in _NOT_DATA and _suffix(file) in SUFFIXES


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read(path: Path) -> Iterator[FileRecord]:
    """The records of a file. InputError where it is of no kind that is read here, or cannot be read."""
    try:
        with path.open("rb", buffering=_CHUNK) as raw:
            start = raw.read(8)
            raw.seek(0)
            if (
                start[:4] == b"PAR1"
                or start[:6] == b"ARROW1"
                or (_suffix(path) == ".arrow" and start[:4] == b"\xff" * 4)
            ):
                yield from _tables(path, start)
            elif start[:2] == b"\x1f\x8b":
                with gzip.GzipFile(fileobj=raw) as packed:
                    yield from _texts(path, io.BufferedReader(packed, _CHUNK), raw)
            else:
                yield from _texts(path, raw, raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged: its gzip data cannot be read ({error}); copy it anew") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _texts(path: Path, file: Any, raw: IO[bytes]) -> Iterator[FileRecord]:
    """The records of a file of text. `raw` is where its bytes come from, whose position shows how far reading is."""
    start = file.peek(_CHUNK)[:_CHUNK]
    start = start.removeprefix(_BOM)
    first = start.lstrip()[:1]
    if b"\0" in start[:4096]:
        raise InputError(
            f"{path} is no text: it holds NUL bytes; read are JSON, plain text, parquet, each also with .gz"
        )
    if first == b"[" and not _is_line(start):
        yield from _array(file, raw)
    elif first in (b"{", b"[") or _suffix(path) in (".jsonl", ".ndjson", ".json"):
        yield from _lines(file, raw)
    elif _suffix(path) in _TABLES:
        raise InputError(f"{path} is a table; write it as JSON, one record a line, with the names that are read")
    else:
        yield from _sections(file, raw)


def _is_line(start: bytes) -> bool:
    """Whether what begins with a bracket is a line of its own, a list of messages, and not an array of records."""
    line, is_ended, rest = start.lstrip().partition(b"\n")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return bool(is_ended and rest.strip()) or _is_conversation(value)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _lines(file: Any, raw: IO[bytes]) -> Iterator[FileRecord]:
    """A record a line; empty lines are none."""
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            while line and not line.endswith(b"\n"):
                line = file.readline(LONGEST)
            why = f"the line is longer than {LONGEST >> 20} MiB, the limit; cut it into several"
            yield FileRecord(number, Unreadable(why), b"", raw.tell())
            continue
        line = line.removeprefix(_BOM).strip()
        if line:
            yield FileRecord(number, _value_of(line), line, raw.tell())


def _value_of(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Unreadable(f"byte {error.start} of the line ({line[error.start]:#04x}) is not UTF-8; convert the file")
    except RecursionError:
        return Unreadable("the JSON nests too deeply")
    except ValueError as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        return Unreadable(f"the line is not JSON ({reason}); give one record a line")


def _array(file: Any, raw: IO[bytes]) -> Iterator[FileRecord]:
    """The records of one JSON array, read piece by piece."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    decoder, number, size = json.JSONDecoder(), 0, _CHUNK
    is_over, reason = False, ""
    try:
        buffer, at = text.read(_CHUNK).lstrip(), 1
        while not reason:
            while at < len(buffer) and buffer[at] in " \t\r\n,":
                at += 1
            if at < len(buffer) and buffer[at] == "]":
                return
            with suppress(ValueError):
                value, end = decoder.raw_decode(buffer, at)
                if end < len(buffer) or is_over:  # else it may go on behind this piece
                    number += 1
                    yield FileRecord(
                        number, value, buffer[at:end].encode("utf-8", "surrogatepass"), raw.tell(), "record"
                    )
                    at, size = end, _CHUNK
                    continue
            if is_over:
                reason = "the record is not JSON, or the array does not end"
            elif len(buffer) - at > LONGEST:
                reason = f"the record is not JSON, or longer than {LONGEST >> 20} MiB, the limit"
            else:
                more = text.read(size)
                buffer, at, is_over, size = buffer[at:] + more, 0, not more, 2 * size
    except RecursionError:
        reason = "the JSON nests too deeply"
    except UnicodeDecodeError:
        reason = "the file is not UTF-8, in this record or behind it; convert it"
    finally:
        text.detach()
    yield FileRecord(number + 1, Unreadable(reason), b"", raw.tell(), "record")


def _sections(file: Any, raw: IO[bytes]) -> Iterator[FileRecord]:
    """A plain text in sections, each numbered by the line at which it begins."""
    number, rest, is_over = 1, b"", False
    while not is_over:
        piece = file.read(SECTION + _CHUNK - len(rest))
        is_over = not piece
        rest += piece
        while len(rest) > SECTION or (is_over and rest.strip()):
            end = _section_end(rest)
            data, rest = rest[:end], rest[end:]
            is_last = is_over and not rest.strip()
            yield FileRecord(number, _section(data, is_last), data.strip(), raw.tell())
            number += data.count(b"\n")
            if is_last:
                return


def _section_end(data: bytes) -> int:
    if len(data) <= SECTION:
        return len(data)
    for mark in (b"\n\n", b"\n", b" "):
        if (at := data.rfind(mark, SECTION // 2, SECTION)) >= 0:
            return at + len(mark)
    end = SECTION
    while end > SECTION - 4 and data[end] & 0xC0 == 0x80:  # within a character
        end -= 1
    return end


def _section(data: bytes, is_last: bool) -> Section | Unreadable:
    try:
        return Section(data.removeprefix(_BOM).decode(), is_last)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n")
        return Unreadable(f"{line} lines on, the byte {data[error.start]:#04x} is not UTF-8; convert the file")


def _tables(path: Path, start: bytes) -> Iterator[FileRecord]:
    """The rows of a parquet or arrow file. A field of a record that is null is left out, as tables have all of them."""
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise missing_extra(error.name, "data") from None
    number = 0
    try:
        with ExitStack() as opened:
            if start[:4] == b"PAR1":
                batches: Any = opened.enter_context(parquet.ParquetFile(path)).iter_batches(batch_size=256)
            elif start[:6] == b"ARROW1":
                table = opened.enter_context(ipc.open_file(str(path)))
                batches = (table.get_batch(index) for index in range(table.num_record_batches))
            else:
                batches = opened.enter_context(ipc.open_stream(opened.enter_context(pyarrow.OSFile(str(path)))))
            for row in (row for batch in batches for row in batch.to_pylist()):
                number += 1
                value = _without_nulls(row)
                content = json.dumps(value, sort_keys=True, default=str).encode()
                big = Unreadable(f"the record is longer than {LONGEST >> 20} MiB, the limit")
                yield FileRecord(number, value if len(content) <= LONGEST else big, content, 0, "record")
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as a table: {' '.join(str(error).split())[:200]}") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
