"""checkpoints/checkpoint.py: a checkpoint in fewer bits, `in_full`, is trained, calibrated and saved like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_checkpoints import same

from sfumato.checkpoints.checkpoint import in_full
from sfumato.checkpoints.convert import convert
from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.load import PLAIN, load
from sfumato.checkpoints.locate import NANO
from sfumato.checkpoints.save import save
from sfumato.cli import main
from sfumato.errors import InputError
from sfumato.ops.packed import Packed


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    convert(folder, "int8", tmp_path / "packed")
    return tmp_path / "packed"


def test_packed_weights_are_not_saved(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"q_proj\.weight is packed \(int8\) .* convert --to bf16`, or load"):
        save(load(packed, PLAIN), tmp_path / "saved")


def test_in_full_they_are_plain_and_say_the_same(packed: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(packed)
    options = replace(PLAIN, dtype="float32")
    model = load(in_full(checkpoint), options)
    assert not any(isinstance(part, Packed) for module in model.modules() for part in vars(module).values())
    weight = checkpoint.entries["model.decoder.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(model.state_dict()["layers.0.self_attn.q_proj.weight"], weight.read(0, weight.shape[0]))
    save(model, tmp_path / "saved")
    assert same(load(tmp_path / "saved", options), model)


def test_weights_that_have_no_codes_of_ours_are_not_rounded(folder: Path) -> None:
    """`Entry.fallback` rounds once more: not what is trained."""
    checkpoint = open_checkpoint(folder)
    name = "model.decoder.layers.0.self_attn.q_proj.weight"
    rounded = {**checkpoint.entries, name: replace(checkpoint.entries[name], fallback="int8")}
    entry = in_full(replace(checkpoint, entries=rounded)).entries[name]
    assert (entry.packed, entry.fallback) == (None, None)


def test_a_packed_checkpoint_is_calibrated(tmp_path: Path) -> None:
    convert(NANO, "int8", tmp_path / "packed")
    samples, target = tmp_path / "samples.txt", tmp_path / "int4"
    samples.write_text("one\n\ntwo")
    assert main(["quantize", str(tmp_path / "packed"), "-o", str(target), "--calibrate", str(samples)]) == 0
    assert open_checkpoint(target).format == "Sfumato int4"
