"""checkpoints/formats/gguf_split.py: GGUF in several files: any part opens all, and what does not belong is named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import copied, write_split

from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.formats.gguf import read_header, write_file
from sfumato.checkpoints.formats.gguf_model import open_gguf
from sfumato.checkpoints.formats.gguf_split import part_paths, read_parts, set_of
from sfumato.checkpoints.formats.gguf_writer import write_gguf
from sfumato.errors import CheckpointError


@pytest.fixture
def file(folder: Path, tmp_path: Path) -> Path:
    """A small model as one file."""
    write_gguf(open_checkpoint(folder), tmp_path / "whole.gguf", "BF16")
    return tmp_path / "whole.gguf"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder for the parts."""
    (tmp_path / "parts").mkdir()
    return tmp_path / "parts"


def test_names() -> None:
    assert set_of("a-00002-of-00010.gguf") == ("a.gguf", 2, 10)
    assert set_of("a.gguf") == ("a.gguf", 1, 1) and set_of("a-2-of-3.gguf") == ("a-2-of-3.gguf", 1, 1)
    odd = Path("x") / "Mödel (1) [Q4_K_M]\n-00001-of-00002.GGUF"
    assert part_paths(odd) == [odd, odd.with_name("Mödel (1) [Q4_K_M]\n-00002-of-00002.GGUF")]
    assert part_paths(Path("a-00003-of-00002.gguf"))[0].name == "a-00001-of-00002.gguf"
    assert part_paths(Path("plain.gguf")) == [Path("plain.gguf")]


def test_any_part_opens_all(file: Path, place: Path) -> None:
    expected = open_gguf(file)
    for path in write_split(file, place, "it (Q4) [x]", 3):
        actual = open_gguf(path)
        assert actual.path == path and actual.config == expected.config and actual.generation == expected.generation
        assert list(actual.entries) == list(expected.entries)
        for name, entry in expected.entries.items():
            assert torch.equal(actual.entries[name].read(0, entry.shape[0]), entry.read(0, entry.shape[0])), name


def test_parts_that_are_links_into_a_cache(file: Path, place: Path, tmp_path: Path) -> None:
    """As the hub's cache has them: the files have no name but their hash."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    paths = write_split(file, place, "it", 2)
    for at, path in enumerate(paths):
        shutil.move(path, blobs / f"{at}{'f' * 63}")
        os.symlink(os.path.relpath(blobs / f"{at}{'f' * 63}", place), path)
    assert list(open_gguf(paths[1]).entries) == list(open_gguf(file).entries)


def test_a_first_part_without_tensors(file: Path, place: Path) -> None:
    metadata, plan = copied(file)
    facts = {"split.count": 2, "split.tensors.count": len(plan)}
    write_file(place / "it-00001-of-00002.gguf", {**metadata, "split.no": 0, **facts}, [])
    write_file(place / "it-00002-of-00002.gguf", {"split.no": 1, **facts}, plan)
    assert len(open_gguf(place / "it-00001-of-00002.gguf").entries) == len(open_gguf(file).entries)


def test_a_set_of_one(file: Path, place: Path) -> None:
    (only,) = write_split(file, place, "it", 1)
    assert list(open_gguf(only).entries) == list(open_gguf(file).entries)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"_2_no": 2}, "says that it is part 3 of 3, its name 2 of 3; one is wrong"),
        ({"_2_no": "b"}, "split.no is 'b'; it must be a whole number"),
        ({"_3_count": 2}, "says that it is part 3 of 2, its name 3 of 3"),
        ({"_1_count": 1 << 31}, "split.count is 2147483648; it must be a whole number"),
        ({"_1_count": 1.5}, "split.count is 1.5; it must be a whole number"),
        ({"_1_count": 4}, r"it is part 1 of 4, .* names again, which end in -00001-of-00004\.gguf"),
        ({"_2_tensors.count": 9}, "its split.tensors.count is 9, that of it-00001-of-00003.gguf is .*two models"),
        ({f"_{at}_tensors.count": 500 for at in (1, 2, 3)}, r"its 3 parts have \d+ tensors, but announce 500"),
    ],
)
def test_parts_that_contradict(file: Path, place: Path, changes: dict[str, Any], match: str) -> None:
    path = write_split(file, place, "it", 3, **changes)[0]
    with pytest.raises(CheckpointError, match=match) as caught:
        read_parts(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(place))


def test_parts_that_are_missing_or_renamed(file: Path, place: Path) -> None:
    paths = write_split(file, place, "it", 3)
    kept = paths[1].read_bytes()
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"it is one of 3 parts; it-00002-of-00003\.gguf must lie beside it"):
        read_parts(paths[2])
    paths[0].unlink()
    with pytest.raises(CheckpointError, match=r"it-00001-of-00003\.gguf and 1 others must lie beside it"):
        read_parts(paths[2])
    (place / "renamed.gguf").write_bytes(kept)
    with pytest.raises(CheckpointError, match=r"it is part 2 of 3, .* end in -00002-of-00003\.gguf"):
        read_parts(place / "renamed.gguf")


def test_parts_of_two_models(file: Path, place: Path) -> None:
    metadata, plan = copied(file)
    own = {"split.count": 2, "split.tensors.count": len(plan)}
    paths = [place / f"it-{at}-of-00002.gguf" for at in ("00001", "00002")]
    write_file(paths[0], {**metadata, **own, "split.no": 0}, plan[:9])
    write_file(paths[1], {**own, "split.no": 1, "general.name": "other"}, plan[9:])
    with pytest.raises(CheckpointError, match=r"00002\.gguf: its general\.name is 'other', that of .* two models"):
        read_parts(paths[0])
    write_file(paths[1], {**own, "split.no": 1}, plan[8:])
    with pytest.raises(CheckpointError, match=r"00002\.gguf: the tensor '.*' is in it-00001-of-00002\.gguf too"):
        read_parts(paths[0])
    paths[1].write_bytes(paths[1].read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"00002\.gguf: .* it is truncated"):
        read_parts(paths[0])


def test_what_the_library_splits(place: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the gguf package, the format's own library")
    writer = gguf.GGUFWriter(str(place / "it.gguf"), "diffusion-gemma", split_max_tensors=2)
    values = {f"blk.{at}.weight": np.full((2, 32), at, np.float32) for at in range(5)}
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.add_uint32("diffusion-gemma.block_count", 5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths = sorted(place.iterdir())
    assert len(paths) == 3
    header = read_parts(paths[2])
    assert header.metadata["diffusion-gemma.block_count"] == 5
    assert list(header.tensors) == list(values)
    for name, value in values.items():
        assert header.tensors[name].read().view(torch.float32).numpy().tobytes() == value.tobytes()
    assert len(read_header(paths[2]).tensors) == 1


def test_a_part_that_vanishes_while_it_is_open(file: Path, place: Path) -> None:
    paths = write_split(file, place, "it", 2)
    checkpoint = open_gguf(paths[0])
    paths[1].unlink()
    last = list(checkpoint.entries.values())[-1]
    with pytest.raises(CheckpointError, match=r"it-00002-of-00002\.gguf: No such file"):
        last.read(0, 1)
