"""checkpoints/merged.py: an adapter is merged while a checkpoint is converted, from any format into any, counted once,
in bounded memory; transformers runs the result.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import random_adapter
from safetensors.torch import load_file, save_file
from small_checkpoints import TINY, make
from torch import Tensor

from sfumato.checkpoints import convert as conversion
from sfumato.checkpoints import shards
from sfumato.checkpoints.adapters import read_adapter, write_adapter
from sfumato.checkpoints.contents import entries_of
from sfumato.checkpoints.convert import convert
from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.formats import released
from sfumato.checkpoints.load import PLAIN, load
from sfumato.checkpoints.locate import NANO
from sfumato.checkpoints.merged import with_adapter
from sfumato.checkpoints.save import save
from sfumato.checkpoints.shards import Stored
from sfumato.cli import main
from sfumato.errors import InputError
from sfumato.model.adapters import Adapter, merge_
from sfumato.quant.formats import Format, pack


def values_of(path: Path) -> dict[str, Tensor]:
    entries = entries_of(open_checkpoint(path), lambda sentence: None)
    return {name: entry.read(0, entry.shape[0]).float() for name, entry in entries.items()}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """An adapter of everything for nano, and nano's weights with it, in float32."""
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    model = load("nano", replace(PLAIN, dtype="float32"))
    adapter = replace(random_adapter(model, size=0.02), whole={"norm.weight": torch.full((128,), 1.5)})
    write_adapter(adapter, folder, model, base="nano")
    merge_(model, adapter)
    return folder, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_result_is_the_merged_model(tuned: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """In bf16 the rounded sum, to the last bit; in a recipe the packed sum; in GGUF and MLX within their rounding."""
    folder, expected = tuned
    written = convert("nano", "bf16", tmp_path / "bf16", adapter=folder)
    assert written.notices == ()
    for name, value in values_of(tmp_path / "bf16").items():
        assert torch.equal(value, expected[name].bfloat16().float()), name
    convert("nano", "int8", tmp_path / "int8", adapter=folder)
    name = "layers.0.experts.gate_up_proj"
    assert torch.equal(values_of(tmp_path / "int8")[name], pack(expected[name], Format.named("int8")).dense())
    for to, allowed in (("gguf-q8_0", 1 / 100), ("mlx-8bit", 1 / 80)):
        target = tmp_path / ("out.gguf" if to.startswith("gguf") else to)
        convert("nano", to, target, adapter=folder)
        for name, value in values_of(target).items():
            moved = (value - expected[name]).abs()
            assert bool((moved <= allowed * expected[name].abs().amax(-1, keepdim=True)).all()), (to, name)


def test_packed_weights_are_packed_anew(tuned: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """Merged into what the codes say, with one sentence about it; untouched weights keep their codes."""
    convert("nano", "int8", tmp_path / "int8")
    before = values_of(tmp_path / "int8")
    model = load("nano", replace(PLAIN, dtype="float32"))
    adapter = random_adapter(model, ("attention",), size=0.02)
    write_adapter(adapter, tmp_path / "adapter", model, base="nano")
    written = convert(tmp_path / "int8", "int8", tmp_path / "out", adapter=tmp_path / "adapter")
    (sentence,) = written.notices
    assert "are stored as int8: each is unpacked, merged in float32 and rounded anew" in sentence
    after = values_of(tmp_path / "out")
    for name, value in after.items():
        if (own := adapter.factors.get(name)) is None:
            assert torch.equal(value, before[name]), name
        else:
            assert torch.equal(value, pack(before[name] + own.delta(), Format.named("int8")).dense()), name


def test_tied_weights_are_counted_once_where_a_file_has_them_twice(tmp_path: Path) -> None:
    model = make()
    save(model, tmp_path / "plain")
    path = tmp_path / "plain" / "model.safetensors"
    tensors = load_file(path)
    decoder = "model.decoder."
    twice = {
        name.replace(decoder, "model.encoder.language_model."): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(f"{decoder}layers") and "scalar" not in name
    }
    save_file(tensors | twice, path, {"format": "pt"})
    adapter = random_adapter(model)
    write_adapter(adapter, tmp_path / "adapter", model, base="x")
    convert(tmp_path / "plain", "bf16", tmp_path / "out", adapter=tmp_path / "adapter")
    merge_(model, adapter)
    for name, value in values_of(tmp_path / "out").items():
        assert torch.equal(value, model.state_dict()[name].bfloat16().float()), name


def test_a_head_of_its_own_comes_in(tmp_path: Path) -> None:
    """A tied model becomes one that reads logits out with another matrix."""
    model = make()
    save(model, tmp_path / "plain")
    head = torch.randn(TINY.vocab_size, TINY.hidden_size)
    adapter = Adapter(random_adapter(model, ("router",)).factors, whole={"lm_head.weight": head})
    write_adapter(adapter, tmp_path / "adapter", model, base="x")
    with pytest.raises(InputError, match=r"brings lm_head, a matrix of its own .* into a model that has none"):
        merge_(model, adapter)
    convert(tmp_path / "plain", "bf16", tmp_path / "out", adapter=tmp_path / "adapter")
    merged = load(tmp_path / "out", PLAIN)
    assert merged.lm_head is not None and torch.equal(merged.head_VD, head.bfloat16())


def test_transformers_runs_the_result(tmp_path: Path) -> None:
    import tiny
    from reference_passes import furthest, passes_of
    from transformers import DiffusionGemmaForBlockDiffusion

    theirs = tiny.oracle(tiny.tiny_config(), 0, 0.3, 0.5).bfloat16()
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs", replace(PLAIN, dtype="float32"))
    write_adapter(random_adapter(model), tmp_path / "adapter", model, base="x")
    convert(tmp_path / "theirs", "bf16", tmp_path / "out", adapter=tmp_path / "adapter")
    back = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    merge_(model, read_adapter(tmp_path / "adapter", model))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert furthest(model, back, passes_of(back)) < 1e-5


def test_no_more_is_read_than_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part at a time, the product for these places alone; and the same numbers as at once."""
    model = make()
    save(model, tmp_path / "plain")
    write_adapter(random_adapter(model), tmp_path / "adapter", model, base="x")
    checkpoint = with_adapter(open_checkpoint(tmp_path / "plain"), tmp_path / "adapter")
    entry = checkpoint.entries["model.decoder.layers.0.experts.gate_up_proj"]
    assert torch.equal(entry.read(1, 3), entry.read(0, 4)[1:3])
    row = checkpoint.entries["model.decoder.layers.0.mlp.up_proj.weight"]
    assert torch.allclose(row.read(3, 7), row.read(0, 48)[3:7], atol=1e-6)
    convert(tmp_path / "plain", "bf16", tmp_path / "one", adapter=tmp_path / "adapter")
    parts: list[int] = []
    read = Stored.read

    def counted(stored: Stored, *places: int) -> Tensor:
        tensor = read(stored, *places)
        parts.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(Stored, "read", counted)
    monkeypatch.setattr(released, "PART", 4100)  # an expert's gate and up
    convert(tmp_path / "plain", "bf16", tmp_path / "two", adapter=tmp_path / "adapter")
    assert max(parts) <= 4100
    two = values_of(tmp_path / "two")
    for name, value in values_of(tmp_path / "one").items():
        assert torch.allclose(value, two[name], rtol=0.01), name


def test_another_adapters_work_is_not_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    save(model, tmp_path / "plain")
    for seed in (0, 1):
        write_adapter(random_adapter(model, seed=seed), tmp_path / f"adapter{seed}", model, base="x")
    write = shards.write_shards

    def in_small_shards(folder: Path, plan: shards.PlannedFolder, *rest: Any) -> None:
        write(folder, replace(plan, shard_bytes=4_000), *rest)

    monkeypatch.setattr(conversion, "write_shards", in_small_shards)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "plain", "bf16", tmp_path / "out", stop, adapter=tmp_path / "adapter0")
    assert len(list((tmp_path / "out" / ".writing").glob("*.safetensors"))) >= 2
    convert(tmp_path / "plain", "bf16", tmp_path / "out", adapter=tmp_path / "adapter1")
    convert(tmp_path / "plain", "bf16", tmp_path / "fresh", adapter=tmp_path / "adapter1")
    fresh = values_of(tmp_path / "fresh")
    assert all(torch.equal(value, fresh[name]) for name, value in values_of(tmp_path / "out").items())


def test_what_cannot_be_merged_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = make()
    save(model, tmp_path / "plain")
    one, two = random_adapter(model), random_adapter(model, seed=1)
    write_adapter(Adapter(one.factors, two.factors), tmp_path / "split", model, base="x")
    with pytest.raises(InputError, match="changes encode and denoise differently, which one weight cannot hold"):
        convert(tmp_path / "plain", "bf16", tmp_path / "out", adapter=tmp_path / "split")
    other = make(replace(TINY, hidden_size=40))
    write_adapter(random_adapter(other), tmp_path / "other", other, base="google/other")
    with pytest.raises(InputError, match=r"made for google/other\) .* is for another model"):
        convert(tmp_path / "plain", "bf16", tmp_path / "out", adapter=tmp_path / "other")
    assert not (tmp_path / "out").exists()


# ---- from the command line -------------------------------------------------------------------------------------------


def test_the_commands(
    tuned: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, expected = tuned
    assert (
        main(["convert", "nano", "--adapter", str(folder), "--to", "bf16", "-o", str(tmp_path / "out"), "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["adapter"] == str(folder)
    assert torch.equal(values_of(tmp_path / "out")["norm.weight"], expected["norm.weight"])
    assert main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["adapter"]
    assert facts["base"] == "nano" and facts["ranks"] == [2] and facts["whole"] == 1
    assert main(["info", str(folder)]) == 0
    lines = capsys.readouterr().out
    assert "adapter (LoRA) of rank 2 for nano" in lines and "self_conditioning 3" in lines
    assert main(["info", str(tmp_path)]) == 2
    capsys.readouterr()
    assert main(["convert", "nano", "--adapter", str(NANO), "--to", "bf16", "-o", str(tmp_path / "other")]) == 2
    assert "is a whole model and no adapter" in " ".join(capsys.readouterr().err.split())
