"""checkpoints/shards.py: damaged and hostile safetensors folders: whatever the bytes, either tensors that lie where
their header says, or one sentence; never a crash, a second of work, or more memory than the file has bytes (and a
constant).
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.checkpoints.shards import DTYPES, INDEX, SINGLE, stored_tensors
from sfumato.errors import CheckpointError

ROOM = 96 << 20
"""Bytes of address space that reading a folder of a few kilobytes may take: code, arenas, Python's own."""
SENTENCE = 600
"""Characters of an error, beside the folder's path."""
NUMBERS: list[Any] = [0, 1, -1, 2, 3, 7, 8, 255, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63)]
VALUES: list[Any] = [*NUMBERS, None, True, 1.5, 1e300, "", "F32", "\0\n\ud800", [], {}, [[]], [1, 2], {"a": [None]}]
KINDS = [*DTYPES, "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "f32", "Q4_0", ""]
NAMES = ["", "a", "__metadata__", "..", "x" * 3000, "é\u202e", "\0", "a\nb", '"', "weight", "\ud800"]


def value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(VALUES))


def base(rng: random.Random) -> tuple[dict[str, Any], bytes]:
    """A sound header and its data: a few tensors of several dtypes, scalars and empty ones among them."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}} if rng.random() < 0.5 else {}
    at = 0
    for number in range(rng.randint(1, 5)):
        kind = rng.choice([name for name in DTYPES if name != "BOOL"])
        shape = [rng.randint(0, 4) if rng.random() < 0.9 else 0 for _ in range(rng.randint(0, 3))]
        nbytes = DTYPES[kind].itemsize
        for size in shape:
            nbytes *= size
        table[f"layer.{number}.weight"] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    return table, rng.randbytes(at)


def joined(table: Any, data: bytes, text: bytes | None = None) -> bytes:
    text = json.dumps(table).encode() if text is None else text
    return len(text).to_bytes(8, "little") + text + data


def some(rng: random.Random, table: dict[str, Any]) -> str:
    return rng.choice([name for name in table if isinstance(table[name], dict)] or ["a"])


def change_entry(rng: random.Random, table: dict[str, Any]) -> None:
    """One thing said of a tensor is another."""
    entry = table.setdefault(some(rng, table), {})
    match rng.randrange(9):
        case 0:
            entry["dtype"] = rng.choice(KINDS)
        case 1:
            entry[rng.choice(["dtype", "shape", "data_offsets"])] = value(rng)
        case 2:
            entry["shape"] = [rng.choice(NUMBERS) for _ in range(rng.randint(0, 6))]
        case 3:
            entry["shape"] = rng.choice(
                [[0, 2**40, 2**40], [2**62, 0], [2**32, 2**32], [1] * 70, [0] * 200, [2**63, 0]]
            )
        case 4:
            entry["data_offsets"] = [rng.choice([*NUMBERS, *range(40)]) for _ in range(rng.choice([2, 2, 2, 1, 3, 0]))]
        case 5:
            entry["shape"] = [value(rng) for _ in range(3)]
        case 6:
            entry.pop(rng.choice(["dtype", "shape", "data_offsets"]), None)
        case 7:
            entry[rng.choice(["more", "offset", ""])] = value(rng)
        case 8:  # an empty tensor may claim any place
            entry |= {"shape": [0], "data_offsets": [rng.choice(NUMBERS)] * 2}


def change_table(rng: random.Random, table: dict[str, Any]) -> None:
    """A tensor more, less, elsewhere or under another name."""
    name = some(rng, table)
    match rng.randrange(5):
        case 0:
            table[rng.choice(NAMES)] = table.pop(name, {})
        case 1:
            table[rng.choice(NAMES)] = value(rng)
        case 2:
            table["__metadata__"] = copy.deepcopy(
                rng.choice([*VALUES, {"a": 1}, {"a": "b" * 2000}, {"format": ["pt"]}])
            )
        case 3:
            table["twin"] = copy.deepcopy(table.get(name))
        case 4:
            table.pop(name, None)


def change_text(rng: random.Random, text: bytes) -> bytes:
    """What json.dumps would not write: names twice, depth, numbers without end, bytes that are no text."""
    at = rng.randrange(len(text) + 1)
    match rng.randrange(8):
        case 0:
            inner = text.strip()[1:-1]
            return b"{" + inner + b"," + inner + b"}"
        case 1:
            depth = rng.choice([10, 1000, 100_000])
            opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
            return opening * depth + b"0" + closing * depth * rng.randrange(2)
        case 2:
            return text[:at] + rng.choice([b"NaN", b"Infinity", b"-0", b"9" * 5000, b"1e999", b'"\\ud800"']) + text[at:]
        case 3:
            return text[:at] + rng.randbytes(rng.randint(1, 4)) + text[at:]
        case 4:
            return text[:at] + text[at + rng.randint(1, 8) :]
        case 5:
            changed = bytearray(text or b" ")
            for _ in range(rng.randint(1, 4)):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            return bytes(changed)
        case 6:
            return rng.choice([b"", b"null", b"[]", b"0", b'"a"', b"{}", b" " * 20_000, b"\xef\xbb\xbf{}", b"\xff" * 9])
        case _:
            entry = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
            return b"{" + b",".join(b'"t%d":%s' % (number, entry) for number in range(rng.choice([50, 3000]))) + b"}"


def change_bytes(rng: random.Random, file: bytes) -> bytes:
    """A file that is cut, grows, or says another length of its header."""
    match rng.randrange(4):
        case 0:
            return file[: rng.choice([0, 1, 7, 8, 9, rng.randrange(len(file) + 1), max(0, len(file) - 1)])]
        case 1:
            return file + rng.randbytes(rng.choice([1, 8, 4096]))
        case 2:
            size = rng.choice([*(n for n in NUMBERS if 0 <= n < 2**64), len(file), len(file) - 8, len(file) - 9, 10**8])
            return int(max(size, 0)).to_bytes(8, "little") + file[8:]
        case _:
            changed = bytearray(file or b"\0")
            changed[rng.randrange(min(len(changed), 400))] = rng.randrange(256)
            return bytes(changed)


def hostile_file(rng: random.Random) -> bytes:
    table, data = base(rng)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        rng.choice([change_entry, change_table])(rng, table)
    text = json.dumps(table).encode()
    if rng.random() < 0.3:
        text = change_text(rng, text)
    file = joined(table, data, text)
    return change_bytes(rng, file) if rng.random() < 0.25 else file


def hostile_index(rng: random.Random, folder: Path) -> None:
    """Two shards, each sound more often than not, and an index that is sound less often."""
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map: dict[str, Any] = {}
    for number, shard in enumerate(shards):
        table, data = base(rng)
        table = {f"{number}.{n}" if n != "__metadata__" and rng.random() < 0.95 else n: v for n, v in table.items()}
        weight_map |= {name: shard for name in table if name != "__metadata__"}
        (folder / shard).write_bytes(joined(table, data) if rng.random() < 0.8 else hostile_file(rng))
    elsewhere = [
        "../x.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b",
        "a\\b",
        "a\0b",
        INDEX,
        shards[0] + "\n",
        "x" * 300,
    ]
    index: Any = {"metadata": {"total_size": value(rng)}, "weight_map": weight_map}
    name = rng.choice([*weight_map, *NAMES])
    match rng.randrange(9):
        case 0:
            weight_map[name] = rng.choice(elsewhere)
        case 1:
            weight_map[name] = value(rng)
        case 2:
            weight_map[name] = rng.choice(shards)
        case 3:
            weight_map.pop(name, None)
        case 4:
            index["weight_map"] = value(rng)
        case 5:
            index = value(rng)
        case 6:
            (folder / rng.choice(shards)).unlink()
        case 7:
            weight_map[name] = "missing.safetensors"
    text = json.dumps(index).encode()
    (folder / INDEX).write_bytes(change_text(rng, text) if rng.random() < 0.2 else text)


@contextmanager
def bounded(room: int = ROOM) -> Iterator[None]:
    """Little more address space than this process has already; what asks for more fails."""
    if not sys.platform.startswith("linux"):  # others do not hold a process to it
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check(folder: Path) -> bool:
    """Read all of a folder. True: it was refused, as it should be."""
    began = time.process_time()
    try:
        read_all(folder)
    except CheckpointError as error:
        sentence = str(error).replace(str(folder), "")
        assert "\n" not in sentence and len(sentence) < SENTENCE, sentence[:2000]
        return True
    finally:
        assert time.process_time() - began < 5
    return False


def read_all(folder: Path) -> None:
    spans: dict[Path, list[tuple[int, int]]] = {}
    for name, stored in stored_tensors(folder).items():
        content = stored.file.read_bytes()
        assert stored.name == name and stored.file.parent == folder and stored.nbytes >= 0
        assert 8 <= stored.start <= stored.start + stored.nbytes <= len(content)
        spans.setdefault(stored.file, []).append((stored.start, stored.start + stored.nbytes))
        if not stored.is_whole:  # a dtype that this engine has no name for: who reads it is to look first
            assert stored.dtype not in DTYPES
            continue
        tensor = stored.read()
        assert tensor.dtype == DTYPES[stored.dtype] and tuple(tensor.shape) == stored.shape
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert raw == content[stored.start : stored.start + stored.nbytes]
        if stored.shape and stored.shape[0] > 1:
            half = stored.shape[0] // 2
            part = stored.read(half, stored.shape[0]).reshape(-1).view(torch.uint8).numpy().tobytes()
            assert part == raw[half * (len(raw) // stored.shape[0]) :]
    for ranges in spans.values():
        full = sorted(r for r in ranges if r[0] < r[1])
        assert all(one[1] <= other[0] for one, other in pairwise(full))


def run(folder: Path, seeds: range, build: Callable[[random.Random, Path], None]) -> int:
    """How many of these cases were refused; each is made from its seed alone, which a failure names."""
    refused = 0
    for seed in seeds:
        place = folder / "case"
        place.mkdir()
        build(random.Random(seed), place)
        try:
            with bounded():
                refused += check(place)
        except BaseException as error:
            error.add_note(f"the case of seed {seed}")
            raise
        shutil.rmtree(place)
    return refused


def single(rng: random.Random, folder: Path) -> None:
    (folder / SINGLE).write_bytes(hostile_file(rng))


def test_sound_files_are_read(tmp_path: Path) -> None:
    for seed in range(40):
        (tmp_path / SINGLE).write_bytes(joined(*base(random.Random(seed))))
        assert not check(tmp_path)


def test_hostile_files(tmp_path: Path) -> None:
    assert 60 < run(tmp_path, range(150), single) < 150


def test_hostile_indexes(tmp_path: Path) -> None:
    assert 20 < run(tmp_path, range(60), hostile_index) < 60


@pytest.mark.slow
def test_many_hostile_files(tmp_path: Path) -> None:
    assert 4000 < run(tmp_path, range(1000, 9000), single) < 8000


@pytest.mark.slow
def test_many_hostile_indexes(tmp_path: Path) -> None:
    assert 1000 < run(tmp_path, range(1000, 4000), hostile_index) < 3000


# ---- by hand --------------------------------------------------------------------------------------------------------

U8 = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "table",
    [
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
        {"a": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 4]}},
        {"a": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}},
        {"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}},
        {"a": {"dtype": "U8", "shape": [-4], "data_offsets": [0, 4]}},
        {"a": {"dtype": "U8", "shape": [-2, -2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "U8", "shape": [4.0], "data_offsets": [0, 4]}},
        {"a": {"dtype": "U8", "shape": 4, "data_offsets": [0, 4]}},
        {"a": {"dtype": "U16", "shape": [4], "data_offsets": [0, 4]}},
        {"a": {"dtype": "U8", "shape": [2**33, 2**33], "data_offsets": [0, 4]}},
        {"a": U8, "b": U8},
        {"a": U8, "b": {"dtype": "U8", "shape": [3], "data_offsets": [1, 4]}},
        {"a": {"dtype": "U8", "shape": [3], "data_offsets": [1, 4]}},
        {"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}},
        {"a": [0, 4]},
        {"a": None},
        [U8],
    ],
)
def test_headers_that_lie(tmp_path: Path, table: Any) -> None:
    (tmp_path / SINGLE).write_bytes(joined(table, b"data"))
    with bounded():
        assert check(tmp_path)


@pytest.mark.parametrize("shape", [[0, 2**63], [2**63, 0], [0, 2**40, 2**40], [0, 2**62]])
def test_an_empty_tensor_of_a_size_without_end(tmp_path: Path, shape: list[int]) -> None:
    (tmp_path / SINGLE).write_bytes(joined({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}, b""))
    check(tmp_path)


def test_a_long_name_twice(tmp_path: Path) -> None:
    name = "x" * 100_000
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one", "b": "two"}}))
    for shard in ("one", "two"):
        (tmp_path / shard).write_bytes(joined({name: U8}, b"data"))
    assert check(tmp_path)


def test_a_name_twice(tmp_path: Path) -> None:
    entry = json.dumps(U8).encode()
    (tmp_path / SINGLE).write_bytes(
        joined(None, b"datadata", b'{"a":%s,"a":%s}' % (entry, entry.replace(b"[0, 4]", b"[4, 8]")))
    )
    assert check(tmp_path)
    shards = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / SINGLE).unlink()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": shards}))
    for shard in shards.values():
        (tmp_path / shard).write_bytes(joined({"a": U8}, b"data"))
    with pytest.raises(CheckpointError, match="is both in"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("depth", [500, 200_000])
@pytest.mark.parametrize("opening", ["[", '{"weight_map":'])
def test_deep_json(tmp_path: Path, opening: str, depth: int) -> None:
    text = (opening * depth).encode()
    (tmp_path / INDEX).write_bytes(text)
    assert check(tmp_path)
    (tmp_path / SINGLE).write_bytes(joined(None, b"", text))
    assert check(tmp_path)


@pytest.mark.parametrize("size", [9, 100, 10**8, 10**8 + 1, 2**40, 2**63, 2**64 - 1])
def test_headers_longer_than_their_file(tmp_path: Path, size: int) -> None:
    file = joined({"a": U8}, b"data")
    (tmp_path / SINGLE).write_bytes(size.to_bytes(8, "little") + file[8:])
    with bounded():
        assert check(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../out.safetensors", "sub/in.safetensors", "/dev/zero", "..", "", ".hidden", "a\0", "é"]
)
def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path / "out.safetensors", folder / "sub" / "in.safetensors"):
        place.write_bytes(joined({"a": U8}, b"data"))
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="no plain file name"):
        stored_tensors(folder)


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "shard"}}))
    (tmp_path / "shard").mkdir()
    assert check(tmp_path)
    (tmp_path / "shard").rmdir()
    os.mkfifo(tmp_path / "shard")  # opening it would wait for ever
    assert check(tmp_path)
    (tmp_path / "shard").unlink()
    (tmp_path / "shard").symlink_to(tmp_path / "shard")
    assert check(tmp_path)


def test_files_that_change_after_they_were_opened(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(joined({"a": U8}, b"data"))
    stored = stored_tensors(tmp_path)["a"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ends inside"):
        stored.read()
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        stored.read()
