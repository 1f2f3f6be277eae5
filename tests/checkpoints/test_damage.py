"""checkpoints/load.py with damaged checkpoints: each damage is named in one sentence, before anything is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_checkpoints import ENCODER, NORM, edit, files, with_tensors

from sfumato.checkpoints import shards
from sfumato.checkpoints.load import PLAIN, load
from sfumato.checkpoints.save import save
from sfumato.errors import CheckpointError

SCALAR = ENCODER + "layers.1.layer_scalar"


def with_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def with_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """The checkpoint in shards, and its index changed."""

    def damage(folder: Path) -> None:
        save(load(folder, PLAIN), folder, shard_bytes=20_000)
        edit(folder / "model.safetensors.index.json", change)

    return damage


def with_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", lambda raw: raw["text_config"].update(changes))


def with_duplicate(folder: Path) -> None:
    save(load(folder, PLAIN), folder, shard_bytes=20_000)
    save_file({NORM: torch.ones(32)}, folder / "model-extra.safetensors")
    edit(
        folder / "model.safetensors.index.json", lambda raw: raw["weight_map"].update({"x": "model-extra.safetensors"})
    )


def header(table: object) -> bytes:
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text


def both(*damages: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def without(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).unlink()


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (without("config.json"), r"config\.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    "another model": (
        lambda f: edit(f / "config.json", lambda raw: raw.update(model_type="gemma4")),
        r"config\.json: hidden_size_per_layer_input is 256",
    ),
    "too large to exist": (
        with_config(hidden_size=1 << 24, num_experts=1 << 24, moe_intermediate_size=1 << 24),
        r"config\.json describes a model that is too large",
    ),
    "no weights": (without("model.safetensors"), r"has a config\.json and no weights"),
    "pickle alone": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"pickled weights, .* are never read",
    ),
    "pickle in disguise": (
        lambda f: torch.save({"a": torch.ones(1)}, f / "model.safetensors"),
        r"model\.safetensors is truncated or damaged",
    ),
    "missing": (with_tensors(lambda t: t.pop(NORM)), rf"lacks {NORM}$"),
    "missing scalar": (with_tensors(lambda t: t.pop(SCALAR)), rf"lacks {SCALAR}$"),
    "several missing": (
        with_tensors(lambda t: (t.pop(NORM), t.pop(SCALAR))),
        rf"lacks {SCALAR} and 1 other tensors?$",
    ),
    "unexpected": (
        with_tensors(lambda t: t.update({"model.decoder.layers.3.x": torch.ones(1)})),
        r"has an unexpected tensor model\.decoder\.layers\.3\.x",
    ),
    "our own name": (
        with_tensors(lambda t: t.update({"model.decoder.layers.0.encode_scalar": torch.ones(1)})),
        r"unexpected tensor model\.decoder\.layers\.0\.encode_scalar",
    ),
    "unexpected in the encoder": (
        with_tensors(lambda t: t.update({ENCODER + "self_conditioning.up_proj.weight": torch.ones(48, 32)})),
        r"unexpected tensor model\.encoder\.language_model\.self_conditioning",
    ),
    "misshapen": (
        with_tensors(lambda t: t.update({NORM: torch.ones(33)})),
        rf"{NORM} in .* has the shape \[33\]; config\.json asks for \[32\]",
    ),
    "scalar of no dimension": (
        with_tensors(lambda t: t.update({SCALAR: torch.tensor(1.0)})),
        rf"{SCALAR} .* has the shape \[\]; config\.json asks for \[1\]",
    ),
    "misshapen head": (
        with_tensors(lambda t: t.update({"lm_head.weight": torch.ones(97, 33)})),
        r"lm_head\.weight in .* has the shape \[97, 33\]",
    ),
    "misshapen copy": (
        with_tensors(lambda t: t.update({ENCODER + "norm.weight": torch.ones(1)})),
        r"language_model\.norm\.weight in .* has the shape \[1\]",
    ),
    "integers": (
        with_tensors(lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)})),
        rf"{NORM} in .*model\.safetensors is stored as I8; weights must be BF16, F16, F32, F64",
    ),
    "eight bits": (
        with_tensors(lambda t: t.update({NORM: torch.ones(32).to(torch.float8_e4m3fn)})),
        rf"{NORM} .* is stored as F8_E4M3",
    ),
    "config asks for another shape": (with_config(vocab_size=98), r"embed_tokens\.weight .* asks for \[98, 32\]"),
    "truncated": (with_bytes(lambda data: data[:-1]), r"model\.safetensors is truncated or damaged"),
    "empty": (with_bytes(lambda data: b""), r"model\.safetensors is truncated or damaged"),
    "longer": (with_bytes(lambda data: data + b"x"), r"model\.safetensors is truncated or damaged"),
    "header cut": (with_bytes(lambda data: data[:500]), r"model\.safetensors is truncated or damaged"),
    "header of no size": (with_bytes(lambda data: b"\xff" * 8 + data[8:]), r"model\.safetensors is truncated"),
    "header is a list": (with_bytes(lambda data: header([1])), r"model\.safetensors is truncated or damaged"),
    "header is deep": (
        with_bytes(lambda data: (100_000).to_bytes(8, "little") + b"[" * 100_000),
        r"model\.safetensors is truncated or damaged",
    ),
    "offsets before the file": (
        with_bytes(lambda data: header({NORM: {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}})),
        r"model\.safetensors is truncated or damaged",
    ),
    "offsets behind the file": (
        with_bytes(lambda data: header({NORM: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})),
        r"model\.safetensors is truncated or damaged",
    ),
    "a folder for weights": (
        both(without("model.safetensors"), lambda f: (f / "model.safetensors").mkdir()),
        r"neither model\.safetensors nor",
    ),
    "index without map": (with_index(lambda raw: raw.pop("weight_map")), r"index\.json has no weight_map"),
    "index is a list": (with_index(lambda raw: raw.update(weight_map=[1])), r"index\.json has no weight_map"),
    "index leads up": (
        with_index(lambda raw: raw["weight_map"].update({NORM: "../model-00001-of-00006.safetensors"})),
        rf"puts {NORM} in \.\./model.*, which is no plain file name",
    ),
    "index leads to the root": (
        with_index(lambda raw: raw["weight_map"].update({NORM: "/etc/passwd"})),
        r"/etc/passwd, which is no plain file name",
    ),
    "index leads to the parent": (
        with_index(lambda raw: raw["weight_map"].update({NORM: ".."})),
        r"\.\., which is no plain file name",
    ),
    "index of numbers": (
        with_index(lambda raw: raw["weight_map"].update({NORM: 1})),
        rf"puts {NORM} in 1, which is no plain",
    ),
    "index to no file": (
        with_index(lambda raw: raw["weight_map"].update({NORM: "model-00009.safetensors"})),
        r"model-00009\.safetensors is missing",
    ),
    "index to another shard": (
        with_index(lambda raw: raw["weight_map"].update({NORM: raw["weight_map"][SCALAR]})),
        rf"says that {NORM} is in model-.*, where it is not",
    ),
    "index promises more": (
        with_index(lambda raw: raw["weight_map"].update({"model.decoder.more": raw["weight_map"][NORM]})),
        r"says that model\.decoder\.more is in model-.*, where it is not",
    ),
    "duplicate": (with_duplicate, rf"{NORM} is both in "),
    "shard missing": (
        both(with_index(lambda raw: None), lambda f: (f / files(f)[3]).unlink()),
        r"model-\d+-of-\d+\.safetensors is missing",
    ),
    "shard cut": (
        both(with_index(lambda raw: None), lambda f: os.truncate(f / files(f)[3], 1000)),
        r"model-\d+-of-\d+\.safetensors is truncated or damaged",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_before_anything_is_read(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage, sentence = DAMAGE[kind]
    damage(folder)

    def read(stored: shards.Stored) -> torch.Tensor:
        raise AssertionError(f"{stored.name} was read")

    monkeypatch.setattr(shards.Stored, "read", read)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load(folder, PLAIN)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_long_names_are_cut_short(folder: Path) -> None:
    with_tensors(lambda t: t.update({"x\n" * 5000: torch.ones(1)}))(folder)
    with pytest.raises(CheckpointError, match="unexpected tensor x x") as caught:
        load(folder, PLAIN)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_the_file_is_an_error_of_ours(folder: Path, data: st.DataObject) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))])
    for at in data.draw(st.lists(st.integers(0, size - 1), max_size=4)):
        if at < len(damaged):
            damaged[at] = data.draw(st.integers(0, 255))
    try:
        path.write_bytes(damaged)
        load(folder, PLAIN)
    except CheckpointError as error:
        assert "\n" not in str(error)
    finally:
        path.write_bytes(whole)
