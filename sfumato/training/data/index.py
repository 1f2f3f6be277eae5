"""The examples of a set of files as token ids on disk: written once, read in place at every step.

Reading, rendering and tokenising happen in one pass before training; what a step needs is then a few slices of a
mapped file, so that a set of any size takes no memory and no time of the loop. The index lies in the user's cache,
under a name made of all that its tokens depend on: the files, the tokenizer, the template, the limit of length.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from sfumato.errors import InputError, SfumatoError
from sfumato.system.files import locked
from sfumato.training.data.examples import Example, ExampleMaker, LeftOut
from sfumato.training.data.readers import FileRecord, Section, Unreadable, read
from sfumato.training.data.records import LearnedDialogue, LearnedText, read_record

ReadingProgress = Callable[[int, int], None]
"""Called with the bytes that are read so far, and all of them."""

ENTRY = np.dtype(
    [
        ("start", "<u8"),  # in the file of tokens
        ("count", "<u4"),
        ("prompt", "<u4"),
        ("file", "<u4"),
        ("line", "<u8"),
        ("content", "<u8"),  # equal for equal records
        ("is_cut", "?"),
    ]
)
MOST_FAULTS = 20
"""Bad records that are named before reading ends."""

_VERSION = b"2"
"""Of what is written here and of the rules that make examples."""
_ENTRIES, _TOKENS, _NOTE = "entries.bin", "tokens.bin", "note.json"
_HELD = 1 << 12  # entries that are held before they are written
_TOGETHER, _BYTES_TOGETHER = 32, 1 << 18  # records, and their bytes, that are rendered together
_TURNS_TOGETHER = 8  # a conversation with more answers is rendered answer by answer, up to the limit of length


@dataclass(frozen=True)
class TokenIndex:
    """Examples on disk: `entries` [N] of ENTRY and `tokens` [all tokens], both mapped; `note` is what was counted."""

    files: tuple[Path, ...]
    entries: np.ndarray[Any, Any]
    tokens: np.ndarray[Any, Any]
    note: dict[str, Any]

    def example(self, row: int) -> Example:
        """The example of this number."""
        entry = self.entries[row]
        start, count = int(entry["start"]), int(entry["count"])
        return Example(self.tokens[start : start + count].tolist(), int(entry["prompt"]), bool(entry["is_cut"]))

    def place(self, row: int) -> str:
        """Where the example of this number comes from: its file and its line."""
        entry = self.entries[row]
        return f"{self.files[int(entry['file'])].name}, {self.note['units'][int(entry['file'])]} {int(entry['line'])}"


def open_index(files: Sequence[Path], maker: ExampleMaker, progress: ReadingProgress | None = None) -> TokenIndex:
    """The index of these files: the one in the cache, or a new one.

    InputError where there are no examples, and for bad records, of which it names the first ones by number;
    SfumatoError where the cache cannot be written."""
    hashes = [_hash_of(file) for file in files]
    base = _cache()
    folder = base / _key(files, hashes, maker)
    try:
        base.mkdir(parents=True, exist_ok=True)
        with locked(folder, wait=True):
            if not (folder / _NOTE).is_file():
                _build(files, hashes, maker, folder, progress)
            note = json.loads((folder / _NOTE).read_text())
    except OSError as error:
        raise SfumatoError(
            f"the tokens of the data cannot be kept in {base}: {error.strerror or error}; make room there, or name a "
            "folder that can be written in XDG_CACHE_HOME"
        ) from error
    entries = np.memmap(folder / _ENTRIES, ENTRY, "r")
    return TokenIndex(tuple(files), entries, np.memmap(folder / _TOKENS, "<u4", "r"), note)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sfumato" / "data"


def _hash_of(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from None


def _key(files: Sequence[Path], hashes: Sequence[str], maker: ExampleMaker) -> str:
    template = maker.template
    parts = [_VERSION, maker.tokenizer.to_json().encode(), json.dumps(maker.tokenizer.special, sort_keys=True).encode()]
    parts += [f"{maker.limit.tokens} {maker.limit.long}".encode()]
    parts += [b"" if template is None else json.dumps([template.source, template.special], sort_keys=True).encode()]
    # A name counts only where it tells text from JSON.
    parts += [f"{sha} {''.join(file.suffixes[-2:])}".encode() for file, sha in zip(files, hashes, strict=True)]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]


def _build(
    files: Sequence[Path], hashes: Sequence[str], maker: ExampleMaker, folder: Path, progress: ReadingProgress | None
) -> None:
    """Write the index beside its place, then rename."""
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
    try:
        beside.mkdir()
        with (beside / _ENTRIES).open("wb") as entries, (beside / _TOKENS).open("wb") as tokens:
            writer = _IndexWriter(files, maker, entries, tokens)
            writer.write(progress)
        digest = hashlib.sha256("".join(hashes).encode()).hexdigest()
        note = {"hash": digest, "units": writer.units, "records": writer.records, "left_out": writer.left_out}
        note |= {"left_out_at": writer.left_out_at, "max_tokens": maker.limit.tokens, "long": maker.limit.long}
        (beside / _NOTE).write_text(json.dumps(note))
        shutil.rmtree(folder, ignore_errors=True)  # of a user who has removed some of it
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _meaning(value: Any) -> LearnedDialogue | LearnedText:
    """What is learned from what a reader has read."""
    if isinstance(value, Unreadable):
        raise InputError(value.reason)
    return LearnedText(value.text, value.is_last) if isinstance(value, Section) else read_record(value)


class _IndexWriter:
    """One pass over the files."""

    def __init__(self, files: Sequence[Path], maker: ExampleMaker, entries: IO[bytes], tokens: IO[bytes]) -> None:
        self.files, self.maker, self.entries, self.tokens = files, maker, entries, tokens
        self.units = ["line"] * len(files)
        self.records = 0
        self.left_out: dict[str, int] = {}
        """How many examples were left out, by reason."""
        self.left_out_at: list[str] = []
        """The places of the first records of which something was left out."""
        self._faults: list[tuple[int, FileRecord, str]] = []
        self._waiting: list[tuple[int, FileRecord, LearnedDialogue | LearnedText]] = []
        self._held: list[tuple[int, ...]] = []
        self._start = 0

    def write(self, progress: ReadingProgress | None) -> None:
        """Write all entries and tokens; InputError for bad records and where nothing is left."""
        sizes = [file.stat().st_size for file in self.files]
        for number, file in enumerate(self.files):
            for record in read(file):
                self.units[number] = record.unit
                self._take(number, record)
                if progress is not None:
                    progress(sum(sizes[:number]) + record.position, sum(sizes))
                if len(self._faults) >= MOST_FAULTS:
                    break
        self._write_waiting()
        if self._faults:
            raise self._refusal()
        self._flush()
        if not self._start:
            raise InputError(self._why_empty())
        if progress is not None:
            progress(sum(sizes), sum(sizes))

    def _take(self, number: int, record: FileRecord) -> None:
        """Read a record; a few wait for each other, as many are rendered in less time together."""
        self.records += 1
        try:
            value = _meaning(record.value)
        except InputError as error:
            self._faults.append((number, record, str(error)))
            return
        is_alone = isinstance(value, LearnedDialogue) and len(value.learned) > _TURNS_TOGETHER
        if is_alone:
            self._write_waiting()
        self._waiting.append((number, record, value))
        size = sum(len(one.content) for _, one, _ in self._waiting)
        if is_alone or len(self._waiting) >= _TOGETHER or size >= _BYTES_TOGETHER:
            self._write_waiting()

    def _write_waiting(self) -> None:
        """Write the examples of the records that wait."""
        several = len(self._waiting) > 1
        together = self.maker.examples_of_many([value for *_, value in self._waiting]) if several else None
        for at, (number, record, value) in enumerate(self._waiting):
            try:
                self._write(number, record, self.maker.examples(value) if together is None else together[at])
            except InputError as error:
                self._faults.append((number, record, str(error)))
        self._waiting.clear()

    def _write(self, number: int, record: FileRecord, examples: Iterable[Example | LeftOut]) -> None:
        content = int.from_bytes(hashlib.blake2b(record.content, digest_size=8).digest(), "little")
        for example in examples:
            if isinstance(example, LeftOut):
                self.left_out[example.reason] = self.left_out.get(example.reason, 0) + 1
                place = f"{self.files[number].name}, {record.unit} {record.number}"
                if len(self.left_out_at) < MOST_FAULTS and place not in self.left_out_at:
                    self.left_out_at.append(place)
                continue
            self.tokens.write(np.array(example.tokens, "<u4").tobytes())
            count = len(example.tokens)
            self._held.append((self._start, count, example.prompt, number, record.number, content, example.is_cut))
            self._start += count
        if len(self._held) >= _HELD:
            self._flush()

    def _flush(self) -> None:
        self.entries.write(np.array(self._held, ENTRY).tobytes())
        self._held.clear()

    def _refusal(self) -> InputError:
        (file, record, reason), *others = sorted(self._faults, key=lambda fault: (fault[0], fault[1].number))
        sentence = f"{self.files[file]}, {record.unit} {record.number}: {reason}"
        if others:
            several = len(self.files) > 1
            places = [f"{self.files[n].name}:{one.number}" if several else str(one.number) for n, one, _ in others]
            more = ", and perhaps more" if len(self._faults) >= MOST_FAULTS else ""
            sentence += f" (refused as well: {', '.join(places)}{more})"
        return InputError(sentence)

    def _why_empty(self) -> str:
        names = ", ".join(str(file) for file in self.files[:3]) + (" …" if len(self.files) > 3 else "")
        if not self.records:
            return f"{names} holds no records; give at least one example"
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        limit = self.maker.limit.tokens
        return (
            f"of {self.records} records in {names} no example is left ({reasons}; the limit is {limit} tokens); "
            "raise --max-tokens"
        )
