"""safetensors folders: headers are checked first, tensors are read a part at a time, folders are written as a stream.

A folder is written beside first, shard by shard, and moved in when it is whole: who reads it sees the old or the new.
What a killed run leaves is taken up by the next one of the same plan. It lacks the meaning of names.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sfumato.checkpoints import calibration
from sfumato.checkpoints.headers import SafetensorsHeader, check_index, check_index_size, read_header
from sfumato.errors import CheckpointError, InputError, SfumatoError
from sfumato.model.config import read_json
from sfumato.system.files import replacing

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WRITING, PLAN = ".writing", "plan"
"""The folder in which a folder of shards grows, and the file in it that says which ones these are."""
POINTER = b"version https://git-lfs"
"""What a file begins with that Git LFS has not fetched yet."""
IS_POINTER = "is a Git LFS pointer and not the file itself; run `git lfs pull` there"
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "BOOL": torch.bool,
}
"""What tensors may be stored as; the names are safetensors'."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PART = 1 << 28
"""Bytes that are read or made at one time, unless a single place of the first axis is larger."""


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file; `dtype` is safetensors' name, `start` counts from the file's first byte."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        """The tensor, or these places of its first axis, on the CPU, as it is stored.

        CheckpointError when the file has changed or cannot be read."""
        whole = self.shape[0] if self.shape else 1
        last = whole if last is None else last
        shape = (last - first, *self.shape[1:]) if self.shape else ()
        tensor = torch.empty(shape, dtype=DTYPES[self.dtype])
        read_into(tensor, self.file, self.start + (self.nbytes // whole * first if whole else 0), self.name)
        return tensor

    def map(self) -> Tensor:
        """The tensor where it lies: pages of the file, read by the system when they are first looked at."""
        try:
            with safe_open(str(self.file), "pt") as file:
                tensor: Tensor = file.get_tensor(self.name)
                return tensor
        except (SafetensorError, OSError, MemoryError) as error:
            raise CheckpointError(f"cannot map {self.name} of {self.file}: {short(error)}") from error

    @property
    def is_whole(self) -> bool:
        """True when dtype and shape account for the bytes."""
        known = DTYPES.get(self.dtype)
        return known is not None and self.nbytes == math.prod(self.shape) * known.itemsize


def read_into(tensor: Tensor, path: Path, start: int, name: str) -> None:
    """Fill a tensor with the bytes of a file from `start` on; `name` is the tensor's, for errors.

    CheckpointError where the file ends too early, or cannot be read."""
    left = tensor.reshape(-1).view(torch.uint8).numpy().data
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while left.nbytes:
                count = file.readinto(left)
                if not count:
                    raise CheckpointError(f"{path} ends inside {name}")
                left = left[count:]
    except OSError as error:
        raise CheckpointError(f"cannot read {name} from {path}: {error.strerror or error}") from error


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by its name in the file, from the headers alone.

    model.safetensors comes before an index, as in transformers, unless it is one of several files that the index
    names. CheckpointError names a missing, truncated or damaged file, a tensor in two files, one that the index
    promises."""
    tensors: dict[str, Stored] = {}
    weight_map = {} if _is_alone(folder) else _weight_map(folder)
    for shard in sorted(set(weight_map.values())) or [SINGLE]:
        for stored in header(folder / shard):
            if stored.name in tensors:
                other = tensors[stored.name].file
                raise CheckpointError(f"{short(stored.name)} is both in {other} and in {stored.file.name}")
            tensors[stored.name] = stored
        check_index(folder / INDEX, len(tensors), 1)
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(f"{folder / INDEX} says that {short(name)} is in {shard}, where it is not")
    return tensors


def metadata(folder: Path) -> dict[str, str]:
    """What the first shard's header says beside its tensors."""
    path = folder / SINGLE
    if not path.is_file():
        path = folder / min(_weight_map(folder).values())
    return _header(path).metadata


def _is_alone(folder: Path) -> bool:
    """Whether model.safetensors holds everything. AutoRound puts what it has not touched in a second file."""
    if not (folder / SINGLE).is_file():
        return False
    try:
        files = set(_weight_map(folder).values())
        return SINGLE not in files or len(files) == 1
    except CheckpointError:  # an index of no use beside a file that needs none
        return True


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.exists():
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}; pickled weights (.bin, .pt) are never read")
    check_index_size(path)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map from tensor names to files")
    check_index(path, len(weight_map), len(set(map(str, weight_map.values()))))
    for name, shard in weight_map.items():
        # A plain name: an index must not lead out of its folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]{0,200}", shard, re.ASCII):
            raise CheckpointError(f"{path} puts {short(name)} in {short(shard)}, which is no plain file name")
    return weight_map


def header(path: Path) -> Iterator[Stored]:
    """The tensors of one file. CheckpointError where it is missing, truncated or damaged."""
    own = _header(path)
    for one in own.entries:
        yield Stored(one.name, path, one.dtype, one.shape, own.begin + one.first, one.last - one.first)


def _header(path: Path) -> SafetensorsHeader:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise CheckpointError(f"{path} {IS_POINTER}")
        own = read_header(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {short(error)}") from error
    return own


def read_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file; CheckpointError names a file that is none."""
    try:
        read_header(Path(path))
        with safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, MemoryError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {short(error)}") from error


# ---- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: what the header says of it, and where its bytes come from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[Tensor]]
    """Tensors whose bytes, one after the other, are this tensor's."""
    follows: bool = False
    """It is made together with the one before it, and goes into the same file, right after that one."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def plain(name: str, tensor: Tensor) -> Planned:
    """A tensor that is there already."""
    return Planned(name, NAMES[tensor.dtype], tuple(tensor.shape), lambda: iter([tensor]))


@dataclass(frozen=True)
class PlannedFolder:
    """A folder of tensors to be written: model.safetensors, or numbered shards with their index."""

    tensors: Sequence[Planned]
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of every shard's header."""
    files: Mapping[str, str | Path] = field(default_factory=dict)
    """Others that go in with them, by name: as text, or as a path to copy."""
    shard_bytes: int = 2 << 30
    """Bounds a file, unless a single tensor is larger."""
    source: str | None = None
    """What the tensors are made of. With it, shards that are finished stay where a run is cut off, and the next run of
    the same source, tensors and metadata goes on from there; without, nothing stays."""

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def shards(self) -> list[Shard]:
        """The files of tensors, in their order."""
        groups: list[list[Planned]] = [[]]
        room = self.shard_bytes
        for tensor in self.tensors:
            if tensor.nbytes > room and groups[-1] and not tensor.follows:
                groups.append([])
                room = self.shard_bytes
            groups[-1].append(tensor)
            room -= tensor.nbytes
        names = [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
        names = names if len(groups) > 1 else [SINGLE]
        return [Shard(name, group, self.metadata) for name, group in zip(names, groups, strict=True)]


class Shard:
    """A file of tensors to be written."""

    def __init__(self, name: str, tensors: Sequence[Planned], metadata: Mapping[str, str]) -> None:
        self.name, self.tensors = name, tensors
        self.head = _head(tensors, metadata)
        """The bytes of its header."""

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def write_shards(
    folder: Path, plan: PlannedFolder, progress: Callable[[int, int], None] | None = None, force: bool = True
) -> None:
    """Write a folder of tensors; an older checkpoint there is replaced at the very end.

    Without `force` an older one is an InputError, unless it is what this very plan has left. `progress(done, all)`
    counts bytes. SfumatoError where the disk says no. Two writers of one folder at one time need `files.locked`."""
    shards = plan.shards()
    heads = [shard.head for shard in shards]
    digest = hashlib.sha256(b"\0".join([(plan.source or "").encode(), *heads])).hexdigest()
    beside = folder / WRITING
    is_ours = _is_plan(beside / PLAN, digest)
    if not force and not is_ours:
        check_empty(folder)
    try:
        if beside.exists() and (plan.source is None or not is_ours):
            shutil.rmtree(beside)
        beside.mkdir(parents=True, exist_ok=True)
        (beside / PLAN).write_text(digest)
        _write_all(beside, shards, _ByteCount(plan.nbytes, progress))
        if len(shards) > 1:
            weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
            index = as_json({"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map})
            (beside / INDEX).write_text(index, encoding="utf-8")
        for name, content in plan.files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, beside / name)
            else:
                (beside / name).write_text(content, encoding="utf-8")
        _move_in(beside, folder)
        shutil.rmtree(beside)
    except OSError as error:
        raise SfumatoError(f"cannot write the checkpoint {folder}: {short(error)}") from error
    finally:
        if plan.source is None:
            shutil.rmtree(beside, ignore_errors=True)


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file: beside it first, then renamed, so that a reader never sees half a file.

    SfumatoError where the disk says no."""
    metadata = metadata or {}
    if not all(isinstance(value, str) for value in metadata.values()):
        raise TypeError(f"metadata is {short(metadata)}; its values are texts")
    shard = Shard(Path(path).name, [plain(name, tensor) for name, tensor in tensors.items()], metadata)
    try:
        with replacing(Path(path)) as file:
            _fill(file, shard, _ByteCount(shard.nbytes))
    except OSError as error:
        raise SfumatoError(f"cannot write {path}: {error.strerror or error}") from error


def check_empty(folder: Path) -> None:
    """InputError where a folder holds files that writing might replace; what a killed run left there is none."""
    held = sorted(file.name for file in folder.iterdir() if file.name != WRITING) if folder.is_dir() else []
    if held:
        more = f" and {len(held) - 1} more" if len(held) > 1 else ""
        raise InputError(
            f"{folder} holds {short(held[0])}{more} already; give another place, or --force (force=True) to replace it"
        )


def _is_plan(path: Path, digest: str) -> bool:
    return path.is_file() and path.read_text() == digest


def _head(shard: Sequence[Planned], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    for tensor, at in sorted(zip(shard, _places(shard), strict=True), key=lambda pair: pair[1]):
        ends = [at, at + tensor.nbytes]
        table[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": ends}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # the data begin at a cache line, after the eight bytes of this length
    return len(text).to_bytes(8, "little") + text


def _places(shard: Sequence[Planned]) -> list[int]:
    """Where each tensor begins: those of wide elements first, so that each lies as its elements want it."""
    order = sorted(range(len(shard)), key=lambda i: -DTYPES[shard[i].dtype].itemsize)
    places, at = [0] * len(shard), 0
    for i in order:
        places[i] = at
        at += shard[i].nbytes
    return places


class _ByteCount:
    """How many bytes of all are written, and who wants to know."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None = None) -> None:
        self.done, self.total, self._progress = 0, total, progress

    def add(self, count: int) -> None:
        self.done += count
        if self._progress:
            self._progress(self.done, self.total)


def _write_all(folder: Path, shards: Sequence[Shard], progress: _ByteCount) -> None:
    """Write the shards that are not there yet."""
    for shard in shards:
        if (folder / shard.name).exists():
            progress.done += shard.nbytes
        else:
            with replacing(folder / shard.name) as file:
                _fill(file, shard, progress)


def _fill(file: IO[bytes], shard: Shard, progress: _ByteCount) -> None:
    """A file's header and its tensors."""
    file.write(shard.head)
    for tensor, at in zip(shard.tensors, _places(shard.tensors), strict=True):
        file.seek(len(shard.head) + at)
        _write(file, tensor, progress)


def _write(file: IO[bytes], tensor: Planned, progress: _ByteCount) -> None:
    written = 0
    for part in tensor.parts():
        file.write(part.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
        written += part.nbytes
        progress.add(part.nbytes)
    if written != tensor.nbytes:
        raise SfumatoError(f"{tensor.name} came with {written} bytes instead of {tensor.nbytes}; this is a bug")


def _move_in(beside: Path, folder: Path) -> None:
    """The file that says where the weights are goes first and comes last, so that old and new never pass for one."""
    new = [file for file in beside.iterdir() if file.name != PLAN]
    new.sort(key=lambda file: (file.name in (SINGLE, INDEX), file.name))
    for name in (SINGLE, INDEX):
        if name != new[-1].name or name == INDEX:
            (folder / name).unlink(missing_ok=True)
    for old in folder.glob("model-?????-of-?????.safetensors"):
        if not (beside / old.name).exists():
            old.unlink()
    if not (beside / calibration.FILE).exists():
        (folder / calibration.FILE).unlink(missing_ok=True)  # of the weights that were there
    for file in new:
        os.replace(file, folder / file.name)


def as_json(value: Mapping[str, Any]) -> str:
    """A mapping as the text of a JSON file."""
    return json.dumps(value, indent=2) + "\n"


def short(value: object) -> str:
    """A value as a sentence may quote it."""
    text = " ".join(str(value)[:2000].split())
    text = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)  # no commands to a terminal
    return text if len(text) <= 200 else text[:199] + "…"
