"""checkpoints/headers.py: files that announce more than there is, or more than can be, are refused at once.

Each attack runs as `LLM.load` of a folder in a process with little memory to map: no MemoryError, and no wait."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sfumato.checkpoints import headers
from sfumato.checkpoints.headers import HeaderEntry, check_index, read_header
from sfumato.checkpoints.locate import NANO
from sfumato.checkpoints.shards import read_tensors, stored_tensors
from sfumato.errors import CheckpointError

TERABYTE = 1 << 40
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def file_of(table: object, data: bytes = b"", size: int = 0) -> Callable[[Path], None]:
    """A safetensors file with this header; sparse up to `size` where that is more."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()

    def write(path: Path) -> None:
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        os.truncate(path, max(size, path.stat().st_size))

    return write


def sparse(size: int, begin: bytes = b"") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(begin)
        os.truncate(path, size)

    return write


def entry(first: int, last: int, dtype: object = "U8", **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": [last - first], "data_offsets": [first, last], **more}


def many(count: int) -> bytes:
    """A header of so many empty tensors, their key spelled so that no search for it finds it."""
    one = '"{}":{{"dtype":"U8","shape":[0],"data\\u005foffsets":[0,0]}}'
    return ("{" + ",".join(one.format(number) for number in range(count)) + "}").encode()


HUGE = json.dumps({"a": entry(0, TERABYTE)}).encode()
ATTACKS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a sparse terabyte": (WEIGHTS, sparse(TERABYTE), "truncated or damaged"),
    "a header of half a terabyte": (WEIGHTS, sparse(TERABYTE, struct.pack("<Q", 1 << 39)), "at most 32 MiB"),
    "a tensor of a terabyte": (WEIGHTS, file_of(HUGE, size=8 + len(HUGE) + TERABYTE), "is stored as U8"),
    "more than there is": (WEIGHTS, file_of({"a": entry(0, TERABYTE)}), "and 0 lie behind the header"),
    "many tensors": (WEIGHTS, file_of(many(headers.MAX_TENSORS + 8)), f"more than the {headers.MAX_TENSORS} tensors"),
    "a deep header": (WEIGHTS, file_of(b'{"a":' + b"[" * 100_000), "truncated or damaged"),
    "a long shape": (WEIGHTS, file_of({"a": entry(0, 1, shape=[1] * 10_000)}, b"x"), "too large to exist"),
    "a long number": (WEIGHTS, file_of(b'{"a":{"dtype":"U8","shape":[' + b"9" * 9999 + b"]}}"), "truncated or damaged"),
    "a pipe": (WEIGHTS, os.mkfifo, "neither model.safetensors nor"),
    "a device": (WEIGHTS, lambda path: os.symlink("/dev/zero", path), "neither model.safetensors nor"),
    "a link to itself": (WEIGHTS, lambda path: os.symlink(path.name, path), "links to files that are not there"),
    "a sparse index": (INDEX, sparse(TERABYTE), "at most 16 MiB are allowed of an index"),
    "an index that is a pipe": (INDEX, os.mkfifo, "is not a file"),
    "an index of many files": (
        INDEX,
        lambda path: path.write_text(json.dumps({"weight_map": {f"t{n}": f"{n}.safetensors" for n in range(5000)}})),
        "5000 tensors in 5000 files",
    ),
    "a config that is a device": ("config.json", lambda path: os.symlink("/dev/zero", path), "is not a file"),
    "a sparse tokenizer": ("tokenizer.json", sparse(TERABYTE), "more than the"),
}
LOAD = """
import json, resource, sys, time
from sfumato import LLM
from sfumato.errors import CheckpointError
for folder in sys.argv[1:]:
    start = time.process_time()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        LLM.load(folder, progress=False, ops="fused")
        sentence = "loaded"
    except CheckpointError as error:
        sentence = str(error)
    except BaseException as error:
        sentence = f"{type(error).__name__}: {error}"
    print(json.dumps([sentence, time.process_time() - start]))
"""


def folder_of(place: Path, name: str, write: Callable[[Path], object]) -> Path:
    place.mkdir()
    for file in NANO.glob("*.json"):
        if file.name != name:
            os.symlink(file, place / file.name)
    write(place / name)
    if name not in (WEIGHTS, INDEX):
        os.symlink(NANO / WEIGHTS, place / WEIGHTS)
    return place


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with pipes among its files")
def test_what_is_announced_is_refused_at_once(tmp_path: Path) -> None:
    folders = [folder_of(tmp_path / name.replace(" ", "-"), *attack[:2]) for name, attack in ATTACKS.items()]
    command = [sys.executable, "-c", LOAD, *map(str, folders)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(lines) == len(ATTACKS), ended.stderr[-2000:]
    for (name, (_, _, part)), (sentence, seconds) in zip(ATTACKS.items(), lines, strict=True):
        assert part in sentence and "\n" not in sentence and len(sentence) < 600, (name, sentence)
        assert seconds < 6, (name, seconds)


def test_a_header_says_what_the_library_says(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0, 4), "c": torch.ones(3, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x", {"format": "pt"})
    header = read_header(tmp_path / "x")
    assert header.metadata == {"format": "pt"}
    with safe_open(str(tmp_path / "x"), "pt") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {one.name: one.shape for one in header.entries} == expected
    data = (tmp_path / "x").read_bytes()[header.begin :]
    for one in header.entries:
        assert data[one.first : one.last] == tensors[one.name].view(torch.uint8).numpy().tobytes()
    assert HeaderEntry("a", "F32", (2, 3), 0, 24) in header.entries


OFFSETS: list[dict[str, object]] = [
    {"a": entry(1, 4)},
    {"a": entry(0, 3)},
    {"a": entry(0, 5)},
    {"a": entry(0, 4), "b": entry(2, 4)},
    {"a": entry(0, 2), "b": entry(3, 4)},
    {"a": entry(0, 4), "b": entry(4, 0)},
    {"a": entry(0, 4, data_offsets=[0, 4, 4])},
    {"a": entry(0, 4, shape=[True])},
    {"a": entry(0, 4, shape=[1.5])},
    {"a": entry(0, 4, shape=[-4])},
    {"a": entry(0, 4, dtype=3)},
    {"a": {"dtype": "U8"}},
    {"a": entry(0, 4), "__metadata__": {"x": 1}},
]


@pytest.mark.parametrize("table", OFFSETS, ids=range(len(OFFSETS)))
def test_what_the_library_refuses_is_refused(table: dict[str, object], tmp_path: Path) -> None:
    file_of(table, b"1234")(tmp_path / WEIGHTS)
    with pytest.raises((SafetensorError, OSError)), safe_open(str(tmp_path / WEIGHTS), "pt"):
        pass
    with pytest.raises(CheckpointError, match="truncated or damaged") as refused:
        stored_tensors(tmp_path)
    assert "\n" not in str(refused.value)
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        read_tensors(tmp_path / WEIGHTS)


def test_files_and_tensors_of_an_index_are_bounded() -> None:
    check_index(Path(INDEX), headers.MAX_TENSORS, headers.MAX_FILES)
    for tensors, files in (headers.MAX_TENSORS + 1, 1), (1, headers.MAX_FILES + 1):
        with pytest.raises(CheckpointError, match="are allowed"):
            check_index(Path(INDEX), tensors, files)


def test_many_tensors_that_are_allowed_take_no_time(tmp_path: Path) -> None:
    file_of(many(50_000))(tmp_path / WEIGHTS)
    start = time.process_time()
    assert len(read_header(tmp_path / WEIGHTS).entries) == 50_000
    assert time.process_time() - start < 10
