"""What a file of weights may announce, and the header of a safetensors file, checked before anything is believed.

Sizes come first: a file whose header is too large, or announces bytes that are not there, is refused without being read
or mapped, however large it says it is. The library's own check maps the whole file, which is a bare MemoryError where
that has no place, and takes half a minute over a million tensors.

Format: 8 bytes of length, so many of JSON, then the tensors' bytes one behind the other without a gap.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from sfumato.errors import CheckpointError

MAX_HEADER = 32 << 20
"""Bytes of the header of one safetensors file. The release's, of 1,047 tensors, have 14 KB each; one with every expert
apart, in four parts each, has 8 MB."""
MAX_TENSORS = 1 << 17
"""Tensors of a checkpoint, and of one safetensors file."""
MAX_INDEX = 16 << 20
"""Bytes of an index; that of a checkpoint with every expert apart has 5 MB."""
MAX_FILES = 4096
"""Files that an index may name."""
MAX_AXES = 8
"""Axes of a tensor."""
MAX_VALUES = 1 << 60
"""Values of a tensor. An empty one may have more by its other axes, and torch cannot."""
MAX_GGUF_HEADER = 64 << 20
"""Bytes of a GGUF file's metadata and tensor table. Gemma 4's, with its vocabulary, are 16 MB."""
MAX_GGUF_COUNT = 1 << 16
"""Tensors, and metadata entries; the release has 692 and about 50."""
MAX_GGUF_NAME = 256
"""Bytes of a key or a tensor's name; ggml's own limit for tensors is 64."""

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""A value's bits in each dtype that the format has."""


class HeaderEntry(NamedTuple):
    """What a header says of a tensor; `first` and `last` count from the first byte behind the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


class SafetensorsHeader(NamedTuple):
    """The header of a file."""

    begin: int
    """Where the tensors' bytes begin in the file."""
    entries: list[HeaderEntry]
    metadata: dict[str, str]


def read_header(path: Path) -> SafetensorsHeader:
    """The header of a safetensors file, which accounts for every byte of it.

    ValueError says what is wrong with it, OSError that it cannot be read."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = file.seek(0, 2)
        if size < 8 or length > size - 8:
            raise ValueError(f"its header has {length} bytes, the file {size}")
        if length > MAX_HEADER:
            raise ValueError(f"its header has {length} bytes; at most {MAX_HEADER >> 20} MiB are allowed")
        file.seek(8)
        text = file.read(length)
    if text.count(b"{") > MAX_TENSORS + 2:  # one a tensor; to read half a million of them takes seconds
        raise ValueError(f"it announces more than the {MAX_TENSORS} tensors allowed")
    table = json.loads(text)
    if not isinstance(table, dict):
        raise ValueError("its header is no JSON object")
    metadata = table.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not all texts")
    entries = [_entry(name, raw) for name, raw in table.items()]
    _check_places(entries, size - 8 - length)
    return SafetensorsHeader(8 + length, entries, metadata)


def _entry(name: str, raw: Any) -> HeaderEntry:
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"what it says of {name[:80]} is no dtype, shape and pair of offsets")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, *offsets)):
        raise ValueError(f"{name[:80]} has a shape or offsets that are no whole numbers from 0 up")
    if len(shape) > MAX_AXES or math.prod(axis or 1 for axis in shape) >= MAX_VALUES:
        raise ValueError(f"{name[:80]} has a shape too large to exist")
    bits, nbytes = BITS.get(dtype, 0) * math.prod(shape), offsets[1] - offsets[0]
    if dtype in BITS and bits != 8 * nbytes:
        raise ValueError(f"{name[:80]} has {nbytes} bytes, and its shape in {dtype} needs {bits / 8:g}")
    return HeaderEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _check_places(entries: list[HeaderEntry], size: int) -> None:
    """ValueError where tensors overlap, leave a gap, or do not end where the file does."""
    end = 0
    for entry in sorted(entries, key=lambda one: (one.first, one.last)):
        if entry.first != end or entry.last < entry.first:
            raise ValueError(
                f"{entry.name[:80]} lies at {entry.first} to {entry.last}, and the one before ends at {end}"
            )
        end = entry.last
    if end != size:
        raise ValueError(f"its tensors have {end} bytes, and {size} lie behind the header")


def check_index_size(path: Path) -> None:
    """CheckpointError where an index is too large to be one, before it is read."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if size > MAX_INDEX:
        raise CheckpointError(f"{path} has {size} bytes; at most {MAX_INDEX >> 20} MiB are allowed of an index")


def check_index(path: Path, tensors: int, files: int) -> None:
    """CheckpointError where an index names more tensors or files than a checkpoint may have."""
    if tensors > MAX_TENSORS or files > MAX_FILES:
        raise CheckpointError(
            f"{path} names {tensors} tensors in {files} files; at most {MAX_TENSORS} in {MAX_FILES} are allowed"
        )
