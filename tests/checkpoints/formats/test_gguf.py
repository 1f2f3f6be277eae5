"""checkpoints/formats/gguf.py and its neighbours: GGUF: the container, DiffusionGemma in it."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gemma_vocab
import numpy as np
import pytest
import torch
from gguf_files import copied, whole, write_model
from tiny import oracle_name, tiny_config, tiny_model
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint, Entry, StoredVocabulary
from sfumato.checkpoints.formats import gguf_blocks as blocks
from sfumato.checkpoints.formats import gguf_writer
from sfumato.checkpoints.formats.gguf import PlannedBlocks, read_header, write_file
from sfumato.checkpoints.formats.gguf_model import open_gguf
from sfumato.checkpoints.formats.gguf_names import tensor_table
from sfumato.checkpoints.formats.gguf_writer import vocabulary_of, write_gguf
from sfumato.checkpoints.headers import MAX_GGUF_COUNT
from sfumato.errors import CheckpointError, InputError, SfumatoError
from sfumato.model.config import LayerConfig, ModelConfig, Rope
from sfumato.text.tokenizer import Tokenizer

NANO = Path(__file__).parents[3] / "sfumato" / "nano"


def library() -> Any:
    return pytest.importorskip("gguf", reason="needs the gguf package, the format's own library")


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))


# --- a model in a file ---


def wide_config(**changes: Any) -> ModelConfig:
    """A small configuration whose rows the K kinds can take (256), but not all of them, as in the release."""
    sliding, full = LayerConfig(32, 2, 6, Rope(10_000.0)), LayerConfig(64, 1, None, Rope(1e6, 0.25, 1.0, True))
    shape = {"hidden_size": 256, "intermediate_size": 288, "num_heads": 4, "num_experts": 3, "expert_size": 64}
    return tiny_config(**{"vocab_size": 70, **shape, "layers": (sliding, full), **changes})


def rows_of(tensor: Tensor, first: int, last: int) -> Tensor:
    return tensor[first:last]


def checkpoint_of(config: ModelConfig, vocabulary: StoredVocabulary | None = None, **generation: Any) -> Checkpoint:
    """A tiny model in memory as a Checkpoint."""
    entries = {}
    for name, tensor in tiny_model(config).state_dict().items():
        released, kept = oracle_name(name), tensor.detach().bfloat16().float()
        entries[released] = Entry(released, tuple(kept.shape), kept.nbytes, "F32", partial(rows_of, kept))
    return Checkpoint(Path("memory"), "memory", config.to_dict(), entries, generation, vocabulary)


GENERATION: dict[str, Any] = {
    "max_denoising_steps": 24,
    "t_min": 0.4,
    "t_max": 0.8,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
}


def test_written_and_read_again(tmp_path: Path) -> None:
    config = wide_config()
    source = checkpoint_of(config, **GENERATION)
    progress: list[tuple[int, int]] = []
    for kind in ("BF16", "Q8_0"):
        write_gguf(source, tmp_path / "it.gguf", kind, progress=lambda done, total: progress.append((done, total)))
        actual = open_gguf(tmp_path / "it.gguf")
        assert ModelConfig.from_dict(actual.config) == config
        assert actual.format == "GGUF" and actual.vocabulary is None and actual.notices == ()
        ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": [1, 5]}
        assert actual.generation == {**GENERATION, **ids}
        assert list(actual.entries) == [ours for _, ours, _ in tensor_table(config)]
        assert set(actual.entries) == set(source.entries)
        for name, entry in actual.entries.items():
            expected = source.entries[name].read(0, entry.shape[0])
            if entry.stored == "Q8_0":
                expected = blocks.decode("Q8_0", blocks.encode("Q8_0", expected))
            assert entry.shape == source.entries[name].shape == tuple(expected.shape)
            assert torch.equal(entry.read(0, entry.shape[0]).float(), expected), name
        kinds = {entry.stored for entry in actual.entries.values()}
        assert kinds == {"F32", kind}
        assert actual.entries["model.decoder.layers.0.router.proj.weight"].stored == "F32"
        assert sum(entry.nbytes for entry in actual.entries.values()) + 4 * 32 == progress[-1][0] == progress[-1][1]
    assert progress == sorted(progress[: len(progress) // 2]) + sorted(progress[len(progress) // 2 :])
    assert [file.name for file in tmp_path.iterdir()] == ["it.gguf"]


def test_large_tensors_are_converted_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint_of(wide_config())
    write_gguf(source, tmp_path / "whole.gguf")
    reads: list[int] = []

    def counting(entry: Entry) -> Entry:
        def read(first: int, last: int) -> Tensor:
            reads.append((last - first) * int(np.prod(entry.shape[1:])))
            return entry.read(first, last)

        return dataclasses.replace(entry, read=read)

    monkeypatch.setattr(gguf_writer, "PART", 5000)
    entries = {name: counting(entry) for name, entry in source.entries.items()}
    write_gguf(dataclasses.replace(source, entries=entries), tmp_path / "parts.gguf")
    one, other = (read_header(tmp_path / f"{name}.gguf") for name in ("whole", "parts"))
    for name, stored in one.tensors.items():
        assert torch.equal(stored.read(), other.tensors[name].read()), name
    assert len(reads) > len(source.entries)
    assert max(reads) == 2 * 64 * 256  # one expert: no place of an axis is cut


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_the_library_reads_what_is_written(tmp_path: Path, kind: str) -> None:
    gguf = library()
    vocabulary = vocabulary_of(Tokenizer.from_folder(NANO), "the template")
    source = checkpoint_of(wide_config(vocab_size=512), vocabulary, **GENERATION)
    path = tmp_path / "it.gguf"
    write_gguf(source, path, kind)
    reader = gguf.GGUFReader(path)
    own = read_header(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert set(fields) == set(own.metadata)
    for name, value in fields.items():
        mine = own.metadata[name]
        assert (mine.tolist() if isinstance(mine, np.ndarray) else mine) == value, name
    names = {theirs: ours for theirs, ours, _ in tensor_table(ModelConfig.from_dict(source.config))}
    assert {tensor.name for tensor in reader.tensors} == {*names, "rope_freqs.weight"}
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name == "rope_freqs.weight":
            assert values.tolist() == [1.0] * 8 + [np.float32(1e30)] * 24
            continue
        entry = open_gguf(path).entries[names[tensor.name]]
        assert tuple(values.shape) == entry.shape
        assert same_bits(values, entry.read(0, entry.shape[0]).float()), tensor.name
    assert fields["general.file_type"] == {"Q8_0": 7, "BF16": 32}[kind]
    assert fields["diffusion-gemma.attention.head_count_kv"] == [2, 1]
    assert fields["diffusion-gemma.attention.sliding_window_pattern"] == [True, False]
    assert fields["tokenizer.chat_template"] == "the template"


def mixed_kind(name: str, shape: tuple[int, ...]) -> str:
    """What llama-quantize's Q4_K_M gives a tensor, fallbacks for rows of no multiple of 256 included."""
    if len(shape) == 1 or "gate_inp" in name:
        return "F32"
    if shape[-1] % 256:
        return "Q5_0" if "exps" in name else "Q8_0"
    if "token_embd" in name or "attn_v" in name:
        return "Q6_K"
    return "Q5_K" if "attn_k." in name else "Q4_K"


def write_mixed(path: Path, config: ModelConfig, **changes: Any) -> dict[str, Tensor]:
    """A file like a Q4_K_M, every number in it random; the released names to what is stored. `changes` of metadata have
    dots written as two underlines, and None takes a key away."""
    metadata = {key.replace("__", "."): value for key, value in changes.items()}
    return write_model(path, config, mixed_kind, metadata)


def test_a_mixed_file_opens(tmp_path: Path) -> None:
    config = wide_config()
    raws = write_mixed(tmp_path / "mixed.gguf", config)
    actual = open_gguf(tmp_path / "mixed.gguf")
    assert ModelConfig.from_dict(actual.config) == config
    assert {entry.stored for entry in actual.entries.values()} == {"F32", "Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q8_0"}
    for name, entry in actual.entries.items():
        whole = entry.read(0, entry.shape[0])
        assert tuple(whole.shape) == entry.shape and whole.dtype == torch.float32
        assert torch.equal(whole, blocks.decode(entry.stored, raws[name]).view(entry.shape))
        first, last = entry.shape[0] // 3, entry.shape[0] // 3 + (entry.shape[0] + 1) // 2
        assert torch.equal(entry.read(first, last), whole[first:last])
        assert (entry.packed is None) == (entry.stored == "F32")
        if entry.packed:
            part = entry.packed(first, last)
            assert part.shape == (last - first, *entry.shape[1:])
            assert same_bits(part.dense(), whole[first:last])
    with pytest.raises(InputError, match="places 0 to 70; 0 to 71 were asked for"):
        actual.entries["model.decoder.embed_tokens.weight"].read(0, 71)


@pytest.mark.parametrize("head", [16, 24, 64, 512])
@pytest.mark.parametrize("share", [0.25, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_the_angles_that_turn_survive(tmp_path: Path, head: int, share: float, factor: float) -> None:
    rope = Rope(5e5, share, factor, True)
    config = tiny_config(layers=(tiny_config().layers[0], LayerConfig(head, 1, None, rope)))
    write_gguf(checkpoint_of(config), tmp_path / "it.gguf")
    actual = ModelConfig.from_dict(open_gguf(tmp_path / "it.gguf").config).layers[1].rope
    assert int(actual.partial * head // 2) == int(share * head // 2)
    assert (actual.theta, actual.factor, actual.proportional) == (5e5, factor, True)
    if share in (0.25, 0.5, 1.0) and head * share % 2 == 0:
        assert actual == rope


def test_rows_of_no_multiple_of_32_stay_bf16(tmp_path: Path) -> None:
    write_gguf(checkpoint_of(tiny_config()), tmp_path / "it.gguf")
    entries = open_gguf(tmp_path / "it.gguf").entries
    assert entries["model.decoder.embed_tokens.weight"].stored == "BF16"
    assert entries["model.decoder.layers.0.self_attn.o_proj.weight"].stored == "Q8_0"
    assert entries["model.decoder.embed_tokens.weight"].read(0, 3).dtype == torch.bfloat16


# --- what is refused ---


def refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_gguf(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


REFUSED = [
    ("general.architecture", "gemma4", "its architecture is 'gemma4'; only 'diffusion-gemma' is read"),
    ("general.architecture", None, "its architecture is None"),
    ("general.alignment", 48, "general.alignment is 48; it must be a power of two"),
    ("general.type", "adapter", "it is a LoRA adapter and no model; load the model, and the adapter"),
    ("general.type", "mmproj", r"it is the part of a model that sees images \(mmproj\); give the model's own .gguf"),
    ("general.architecture", "clip", "it is the part of a model that sees images"),
    ("general.type", "imatrix", "it is an importance matrix and no model"),
    ("block_count", None, "block_count is None; it must be a whole number"),
    ("block_count", 5, "sliding_window_pattern has 2 entries; 5 are needed"),
    ("block_count", 10**6, "block_count is 1000000"),
    ("embedding_length", 512, r"output_norm.weight has the shape \[256\]; its metadata asks for \[512\]|token_embd"),
    ("embedding_length", 0, "hidden_size is 0"),
    ("attention.head_count", 0, "num_attention_heads is 0"),
    ("attention.head_count_kv", "two", "attention.head_count_kv is 'two'"),
    ("attention.head_count_kv", [2, 3], "heads must be a multiple"),
    ("attention.sliding_window", 0, "sliding_window is 0"),
    ("attention.sliding_window_pattern", [True, True], "the last layer of this model is always full"),
    ("attention.value_length", 32, "attention.value_length is 32, but attention.key_length is 64"),
    ("attention.layer_norm_rms_epsilon", -1.0, "rms_norm_eps is -1.0"),
    ("attention.layer_norm_rms_epsilon", float("nan"), "attention.layer_norm_rms_epsilon is nan"),
    ("attention.shared_kv_layers", 2, "attention.shared_kv_layers is 2; only 0 is supported"),
    ("rope.scaling.type", "yarn", "rope.scaling.type is 'yarn'"),
    ("rope.dimension_count_swa", 16, "rope.dimension_count_swa is 16"),
    ("expert_used_count", 4, "top_k_experts is 4, more than num_experts 3"),
    ("diffusion.canvas_length", None, "diffusion.canvas_length is None"),
    ("diffusion.eb_t_min", float("inf"), "diffusion.eb_t_min is inf"),
    ("diffusion.eb_t_min", "hot", "diffusion.eb_t_min is 'hot'"),
    ("diffusion.eb_t_max", -0.5, "t_max is -0.5; give a number above 0"),
    ("diffusion.eb_max_steps", 5000, "max_denoising_steps is 5000"),
    ("tokenizer.ggml.eos_token_ids", [1, 99], "eos_token_id is"),
    ("tokenizer.ggml.eos_token_ids", [1] * 101, "has 101 entries; at most 100"),
    ("tokenizer.ggml.bos_token_id", 70, "bos_token_id is 70"),
    ("tokenizer.ggml.tokens", ["a"], "its tokenizer is None; only 'gemma4' is read"),
]


@pytest.mark.parametrize(("key", "value", "match"), REFUSED)
def test_metadata_is_held_to_its_limits(tmp_path: Path, key: str, value: Any, match: str) -> None:
    known = key.split(".")[0] in ("general", "diffusion", "tokenizer", "split")
    path = tmp_path / "it.gguf"
    changes = {key if known else f"diffusion-gemma.{key}": value}
    if key == "general.alignment":  # the writer pads as it is told
        write_mixed(path, wide_config(), general__alignment=32)
        data = path.read_bytes()
        at = data.index(b"general.alignment") + len("general.alignment") + 4
        path.write_bytes(data[:at] + struct.pack("<I", value) + data[at + 4 :])
    else:
        write_mixed(path, wide_config(), **changes)
    refused(path, match)


def edited(path: Path, *edits: tuple[bytes, int, bytes]) -> None:
    """Overwrite bytes some way behind the end of a text in the file."""
    data = bytearray(path.read_bytes())
    for text, behind, new in edits:
        at = data.index(text) + len(text) + behind
        data[at : at + len(new)] = new
    path.write_bytes(data)


NORM = struct.pack("<Q", 18) + b"output_norm.weight"
EMBD = struct.pack("<Q", 17) + b"token_embd.weight"


@pytest.mark.parametrize(
    ("edits", "match"),
    [
        ([(b"", 0, b"GGML")], "does not begin like a GGUF file"),
        ([(b"", 0, b"tjgg")], "it is a ggml file from before GGUF; get the model as GGUF"),
        ([(b"", 0, b"version https://git-lfs")], "a Git LFS pointer to one; get the file itself, with git lfs pull"),
        ([(b"", 0, b"<!DOCTYPE html>")], "it is a web page"),
        ([(b"GGUF", 0, struct.pack("<I", 1))], "its GGUF version is 1; versions 2 and 3 are read"),
        ([(b"GGUF", 0, struct.pack(">I", 3))], "big-endian; convert it on the machine"),
        ([(b"GGUF", 4, struct.pack("<Q", 1 << 40))], f"announces {1 << 40} tensors; at most {MAX_GGUF_COUNT}"),
        ([(b"GGUF", 4, struct.pack("<Q", 65000))], "announces 65000 tensors|it is damaged"),
        ([(b"GGUF", 12, struct.pack("<Q", 1 << 63))], "metadata entries; at most"),
        ([(b"general.architecture", 4, struct.pack("<Q", 1 << 62))], "has 4611686018427387904 bytes; at most"),
        ([(b"general.architecture", 0, struct.pack("<I", 77))], "has the unknown type 77"),
        ([(b"general.architecture", 12, b"\xff\xfe")], "'general.architecture' is not UTF-8 text"),
        ([(b"head_count_kv", 4, struct.pack("<I", 9))], "an array of type 9; arrays hold numbers or strings"),
        ([(b"head_count_kv", 8, struct.pack("<Q", 1 << 60))], "numbers in .*at most"),
        ([(b"head_count_kv", 8, struct.pack("<Q", 1 << 25))], "it is damaged"),
        ([(b"general.type", -12, b"general.name")], "the metadata key 'general.name' is there twice"),
        ([(NORM, 0, struct.pack("<I", 0))], "'output_norm.weight' has 0 axes"),
        ([(NORM, 0, struct.pack("<I", 5))], "'output_norm.weight' has 5 axes"),
        ([(NORM, 4, struct.pack("<Q", 0))], r"'output_norm.weight' has the shape \[0\]"),
        ([(NORM, 4, struct.pack("<Q", 1 << 63))], "the file has .* it is truncated"),
        ([(NORM, 12, struct.pack("<I", 8))], "has the shape .*Q8_0 takes rows of a multiple of 32"),
        ([(NORM, 12, struct.pack("<I", 23))], "has the shape .*IQ4_XS takes rows of a multiple of 256"),
        ([(NORM, 12, struct.pack("<I", 28))], "is stored as F64; F32, .*quantise it to one of these"),
        ([(NORM, 12, struct.pack("<I", 15))], "is stored as Q8_K, which ggml computes with and no file"),
        ([(NORM, 12, struct.pack("<I", 32))], "laid out for one processor, which ggml has removed"),
        ([(NORM, 12, struct.pack("<I", 99))], "is stored as 99;"),
        ([(NORM, 16, struct.pack("<Q", 33))], "no multiple of the alignment 32"),
        ([(NORM, 16, struct.pack("<Q", 0))], "overlaps"),
        ([(NORM, 16, struct.pack("<Q", (1 << 64) - 32))], "it is truncated"),
        ([(EMBD, 4, struct.pack("<Q", 255))], "Q6_K takes rows of a multiple of 256"),
        ([(NORM, -18, b"output_norm.weighs")], "lacks the tensor output_norm.weight"),
        ([(NORM, -18, b"rope_freqs.weight\0")], "lacks the tensor output_norm.weight"),
    ],
)
def test_damage_is_one_sentence(tmp_path: Path, edits: list[tuple[bytes, int, bytes]], match: str) -> None:
    path = tmp_path / "it.gguf"
    write_mixed(path, wide_config())
    edited(path, *edits)
    refused(path, match)


def test_truncated_files_and_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "it.gguf"
    write_mixed(path, wide_config())
    data = path.read_bytes()
    for count in (0, 3, 20, 100, 3000, len(data) // 2, len(data) - 1000):
        path.write_bytes(data[:count])
        refused(path, "damaged|begin like|truncated|ends inside")
    for other in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(CheckpointError, match="there is no file"):
            open_gguf(other)


def test_tensors_twice_and_unexpected(tmp_path: Path) -> None:
    def one(name: str) -> PlannedBlocks:
        return PlannedBlocks(name, "F32", (32,), partial(whole, torch.zeros(128, dtype=torch.uint8)))

    write_file(tmp_path / "it.gguf", {"general.architecture": "diffusion-gemma"}, [one("a"), one("a")])
    refused(tmp_path / "it.gguf", "the tensor 'a' is there twice")
    config = wide_config()
    source = checkpoint_of(config)
    write_gguf(source, tmp_path / "it.gguf")
    metadata, plan = copied(tmp_path / "it.gguf")
    write_file(tmp_path / "more.gguf", metadata, [*plan, one("blk.2.attn_norm.weight")])
    refused(tmp_path / "more.gguf", "unexpected tensor 'blk.2.attn_norm.weight'")
    write_file(tmp_path / "head.gguf", metadata, [*plan, one("output.weight")])
    refused(tmp_path / "head.gguf", r"output.weight has the shape \[32\]; its metadata asks for \[70, 256\]")
    head = torch.randn(70, 256, generator=torch.Generator().manual_seed(9))
    output = PlannedBlocks("output.weight", "F32", (70, 256), partial(whole, blocks.encode("F32", head)))
    write_file(tmp_path / "head.gguf", metadata, [*plan, output])
    actual = open_gguf(tmp_path / "head.gguf")
    assert set(actual.entries) == {*source.entries, "lm_head.weight"} and actual.notices == ()
    assert torch.equal(actual.entries["lm_head.weight"].read(0, 70), head)


@pytest.mark.parametrize(
    "divisors", [[1e30] * 32, [1.0, 2.0, *[1e30] * 30], [1.0, 1e30, 1.0, *[1e30] * 29], [float("nan")] * 32]
)
def test_divisors_that_say_nothing(tmp_path: Path, divisors: list[float]) -> None:
    path = tmp_path / "it.gguf"
    write_gguf(checkpoint_of(wide_config()), path)
    stored = read_header(path).tensors["rope_freqs.weight"]
    data = bytearray(path.read_bytes())
    data[stored.start : stored.start + stored.nbytes] = np.array(divisors, "<f4").tobytes()
    path.write_bytes(data)
    refused(path, "must hold one divisor for the angles that turn")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    source, path = checkpoint_of(wide_config()), tmp_path / "it.gguf"
    with pytest.raises(InputError, match="kind is 'Q2_K'; a GGUF is written as Q8_0 or BF16"):
        write_gguf(source, path, "Q2_K")
    first, *rest = source.entries
    with pytest.raises(InputError, match="is needed; memory lacks it"):
        write_gguf(dataclasses.replace(source, entries={name: source.entries[name] for name in rest}), path)
    odd = dataclasses.replace(source.entries[first], shape=(1, 2))
    with pytest.raises(InputError, match=r"memory has it as \[1, 2\]"):
        write_gguf(dataclasses.replace(source, entries={**source.entries, first: odd}), path)
    with pytest.raises(InputError, match="the vocabulary has 512 tokens, the model 70"):
        write_gguf(source, path, vocabulary=vocabulary_of(Tokenizer.from_folder(NANO)))
    turning = LayerConfig(8, 2, 6, Rope(1e4, 0.5, 1.0, True))
    with pytest.raises(InputError, match="sliding layers turn only a part"):
        write_gguf(checkpoint_of(tiny_config(layers=(turning, tiny_config().layers[1]))), path)
    with pytest.raises(SfumatoError, match=r"cannot write .*No such file"):
        write_gguf(source, tmp_path / "nowhere" / "it.gguf")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    source, path = checkpoint_of(wide_config()), tmp_path / "it.gguf"
    path.write_bytes(b"what was there")

    def broken(first: int, last: int) -> Tensor:
        raise CheckpointError("the disk is gone")

    last = list(source.entries)[-1]
    entries = {**source.entries, last: dataclasses.replace(source.entries[last], read=broken)}
    with pytest.raises(CheckpointError, match="the disk is gone"):
        write_gguf(dataclasses.replace(source, entries=entries), path)
    assert path.read_bytes() == b"what was there" and os.listdir(tmp_path) == ["it.gguf"]
    short = dataclasses.replace(source.entries[last], read=lambda first, last: torch.zeros(0))
    with pytest.raises(InputError, match="0 were given"):
        write_gguf(dataclasses.replace(source, entries={**source.entries, last: short}), path)
    assert path.read_bytes() == b"what was there" and os.listdir(tmp_path) == ["it.gguf"]


def test_a_file_that_changes_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "it.gguf"
    write_gguf(checkpoint_of(wide_config()), path)
    entry = list(open_gguf(path).entries.values())[-2]
    os.truncate(path, 20_000)
    with pytest.raises(CheckpointError, match=r"ends inside blk"):
        entry.read(0, 1)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read blk.*No such file"):
        entry.read(0, 1)


# --- the vocabulary ---


def test_a_vocabulary_travels_in_the_file(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(NANO)
    template = (NANO / "chat_template.jinja").read_text(encoding="utf-8")
    vocabulary = vocabulary_of(tokenizer, template)
    config = wide_config(vocab_size=512, eos_ids=(1, 5, 13))
    write_gguf(checkpoint_of(config, **GENERATION), tmp_path / "it.gguf", vocabulary=vocabulary)
    actual = open_gguf(tmp_path / "it.gguf")
    assert actual.vocabulary == vocabulary
    assert actual.generation["eos_token_id"] == [1, 5, 13]
    assert vocabulary.special == {"bos": 2, "eos": 1, "pad": 0, "unk": 3}
    built = Tokenizer.from_vocabulary(vocabulary.tokens, vocabulary.kinds, vocabulary.merges)
    built.save(tmp_path)
    saved = Tokenizer.from_folder(tmp_path)
    for one in (built, saved):
        assert one.special == tokenizer.special and one.special_ids == tokenizer.special_ids
        assert one.vocab_size == tokenizer.vocab_size
        for text in ("Solve this Sudoku: 53", "naïve  café\n\n\t🦙", "<|turn>user\nhi<turn|>"):
            for parse in (False, True):
                assert one.encode(text, parse_special=parse) == tokenizer.encode(text, parse_special=parse)
            assert one.decode(one.encode(text)) == text
    assert json.loads(saved.to_json()) == json.loads(built.to_json())
    metadata = read_header(tmp_path / "it.gguf").metadata
    assert metadata["tokenizer.ggml.model"] == "gemma4"
    assert metadata["tokenizer.ggml.eot_token_id"] == 5 and metadata["tokenizer.ggml.eos_token_id"] == 1


def test_the_sampler_of_a_folder_comes_along(tmp_path: Path) -> None:
    source = dataclasses.replace(checkpoint_of(wide_config()), path=NANO)
    write_gguf(source, tmp_path / "it.gguf")
    expected = json.loads((NANO / "generation_config.json").read_text(encoding="utf-8"))
    del expected["max_new_tokens"]  # it would cap every answer
    assert open_gguf(tmp_path / "it.gguf").generation == expected


def test_ends_of_an_answer_without_their_array(tmp_path: Path) -> None:
    """As llama.cpp's converter leaves it: one id, and two tokens that are known to end an answer."""
    vocabulary = vocabulary_of(Tokenizer.from_folder(NANO))
    config = wide_config(vocab_size=512, eos_ids=(1,))
    more = {
        key: value
        for key, value in gguf_writer.tokenizer_of(config, vocabulary).items()
        if not key.endswith("token_ids")
    }
    write_mixed(tmp_path / "it.gguf", config, **{**more, "tokenizer.ggml.eos_token_ids": None})
    actual = open_gguf(tmp_path / "it.gguf")
    assert actual.generation["eos_token_id"] == [1, 5, 13]
    assert ModelConfig.from_dict(actual.config).eos_ids == (1, 5, 13)


def test_vocabularies_that_do_not_fit_together() -> None:
    good = (["<unk>", "a", "b", "ab"], [3, 1, 1, 1], ["a b"])
    assert Tokenizer.from_vocabulary(*good).encode("ab") == [3]
    for tokens, kinds, merges, why in (
        (["<unk>", "a", "a", "ab"], *good[1:], "3 of them different"),
        (good[0], [3, 1], good[2], "and 2 kinds"),
        (*good[:2], ["a c"], "merges do not fit"),
        (*good[:2], ["ab"], "merges do not fit"),
        (*good[:2], ["b a"], "merges do not fit"),
        (*good[:2], [""], "merges do not fit"),
        (["<unk>", "a", "b", "ab"], [3, 1, 1, 3], ["a b"], "spell the control token 'ab'"),
    ):
        with pytest.raises(CheckpointError, match=why):
            Tokenizer.from_vocabulary(tokens, kinds, merges)
    Tokenizer.from_vocabulary(["", "<unk>", "\0\0", "<0x00>"], [4, 3, 3, 6], [])


def test_a_tokenizer_cannot_be_saved_nowhere(tmp_path: Path) -> None:
    with pytest.raises(SfumatoError, match=r"cannot write the tokenizer to .*No such file"):
        Tokenizer.from_folder(NANO).save(tmp_path / "none")


@pytest.fixture(scope="module")
def gemma() -> Iterator[tuple[dict[str, Any], float]]:
    gemma_vocab.needs_file()
    begin = time.process_time()
    header = read_header(gemma_vocab.FILE)
    yield header.metadata, time.process_time() - begin


def test_gemmas_vocabulary(gemma: tuple[dict[str, Any], float]) -> None:
    metadata, seconds = gemma
    assert seconds < 5
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    assert (len(tokens), len(merges)) == (262_144, 514_906)
    assert lists(metadata) == gemma_vocab.metadata()
    tokenizer = Tokenizer.from_vocabulary(tokens, metadata["tokenizer.ggml.token_type"].tolist(), merges)
    for text, ids in gemma_vocab.vectors():
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == 262_144 and len(tokenizer.control_tokens) == 24
    vocabulary = vocabulary_of(tokenizer, metadata["tokenizer.chat_template"])
    assert vocabulary.tokens == tokens and vocabulary.merges == merges
    assert vocabulary.kinds == metadata["tokenizer.ggml.token_type"].tolist()
    assert vocabulary.special == {"bos": 2, "eos": 1, "pad": 0, "unk": 3}


def lists(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in metadata.items()}
