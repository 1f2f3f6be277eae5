"""checkpoints/save.py: a Model becomes a folder: shards, what is replaced, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_checkpoints import SLIDE, TINY, WHOLE, files, make, same

from sfumato.checkpoints import shards
from sfumato.checkpoints.load import PLAIN, load
from sfumato.checkpoints.names import released_name
from sfumato.checkpoints.save import save
from sfumato.errors import CheckpointError, InputError, SfumatoError
from sfumato.model.network import Model
from sfumato.ops.cpu import build


def test_shards(tmp_path: Path, model: Model) -> None:
    save(model, tmp_path, shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert set(index["weight_map"]) == {released_name(name) for name in model.state_dict()}
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    for shard in shards:
        assert sum(tensor.nbytes for tensor in load_file(tmp_path / shard).values()) <= max(20_000, largest)
    assert same(load(tmp_path, PLAIN), model)


def test_saving_over_an_older_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model-of-mine.safetensors").touch()
    for seed, shard_bytes in enumerate([20_000, 1 << 30, 40_000, 20_000, 20_000, 1 << 30, 1 << 30]):
        model = make(seed=seed)
        save(model, tmp_path, shard_bytes=shard_bytes)
        assert same(load(tmp_path, PLAIN), model)
        expected = {"config.json", "generation_config.json", "model-of-mine.safetensors"}
        expected |= {stored.file.name for stored in shards.stored_tensors(tmp_path).values()}
        expected |= set() if shard_bytes == 1 << 30 else {"model.safetensors.index.json"}
        assert set(files(tmp_path)) == expected


def test_a_failed_save_leaves_the_old_one(folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(folder)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "_write", full)
    with pytest.raises(SfumatoError, match=r"cannot write the checkpoint .*No space left"):
        save(make(seed=2), folder)
    assert files(folder) == before
    assert same(load(folder, PLAIN), model)


def test_saving_into_a_file(tmp_path: Path, model: Model) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SfumatoError, match=r"cannot write the checkpoint .*file"):
        save(model, tmp_path / "file")


def test_a_changed_model_is_not_saved(tmp_path: Path, model: Model) -> None:
    model.layers[1].get_submodule("mlp").register_buffer("scales", torch.ones(3))
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.scales is not as the released layout has it"):
        save(model, tmp_path)
    model = make()
    model.norm.weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(InputError, match=r"norm\.weight is not as"):
        save(model, tmp_path)
    assert files(tmp_path) == []


@pytest.mark.skipif(build.obstacle() is not None, reason=f"the library cannot be built: {build.obstacle()}")
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_packed_model_is_not_saved(folder: Path, tmp_path: Path, quantize: str | None) -> None:
    packed = load(folder, replace(PLAIN, ops="cpu", quantize=quantize))
    with pytest.raises(InputError, match=r"q_proj\.weight is not as .*; load with ops='fused' what is to be saved"):
        save(packed, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_tokenizer_and_generation_config(tmp_path: Path, model: Model) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "notes.txt"):
        (source / name).write_text(name)
    (source / "generation_config.json").write_text('{"max_denoising_steps": 12}')

    def generation() -> dict[str, Any]:
        value: dict[str, Any] = json.loads((tmp_path / "to" / "generation_config.json").read_text())
        return value

    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": [1, 5]}
    save(model, tmp_path / "to", tokenizer_from=source)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} < set(files(tmp_path / "to"))
    assert "notes.txt" not in files(tmp_path / "to")
    assert generation() == {**ids, "max_denoising_steps": 12}
    save(model, tmp_path / "to", tokenizer_from=tmp_path / "to", generation={"t_min": 0.5})  # onto itself
    assert (tmp_path / "to" / "chat_template.jinja").read_text() == "chat_template.jinja"
    assert generation() == {**ids, "t_min": 0.5}
    save(model, tmp_path / "to")
    assert generation() == ids
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"source has no tokenizer\.json to copy"):
        save(model, tmp_path / "to", tokenizer_from=source)


def test_a_config_that_cannot_be_written_is_not_saved(tmp_path: Path) -> None:
    unequal = make(replace(TINY, layers=(SLIDE, replace(SLIDE, kv_heads=4), WHOLE)))
    with pytest.raises(InputError, match=r"config\.json cannot say"):
        save(unequal, tmp_path)
    assert files(tmp_path) == []
