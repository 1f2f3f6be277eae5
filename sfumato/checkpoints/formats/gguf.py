"""GGUF, the container: typed metadata, a table of tensors, then their bytes. Which model is inside is `gguf_model`'s.

The file is hostile until checked. Every count and length is held against the bytes that are left before anything is
allocated, and the header as a whole against a bound of its own; tensors must lie inside the file, aligned, and may not
overlap. Files are read, not mapped: a mapped file changes under the reader when it is replaced.

It reads versions 2 and 3, little-endian. It lacks version 1, big-endian files and arrays of arrays, which nobody
writes. Files in several parts are `gguf_split`'s. Source: the GGUF specification (ggml, docs/gguf.md).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.checkpoints.formats.gguf_blocks import KINDS, NUMBERS, OTHERS
from sfumato.checkpoints.headers import MAX_GGUF_COUNT, MAX_GGUF_HEADER, MAX_GGUF_NAME
from sfumato.checkpoints.shards import read_into
from sfumato.errors import CheckpointError, InputError, SfumatoError
from sfumato.system.files import replacing

_STRING, _ARRAY = 8, 9
_NUMBERS = {
    number: np.dtype(form)
    for number, form in {
        **{0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4"},
        **{7: "?", 10: "<u8", 11: "<i8", 12: "<f8"},
    }.items()
}
"""GGUF's numeric types; 7 is a truth value in one byte."""
_BEGINNINGS = {
    **dict.fromkeys((b"lmgg", b"fmgg", b"tjgg", b"algg"), "it is a ggml file from before GGUF; get the model as GGUF"),
    b"vers": "it is no GGUF file but a Git LFS pointer to one; get the file itself, with git lfs pull",
    b"<!DO": "it is a web page and no GGUF file; take the address behind the page's download link",
}
"""What files that are named .gguf begin with otherwise."""


@dataclass(frozen=True)
class StoredBlocks:
    """A tensor as it lies in the file. `shape` has the slowest axis first, as ours do; GGUF writes it last."""

    name: str
    file: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        """The bytes of these places of the first axis, uint8 [.., bytes of a row].

        CheckpointError when the file has become shorter or cannot be read."""
        last = self.shape[0] if last is None else last
        if not 0 <= first <= last <= self.shape[0]:
            raise InputError(f"{self.name} has places 0 to {self.shape[0]}; {first} to {last} were asked for")
        each = self.nbytes // self.shape[0]
        raw = torch.empty((last - first) * each, dtype=torch.uint8)
        read_into(raw, self.file, self.start + first * each, self.name)
        if len(self.shape) == 1:  # blocks may not be cut, so a vector's kind is one value a block
            return raw
        return raw.view(last - first, *self.shape[1:-1], -1)


@dataclass(frozen=True)
class Header:
    """All of a file but the weights. Arrays of numbers are numpy's, arrays of strings are lists."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, StoredBlocks]


# ---- read -----------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> Header:
    """The metadata and the tensor table of a .gguf file; CheckpointError says in one sentence what is wrong with it."""
    try:
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}")
        size = path.stat().st_size
        with path.open("rb", buffering=1 << 18) as file:
            return _HeaderReader(path, file, size).header()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


class _HeaderReader:
    """A cursor over the header: nothing is taken that is not there."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.left = min(size, MAX_GGUF_HEADER)
        self.bound = (
            "the file" if size <= MAX_GGUF_HEADER else f"the {MAX_GGUF_HEADER >> 20} MiB that a header may have"
        )

    def wrong(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {why}")

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise self.wrong(f"{what} takes {count} bytes, but {self.left} are left of {self.bound}; it is damaged")
        self.left -= count
        data = self.file.read(count)
        if len(data) != count:
            raise self.wrong(f"it became shorter while {what} was read")
        return data

    def number(self, form: str, what: str) -> int:
        return int(struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))[0])

    def count(self, what: str, each: int, limit: int = MAX_GGUF_HEADER) -> int:
        """How many of something that takes at least `each` bytes."""
        count = self.number("Q", f"the number of {what}")
        if count > limit:
            raise self.wrong(f"it announces {count} {what}; at most {limit} are allowed")
        if count * each > self.left:
            raise self.wrong(
                f"it announces {count} {what}, but {self.left} bytes are left of {self.bound}; it is damaged"
            )
        return count

    def string(self, what: str, limit: int = MAX_GGUF_HEADER) -> str:
        length = self.number("Q", f"the length of {what}")
        if length > limit:
            raise self.wrong(f"{what} has {length} bytes; at most {limit} are allowed")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise self.wrong(f"{what} is not UTF-8 text") from None

    def header(self) -> Header:
        magic = self.take(4, "the magic") if self.size >= 24 else b""
        if magic != b"GGUF":
            raise self.wrong(_BEGINNINGS.get(magic, "it does not begin like a GGUF file"))
        version = self.number("I", "the version")
        if version not in (2, 3):
            big = " (big-endian; convert it on the machine it was made for)" if not version & 0xFFFF else ""
            raise self.wrong(f"its GGUF version is {version}{big}; versions 2 and 3 are read")
        tensors = self.count("tensors", 32, MAX_GGUF_COUNT)
        pairs = self.count("metadata entries", 13, MAX_GGUF_COUNT)
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.string("a metadata key", MAX_GGUF_NAME)
            if key in metadata:
                raise self.wrong(f"the metadata key {show(key)} is there twice")
            metadata[key] = self.value(self.number("I", "a metadata type"), key)
        table = [self.entry() for _ in range(tensors)]
        return Header(self.path, version, metadata, self.placed(table, metadata))

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(show(key))
        if kind in _NUMBERS:
            return self.numbers(kind, 1, key)[0].item()
        if kind != _ARRAY:
            raise self.wrong(f"{show(key)} has the unknown type {kind}")
        inner = self.number("I", show(key))
        if inner == _STRING:
            return self.strings(self.count(f"strings in {show(key)}", 8), key)
        if inner not in _NUMBERS:
            raise self.wrong(f"{show(key)} is an array of type {inner}; arrays hold numbers or strings")
        return self.numbers(inner, self.count(f"numbers in {show(key)}", _NUMBERS[inner].itemsize), key)

    def numbers(self, kind: int, count: int, key: str) -> NDArray[Any]:
        form = _NUMBERS[kind]
        data = self.take(count * form.itemsize, show(key))
        if form.kind == "b":  # a byte that is neither 0 nor 1 is no truth value to numpy
            flags: NDArray[Any] = np.frombuffer(data, np.uint8) != 0
            return flags
        return np.frombuffer(data, form)

    def strings(self, count: int, key: str) -> list[str]:
        """A vocabulary has hundreds of thousands of these, so the loop does nothing twice."""
        texts: list[str] = []
        read, left, unpack = self.file.read, self.left, struct.Struct("<Q").unpack
        try:
            for _ in range(count):
                (length,) = unpack(read(8))
                left -= 8 + length
                if left < 0:
                    raise self.wrong(f"a string in {show(key)} has {length} bytes, more than {self.bound} has left")
                texts.append(read(length).decode())
        except UnicodeDecodeError:
            raise self.wrong(f"string {len(texts)} in {show(key)} is not UTF-8 text") from None
        except struct.error:
            raise self.wrong(f"it ends inside {show(key)}") from None
        self.left = left
        return texts

    def entry(self) -> tuple[str, int, list[int], int]:
        """Name, kind, dimensions and offset of one tensor."""
        name = self.string("a tensor's name", MAX_GGUF_NAME)
        axes = self.number("I", show(name))
        if not 1 <= axes <= 4:
            raise self.wrong(f"{show(name)} has {axes} axes; tensors have 1 to 4")
        form = struct.Struct(f"<{axes}QIQ")
        *sizes, kind, start = form.unpack(self.take(form.size, show(name)))
        return name, kind, sizes, start

    def placed(
        self, table: list[tuple[str, int, list[int], int]], metadata: Mapping[str, Any]
    ) -> dict[str, StoredBlocks]:
        """The tensors, each inside the file and apart from the others."""
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment not in (1 << bit for bit in range(17)):
            raise self.wrong(f"general.alignment is {show(alignment)}; it must be a power of two up to 65536")
        begin = -(-self.file.tell() // alignment) * alignment
        tensors: dict[str, StoredBlocks] = {}
        for name, number, sizes, offset in table:
            if number not in KINDS:
                raise self.wrong(
                    f"{show(name)} is stored as {OTHERS.get(number, number)}; "
                    f"{', '.join(kind.name for kind in KINDS.values())} are read, quantise it to one of these"
                )
            kind = KINDS[number]
            values = math.prod(sizes)
            if not values or sizes[0] % kind.values or (len(sizes) == 1 and kind.values > 1):
                raise self.wrong(
                    f"{show(name)} has the shape {sizes[::-1]}; {kind.name} takes rows of a multiple of {kind.values}"
                )
            nbytes = values // kind.values * kind.nbytes
            if offset % alignment:
                raise self.wrong(f"{show(name)} begins at {offset}, which is no multiple of the alignment {alignment}")
            if begin + offset + nbytes > self.size:
                raise self.wrong(
                    f"{show(name)} ends at byte {begin + offset + nbytes}, but the file has {self.size}; "
                    "it is truncated, get it again"
                )
            if name in tensors:
                raise self.wrong(f"the tensor {show(name)} is there twice")
            tensors[name] = StoredBlocks(name, self.path, kind.name, tuple(sizes[::-1]), begin + offset, nbytes)
        end, before = begin, ""
        for stored in sorted(tensors.values(), key=lambda one: one.start):
            if stored.start < end:
                raise self.wrong(f"{show(stored.name)} overlaps {show(before)}")
            end, before = stored.start + stored.nbytes, stored.name
        return tensors


# ---- write ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedBlocks:
    """A tensor that is to be written; `parts` gives uint8 tensors whose bytes joined are its own."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without what aligns the next one."""
        kind = KINDS[NUMBERS[self.kind]]
        return math.prod(self.shape) // kind.values * kind.nbytes


def write_file(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[PlannedBlocks],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a GGUF file, version 3, part by part; beside its place first, then renamed.

    Metadata is typed by its values: int as uint32, float as float32, lists by their first element (ints as int32),
    numpy arrays as they are; empty lists are left out. `progress(done, all)` counts bytes. SfumatoError when the disk
    refuses."""
    alignment = int(metadata.get("general.alignment", 32))
    known = {key: value for key, value in metadata.items() if not isinstance(value, list) or value}
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(known)))
    for key, value in known.items():
        head += _text(key) + _typed(value)
    offset = 0
    for tensor in tensors:
        sizes = tensor.shape[::-1]
        head += _text(tensor.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        head += struct.pack("<IQ", NUMBERS[tensor.kind], offset)
        offset += tensor.nbytes + -tensor.nbytes % alignment
    done, total = 0, sum(tensor.nbytes for tensor in tensors)
    try:
        with replacing(path) as file:
            file.write(head + bytes(-len(head) % alignment))
            for tensor in tensors:
                written = 0
                for part in tensor.parts():
                    written += file.write(part.reshape(-1).numpy().data)
                    if progress:
                        progress(done + written, total)
                if written != tensor.nbytes:
                    raise InputError(f"{tensor.name} takes {tensor.nbytes} bytes; {written} were given")
                file.write(bytes(-written % alignment))
                done += written
    except OSError as error:
        raise SfumatoError(f"cannot write {path}: {error.strerror or error}") from error


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: Any) -> bytes:
    """A value behind its type."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list) and isinstance(value[0], str):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    forms = {bool: "?", int: "<i4", float: "<f4"}
    if isinstance(value, list):
        value = np.array(value, forms[type(value[0])])
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", _ARRAY, _numbered(value.dtype), len(value)) + value.tobytes()
    one = np.array(value, {**forms, int: "<u4"}[type(value)])
    return struct.pack("<I", _numbered(one.dtype)) + one.tobytes()


def _numbered(form: np.dtype[Any]) -> int:
    return next(number for number, known in _NUMBERS.items() if known == form)


def show(value: object) -> str:
    """A value as an error quotes it: short, on one line, whatever the file holds."""
    text = repr(value) if not isinstance(value, (list, np.ndarray)) else f"an array of {len(value)}"
    return text if len(text) <= 100 else text[:99] + "…"
