"""checkpoints/formats/gguf.py: GGUF files damaged in every way: each opens or is refused in one sentence, quickly, in
little memory.

A small file with everything in it (two kinds of layer, seven kinds of blocks, a vocabulary, the sampler's numbers) is
mutated by seeded random numbers: bytes, lengths, counts, types, dimensions and offsets at the places where they lie,
slices cut out, moved and put in, the end cut off, and metadata of other types and sizes.
"""

from __future__ import annotations

import random
import re
import struct
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import copied, random_blocks, whole
from tiny import tiny_config

from sfumato.checkpoints.checkpoint import StoredVocabulary
from sfumato.checkpoints.formats import gguf_blocks as blocks
from sfumato.checkpoints.formats import gguf_names, gguf_writer
from sfumato.checkpoints.formats.gguf import PlannedBlocks, write_file
from sfumato.checkpoints.formats.gguf_model import open_gguf
from sfumato.checkpoints.formats.gguf_names import tensor_table
from sfumato.errors import InputError
from sfumato.model.config import LayerConfig, Rope
from sfumato.text.tokenizer import Tokenizer

HUGE = [
    0,
    1,
    2,
    7,
    255,
    65535,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    1 << 62,
    1 << 63,
    (1 << 64) - 1,
]
SAMPLER = {"diffusion.eb_max_steps": 24, "diffusion.eb_t_min": 0.4, "diffusion.eb_entropy_bound": 0.1}
BASE_KINDS = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16", "IQ4_NL", "MXFP4"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that all others come from."""
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    sliding, full = LayerConfig(8, 2, 6, Rope(10_000.0)), LayerConfig(16, 1, None, Rope(1e6, 0.5, 1.0, True))
    sizes = {"hidden_size": 32, "expert_size": 32, "vocab_size": 64}
    config = tiny_config(layers=(sliding, full), **sizes)
    planned = []
    for at, (theirs, _, shape) in enumerate(tensor_table(config)):
        kind = "F32" if len(shape) == 1 else BASE_KINDS[at % len(BASE_KINDS)]
        if kind in blocks.PLAIN:
            raw = blocks.encode(kind, torch.rand(shape))
        else:
            raw = random_blocks(kind, int(np.prod(shape[:-1])), shape[-1] // 32, at, 1e-3).view(*shape[:-1], -1)
        planned.append(PlannedBlocks(theirs, kind, shape, partial(whole, raw)))
    divisors = gguf_writer.divisors_of(config)
    planned.append(PlannedBlocks(gguf_names.ROPE, "F32", (8,), partial(whole, blocks.encode("F32", divisors))))
    letters = [chr(ord("a") + at) for at in range(26)]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<turn|>", *letters, *(a + "é" for a in letters), "é"]
    kinds, merges = [3] * 6 + [1] * (len(tokens) - 6), [f"{a} é" for a in letters]
    vocabulary = StoredVocabulary(tokens, kinds, merges, {"bos": 2, "eos": 1, "pad": 0, "unk": 3}, "{{ messages }}")
    metadata = {**gguf_writer.metadata_of(config, "base"), **SAMPLER, **gguf_writer.tokenizer_of(config, vocabulary)}
    write_file(path, {"general.alignment": 32, **metadata}, planned)
    assert open_gguf(path).vocabulary == vocabulary
    return path


def landmarks(data: bytes) -> list[tuple[int, str]]:
    """Where the numbers that steer a reader lie, and the struct letter of each."""
    places, at = [(4, "I"), (8, "Q"), (16, "Q")], 24

    def number(form: str) -> int:
        nonlocal at
        places.append((at, form))
        at += struct.calcsize(form)
        return int(struct.unpack_from("<" + form, data, at - struct.calcsize(form))[0])

    def text() -> None:
        nonlocal at
        length = number("Q")
        at += length

    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    tensors, pairs = struct.unpack_from("<QQ", data, 8)
    for _ in range(pairs):
        text()
        kind = number("I")
        inner, count = (number("I"), number("Q")) if kind == 9 else (kind, 1)
        for _ in range(count):
            if inner == 8:
                text()
            else:
                if kind != 9:
                    places.append((at, {1: "B", 4: "I", 8: "Q"}[sizes[inner]]))
                at += sizes[inner]
    for _ in range(tensors):
        text()
        for _ in range(number("I")):
            number("Q")
        number("I")
        number("Q")
    places.append((at, "end"))
    return places


def bytes_changed(rng: random.Random, data: bytearray, places: list[tuple[int, str]]) -> None:
    end = places[-1][0]
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        at = rng.randrange(end if rng.random() < 0.9 else len(data))
        data[at] = rng.choice([0, 255, rng.randrange(256), data[at] ^ 1 << rng.randrange(8)])


def numbers_changed(rng: random.Random, data: bytearray, places: list[tuple[int, str]]) -> None:
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at, form = rng.choice(places[:-1])
        size = struct.calcsize(form)
        old = int.from_bytes(data[at : at + size], "little")
        twin = rng.choice([place for place in places if place[1] == form])[0]
        other = int.from_bytes(data[twin : twin + size], "little")
        new = rng.choice(
            [rng.choice(HUGE), old + rng.choice([-33, -32, -8, -1, 1, 8, 32, 33]), other, rng.randrange(45)]
        )
        data[at : at + size] = (new % (1 << 8 * size)).to_bytes(size, "little")


def cut_off(rng: random.Random, data: bytearray, places: list[tuple[int, str]]) -> None:
    del data[rng.randrange(places[-1][0] if rng.random() < 0.7 else len(data)) :]


def slice_moved(rng: random.Random, data: bytearray, places: list[tuple[int, str]]) -> None:
    first, second = (rng.choice(places)[0] + rng.choice([0, 0, 1, 8]) for _ in range(2))
    length = rng.choice([1, 4, 8, 12, 32, 100, 1000])
    piece = data[first : first + length]
    way = rng.randrange(4)
    if way == 0:
        data[second : second + len(piece)] = piece
    elif way == 1:
        data[second:second] = piece
    elif way == 2:
        del data[first : first + length]
    else:
        data[second:second] = rng.randbytes(length)


def lengthened(rng: random.Random, data: bytearray, places: list[tuple[int, str]]) -> None:
    data += rng.randbytes(rng.choice([1, 31, 5000]))
    numbers_changed(rng, data, places)


WAYS: list[Callable[[random.Random, bytearray, list[tuple[int, str]]], None]] = [
    bytes_changed,
    bytes_changed,
    numbers_changed,
    numbers_changed,
    numbers_changed,
    cut_off,
    slice_moved,
    lengthened,
]
ODD: list[Any] = [
    *[
        0,
        1,
        2,
        3,
        31,
        1000,
        1001,
        (1 << 32) - 1,
        True,
        False,
        0.0,
        -1.0,
        1e38,
        float("nan"),
        float("inf"),
        0.5,
        "",
        "x",
    ],
    *["gemma4", "<turn|>", [0], [1, 2], [-1] * 64, [True, False], [0.5, 1.5], ["a"], ["a"] * 64, ["", "\0"]],
    *[np.array([1 << 63], "<u8"), np.array([], "<u4"), np.zeros(3000, "<u1"), np.array([1e300]), np.array([7], "<i8")],
]


def metadata_changed(rng: random.Random, base: Path, path: Path) -> None:
    """A sound file whose metadata say something else."""
    known, plan = copied(base)
    for _ in range(rng.choice([1, 1, 2, 3])):
        key = rng.choice(list(known))
        if rng.random() < 0.15:
            del known[key]
        elif isinstance(known[key], (list, np.ndarray)) and rng.random() < 0.5:
            known[key] = known[key][: rng.randrange(len(known[key]) + 1)]
        else:
            known[key] = rng.choice(ODD)
    if not isinstance(known.get("general.alignment", 32), int) or known.get("general.alignment") not in (
        None,
        1,
        2,
        32,
    ):
        known["general.alignment"] = 32  # the writer itself needs one
    write_file(path, known, plan)


def run(cases: range, base: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Mutate, open, and read a part of every tensor where it opens; what came of it, by the sentence's shape."""
    sound = base.read_bytes()
    places = landmarks(sound)
    allocate = torch.empty
    size = len(sound)

    def bounded(shape: int | tuple[int, ...], **kwargs: Any) -> torch.Tensor:
        count = int(np.prod(shape))
        most = size if kwargs.get("dtype") is torch.uint8 else 8 * size  # a bit a weight, at least
        assert count <= most, f"a tensor of {count} numbers for a file of {size} bytes"
        return allocate(shape, **kwargs)

    monkeypatch.setattr("sfumato.checkpoints.formats.gguf.torch.empty", bounded)
    outcomes: Counter[str] = Counter()
    tracemalloc.start()
    for case in cases:
        rng, size = random.Random(case), len(sound)
        way = rng.randrange(len(WAYS) + 2)
        if way < len(WAYS):
            data = bytearray(sound)
            WAYS[way](rng, data, places)
            path.write_bytes(data)
        else:
            metadata_changed(rng, base, path)
        size = path.stat().st_size
        tracemalloc.reset_peak()
        before, begin = tracemalloc.get_traced_memory()[0], time.process_time()
        try:
            checkpoint = open_gguf(path)
            for entry in checkpoint.entries.values():
                assert tuple(entry.read(0, 1).shape) == (1, *entry.shape[1:])
                if entry.packed:
                    assert entry.packed(0, 1).shape == (1, *entry.shape[1:])
            if checkpoint.vocabulary:
                words = checkpoint.vocabulary
                special = {f"{name}_token": words.tokens[index] for name, index in words.special.items()}
                Tokenizer.from_vocabulary(words.tokens, words.kinds, words.merges, special)
            outcomes["opened"] += 1
        except InputError as error:  # and so CheckpointError
            text = str(error)
            assert "\n" not in text and len(text) < 1000, (case, text)
            outcomes[re.sub(r"'.*?'|\[.*\]|\d+", "…", text.replace(str(path), "FILE"))] += 1
        except BaseException as error:
            raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error
        assert time.process_time() - begin < 5, case
        assert tracemalloc.get_traced_memory()[1] - before < 5 * size + (1 << 20), case
    tracemalloc.stop()
    return outcomes


def test_damaged_files(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = run(range(300), base, tmp_path / "it.gguf", monkeypatch)
    assert sum(outcomes.values()) == 300 and outcomes["opened"] > 10 and len(outcomes) > 40


@pytest.mark.slow
def test_many_damaged_files(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = run(range(300, 12_800), base, tmp_path / "it.gguf", monkeypatch)
    assert outcomes["opened"] > 400 and len(outcomes) > 100


def test_counts_that_lie_cost_nothing(base: Path, tmp_path: Path) -> None:
    """Every count and length of the file, one after another, made larger than any file."""
    sound, path = base.read_bytes(), tmp_path / "it.gguf"
    for at, form in landmarks(sound)[1:-1]:
        if form == "Q":
            data = bytearray(sound)
            data[at : at + 8] = struct.pack("<Q", (1 << 63) + 8)
            path.write_bytes(data)
            with pytest.raises(InputError):
                open_gguf(path)
