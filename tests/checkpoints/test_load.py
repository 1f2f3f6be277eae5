"""checkpoints/load.py: a checkpoint becomes a Model: dtypes, devices, what is left aside, peak memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import ENCODER, REFERENCE, TINY, WHOLE, files, make, same

from sfumato.checkpoints.contents import match
from sfumato.checkpoints.load import PLAIN, load
from sfumato.checkpoints.save import save
from sfumato.errors import CheckpointError, InputError
from sfumato.model.network import Model, products
from sfumato.ops.contract import Ops
from sfumato.ops.packed import Packed


def test_round_trip(folder: Path, model: Model) -> None:
    again = load(folder, PLAIN)
    assert same(again, model)
    assert again.config == model.config
    assert again.ops.name == "fused"
    assert again.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert files(folder) == ["config.json", "generation_config.json", "model.safetensors"]
    assert load(folder, PLAIN, operations=REFERENCE).ops is REFERENCE
    assert load(str(folder), replace(PLAIN, ops="reference")).ops.name == "reference"


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float64"])
def test_dtypes(folder: Path, model: Model, tmp_path: Path, name: str) -> None:
    dtype = getattr(torch, name)
    converted = load(folder, replace(PLAIN, dtype=name))
    assert {tensor.dtype for tensor in converted.state_dict().values()} == {dtype}
    assert same(converted, make().to(dtype))
    save(converted, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == name
    assert same(load(tmp_path / "again", PLAIN), converted)  # the checkpoint's own dtype


def test_own_dtype_is_that_of_the_embedding(folder: Path, model: Model) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.decoder.embed_tokens.weight"
    save_file(tensors | {name: tensors[name].bfloat16()}, folder / "model.safetensors")
    assert {tensor.dtype for tensor in load(folder, PLAIN).state_dict().values()} == {torch.bfloat16}


def test_end_ids_of_generation_config(folder: Path) -> None:
    assert load(folder, PLAIN).config.eos_ids == (1, 5)
    path = folder / "generation_config.json"
    for value, expected in ((7, (7,)), ([1, 96, 50], (1, 96, 50)), (None, (1, 5))):
        path.write_text(json.dumps({"eos_token_id": value}))
        assert load(folder, PLAIN).config.eos_ids == expected
    path.unlink()
    assert load(folder, PLAIN).config.eos_ids == (1, 5)
    path.write_text('{"eos_token_id": [1, 97]}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id 97 is not among the 97 tokens"):
        load(folder, PLAIN)


def test_operations_are_asked_about_every_kind_and_width(
    folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What takes one width of a kind may refuse another: groups must divide it."""
    samples: list[Packed] = []

    def load_ops(name: str, device: Any, dtype: torch.dtype, packed: list[Packed]) -> Ops:
        samples.extend(packed)
        return REFERENCE

    monkeypatch.setattr("sfumato.checkpoints.load.load_ops", load_ops)
    load(folder, replace(PLAIN, quantize="int8"))
    widths = {getattr(owner, leaf).shape[-1] for owner, leaf in products(model)}
    assert sorted((one.kind, one.shape[-1]) for one in samples) == sorted(("int8", width) for width in widths)
    assert len(widths) > 1


def test_progress_counts_bytes(folder: Path, model: Model) -> None:
    progress: list[tuple[int, int]] = []
    load(folder, replace(PLAIN, dtype="bfloat16"), progress=lambda *both: progress.append(both))
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert len(progress) == len(model.state_dict())
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert {all_ for _, all_ in progress} == {total}
    assert progress[-1][0] == total


def test_tied_copies_are_left_aside(folder: Path, model: Model) -> None:
    """lm_head without a word, the encoder's own copies with one."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.decoder.embed_tokens.weight"].clone()}, path)
    notices: list[str] = []
    assert same(load(folder, PLAIN, notice=notices.append), model)
    assert notices == []
    copies = {
        name.replace("model.decoder.", ENCODER): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith("model.decoder.") and "layer_scalar" not in name and "self_conditioning" not in name
    }
    assert ENCODER + "norm.weight" in copies and ENCODER + "embed_tokens.weight" in copies
    save_file(tensors | copies, path)
    assert same(load(folder, PLAIN, notice=notices.append), model)
    assert len(notices) == 1 and f"{len(copies)} tensors twice" in notices[0]
    assert same(load(folder, PLAIN), model)  # and nobody need listen


def test_a_file_that_shrinks_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def cut(*arguments: Any) -> Any:
        os.truncate(folder / "model.safetensors", 60_000)
        return match(*arguments)

    monkeypatch.setattr("sfumato.checkpoints.load.match", cut)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends inside model\."):
        load(folder, PLAIN)

    def remove(*arguments: Any) -> Any:
        matched = match(*arguments)
        (folder / "model.safetensors").unlink()
        return matched

    monkeypatch.setattr("sfumato.checkpoints.load.match", remove)
    save(make(), folder)
    with pytest.raises(CheckpointError, match=r"cannot read model\.decoder\.embed_tokens\.weight from .*No such file"):
        load(folder, PLAIN)


def test_wrong_arguments(folder: Path) -> None:
    with pytest.raises(InputError, match="there is no device 'toaster'; give auto, cpu, cuda"):
        load(folder, replace(PLAIN, device="toaster"))
    with pytest.raises(InputError, match="dtype is 'int8'; choose one of bfloat16, float16, float32, float64"):
        load(folder, replace(PLAIN, dtype="int8"))
    with pytest.raises(InputError, match=r"dtype is 'torch\.int8'"):
        load(folder, replace(PLAIN, dtype="torch.int8"))
    with pytest.raises(InputError, match="no operations named 'x'"):
        load(folder, replace(PLAIN, ops="x"))


WATCH = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from sfumato.checkpoints.load import PLAIN, load

def status(name):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name + ":"))
    return int(line.split()[1]) * 1024

load(sys.argv[1], replace(PLAIN, dtype=sys.argv[3]))  # what torch sets up once
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
model = load(sys.argv[2], replace(PLAIN, dtype=sys.argv[3]))
peak = status("VmHWM")
sizes = [tensor.nbytes for tensor in model.state_dict().values()]
print(before, peak, sum(sizes), max(sizes))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("layers", [pytest.param(1, id="small"), pytest.param(4, id="600 MB", marks=pytest.mark.slow)])
def test_peak_memory(tmp_path: Path, folder: Path, layers: int) -> None:
    """At most the finished model, its largest tensor and 200 MB (here a quarter of that) above where it began."""
    is_large = layers > 1
    config = replace(
        TINY,
        vocab_size=65536 if is_large else 16384,
        hidden_size=1024,
        intermediate_size=2048,
        num_experts=16 if is_large else 4,
        expert_size=1024,
        layers=(WHOLE,) * layers,
    )
    with torch.device("meta"):
        empty = Model(config, REFERENCE).to(torch.bfloat16)
    save(empty.to_empty(device="cpu"), tmp_path / "large")
    try:
        size = (tmp_path / "large" / "model.safetensors").stat().st_size
        for dtype, factor in (("bfloat16", 1), ("float32", 2)):
            command = [sys.executable, "-c", WATCH, str(folder), str(tmp_path / "large"), dtype]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            before, peak, total, largest = (int(word) for word in out.split())
            mib = {"file": size, "model": total, "largest tensor": largest, "before": before, "peak": peak}
            print(dtype, {name: value >> 20 for name, value in mib.items()}, "MiB")
            assert abs(total - factor * size) < 100_000
            assert peak - before <= total + largest + (50 << 20)
    finally:
        shutil.rmtree(tmp_path / "large")
