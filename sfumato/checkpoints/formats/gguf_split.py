"""GGUF in several files, `NAME-00001-of-00003.gguf` and its neighbours, opened as one.

Each part is a GGUF file of its own; the first has the metadata, and each says which of how many it is. Neighbours are
looked for beside the name that was given, not beside what a link points to: in the hub's cache every part is a link to
a file with no such name. Source: llama.cpp's gguf-split and its loader.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from sfumato.checkpoints.formats.gguf import Header, StoredBlocks, read_header, show
from sfumato.checkpoints.headers import MAX_GGUF_COUNT
from sfumato.errors import CheckpointError

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE | re.ASCII | re.DOTALL)


def set_of(name: str) -> tuple[str, int, int]:
    """The name of a whole set, which part of it a file's name says it is, from 1, and of how many; alone: 1 of 1."""
    match = _PART.fullmatch(name)
    return (match[1] + match[4], int(match[2]), int(match[3])) if match else (name, 1, 1)


def part_paths(path: Path) -> list[Path]:
    """The files of the set that this one belongs to by its name, in order; the file alone where it names none.

    Those that are not there are among them."""
    match = _PART.fullmatch(path.name)
    if not match:
        return [path]
    return [path.with_name(f"{match[1]}-{at:05}-of-{match[3]}{match[4]}") for at in range(1, int(match[3]) + 1)]


def read_parts(path: Path) -> Header:
    """The header of a .gguf file, or of all parts of the set that it is one of, as of one file.

    CheckpointError names what is wrong with a file, a part that is missing, or one of another set."""
    header = read_header(path)
    count = _whole(header, "split.count", 1)
    if count <= 1:
        return header
    paths = part_paths(path)
    if len(paths) != count:
        at = _whole(header, "split.no", 0) + 1
        raise CheckpointError(
            f"{path}: it is part {at} of {count}, and the others are looked for by their names; give all of them their "
            f"names again, which end in -{at:05}-of-{count:05}.gguf"
        )
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise CheckpointError(f"{path}: it is one of {count} parts; {missing[0]}{others} must lie beside it")
    headers = [header if part == path else read_header(part) for part in paths]
    tensors: dict[str, StoredBlocks] = {}
    for at, part in enumerate(headers):
        _check_part(headers[0], part, at, count)
        for name, stored in part.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{part.path}: the tensor {show(name)} is in {tensors[name].file.name} too")
            tensors[name] = stored
    total = _whole(headers[0], "split.tensors.count", len(tensors))
    if total != len(tensors):
        raise CheckpointError(
            f"{path}: its {count} parts have {len(tensors)} tensors, but announce {total}; get them again"
        )
    return replace(headers[0], path=path, tensors=tensors)


def _check_part(first: Header, part: Header, at: int, count: int) -> None:
    """CheckpointError where a part says that it belongs elsewhere."""
    place, parts = _whole(part, "split.no", -1), _whole(part, "split.count", 1)
    if (place, parts) != (at, count):
        raise CheckpointError(
            f"{part.path}: it says that it is part {place + 1} of {parts}, its name {at + 1} of {count}; one is wrong"
        )
    for key, value in part.metadata.items():
        other = first.metadata.get(key, value)
        if key != "split.no" and not np.array_equal(value, other):
            raise CheckpointError(
                f"{part.path}: its {key} is {show(value)}, that of {first.path.name} is {show(other)}; these are "
                "parts of two models"
            )


def _whole(header: Header, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= MAX_GGUF_COUNT:
        raise CheckpointError(
            f"{header.path}: {key} is {show(value)}; it must be a whole number up to {MAX_GGUF_COUNT}"
        )
    return value
