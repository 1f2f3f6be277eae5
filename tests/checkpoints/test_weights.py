"""Checkpoints there and back, with transformers on the other side; damage of every kind; the peak of memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sfumato import ops
from sfumato.checkpoints import shards, weights
from sfumato.errors import CheckpointError, InputError, SfumatoError
from sfumato.model.cache import KVCache
from sfumato.model.config import FULL, SLIDING, LayerConfig, ModelConfig, Rope
from sfumato.model.network import Model
from sfumato.ops.cpu import build

REFERENCE = ops.load("reference")
SLIDE = LayerConfig(head_dim=16, kv_heads=2, window=8, rope=Rope(10_000.0))
WHOLE = LayerConfig(head_dim=32, kv_heads=1, window=None, rope=Rope(1e6, partial=0.25, proportional=True))
TINY = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_experts=4,
    top_k_experts=2,
    expert_size=16,
    layers=(SLIDE, SLIDE, WHOLE),
    canvas_length=8,
    max_position=4096,
    eos_ids=(1, 5),
)
RELEASED_SPELLING: dict[str, Any] = {"global_head_dim": 32, "num_global_key_value_heads": 1}
ENCODER = "model.encoder.language_model."


def stir_(tensors: dict[str, torch.Tensor], seed: int) -> None:
    """Norms, router scales and layer scalars away from one, matrices away from what was drawn."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if "scalar" in name:
            tensor.uniform_(0.5, 1.2, generator=generator)
        else:
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.3 if tensor.dim() < 2 else 0.15)


@torch.no_grad()
def make(config: ModelConfig = TINY, seed: int = 1) -> Model:
    model = Model(config, REFERENCE).init_(seed)
    stir_(model.state_dict(), seed)
    return model


@pytest.fixture
def model() -> Model:
    return make()


@pytest.fixture
def folder(tmp_path: Path, model: Model) -> Path:
    weights.save(model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def same(one: Model, two: Model) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# ---- names ----------------------------------------------------------------------------------------------------------


def test_names_both_ways(model: Model) -> None:
    for own in model.state_dict():
        assert weights.own_name(weights.released_name(own)) == own
    assert weights.released_name("layers.2.encode_scalar") == ENCODER + "layers.2.layer_scalar"
    assert weights.released_name("layers.2.denoise_scalar") == "model.decoder.layers.2.layer_scalar"
    assert weights.released_name("norm.weight") == "model.decoder.norm.weight"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "norm.weight",
        "lm_head.weight",
        "model.decoder.",
        ENCODER + "norm.weight",
        "model.decoder.layers.0.encode_scalar",
        "model.encoder.vision_tower.layers.0.layer_scalar",
    ],
)
def test_names_of_no_tensor_of_ours(name: str) -> None:
    assert weights.own_name(name) is None


# ---- there and back -------------------------------------------------------------------------------------------------


def test_round_trip(folder: Path, model: Model) -> None:
    again = weights.load(folder)
    assert same(again, model)
    assert again.config == model.config
    assert again.ops.name == "fused"
    assert again.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert files(folder) == ["config.json", "generation_config.json", "model.safetensors"]
    assert weights.load(folder, ops=REFERENCE).ops is REFERENCE
    assert weights.load(str(folder), ops="reference").ops.name == "reference"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", torch.bfloat16])
def test_dtypes(folder: Path, model: Model, tmp_path: Path, dtype: str | torch.dtype) -> None:
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    converted = weights.load(folder, dtype=dtype)
    assert {tensor.dtype for tensor in converted.state_dict().values()} == {wanted}
    assert same(converted, make().to(wanted))
    weights.save(converted, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")
    assert same(weights.load(tmp_path / "again"), converted)  # the checkpoint's own dtype


def test_own_dtype_is_that_of_the_embedding(folder: Path, model: Model) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.decoder.embed_tokens.weight"
    save_file(tensors | {name: tensors[name].bfloat16()}, folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.load(folder).state_dict().values()} == {torch.bfloat16}


def test_shards(tmp_path: Path, model: Model) -> None:
    weights.save(model, tmp_path, shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert set(index["weight_map"]) == {weights.released_name(name) for name in model.state_dict()}
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    for shard in shards:
        assert sum(tensor.nbytes for tensor in load_file(tmp_path / shard).values()) <= max(20_000, largest)
    assert same(weights.load(tmp_path), model)


def test_saving_over_an_older_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model-of-mine.safetensors").touch()
    for seed, shard_bytes in enumerate([20_000, 1 << 30, 40_000, 20_000, 20_000, 1 << 30, 1 << 30]):
        model = make(seed=seed)
        weights.save(model, tmp_path, shard_bytes=shard_bytes)
        assert same(weights.load(tmp_path), model)
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
        weights.save(make(seed=2), folder)
    assert files(folder) == before
    assert same(weights.load(folder), model)


def test_saving_into_a_file(tmp_path: Path, model: Model) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SfumatoError, match=r"cannot write the checkpoint .*file"):
        weights.save(model, tmp_path / "file")


def test_a_changed_model_is_not_saved(tmp_path: Path, model: Model) -> None:
    model.layers[1].get_submodule("mlp").register_buffer("scales", torch.ones(3))
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.scales is not as the released layout has it"):
        weights.save(model, tmp_path)
    model = make()
    model.norm.weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(InputError, match=r"norm\.weight is not as"):
        weights.save(model, tmp_path)
    assert files(tmp_path) == []


@pytest.mark.skipif(build.obstacle() is not None, reason=f"the library cannot be built: {build.obstacle()}")
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_packed_model_is_not_saved(folder: Path, tmp_path: Path, quantize: str | None) -> None:
    packed = weights.load(folder, ops="cpu", quantize=quantize)
    with pytest.raises(InputError, match=r"q_proj\.weight is not as .*; load with ops='fused' what is to be saved"):
        weights.save(packed, tmp_path / "packed")
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
    weights.save(model, tmp_path / "to", tokenizer_from=source)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} < set(files(tmp_path / "to"))
    assert "notes.txt" not in files(tmp_path / "to")
    assert generation() == {**ids, "max_denoising_steps": 12}
    weights.save(model, tmp_path / "to", tokenizer_from=tmp_path / "to", generation={"t_min": 0.5})  # onto itself
    assert (tmp_path / "to" / "chat_template.jinja").read_text() == "chat_template.jinja"
    assert generation() == {**ids, "t_min": 0.5}
    weights.save(model, tmp_path / "to")
    assert generation() == ids
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"source has no tokenizer\.json to copy"):
        weights.save(model, tmp_path / "to", tokenizer_from=source)


def test_end_ids_of_generation_config(folder: Path) -> None:
    assert weights.load(folder).config.eos_ids == (1, 5)
    path = folder / "generation_config.json"
    for value, expected in ((7, (7,)), ([1, 96, 50], (1, 96, 50)), (None, (1, 5))):
        path.write_text(json.dumps({"eos_token_id": value}))
        assert weights.load(folder).config.eos_ids == expected
    path.unlink()
    assert weights.load(folder).config.eos_ids == (1, 5)
    path.write_text('{"eos_token_id": [1, 97]}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id 97 is not among the 97 tokens"):
        weights.load(folder)


def test_progress_counts_bytes(folder: Path, model: Model) -> None:
    seen: list[tuple[int, int]] = []
    weights.load(folder, dtype="bfloat16", progress=lambda *both: seen.append(both))
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert len(seen) == len(model.state_dict())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {all_ for _, all_ in seen} == {total}
    assert seen[-1][0] == total


def test_tensors_file(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).t(), "b": torch.ones((), requires_grad=True)}
    weights.write_tensors(tmp_path / "x", tensors, {"step": "3"})
    read, note = weights.read_tensors(tmp_path / "x")
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert note == {"format": "pt", "step": "3"}
    with pytest.raises(TypeError):
        weights.write_tensors(tmp_path / "x", {"a": torch.ones(1)}, {"step": 3})  # type: ignore[dict-item]
    assert files(tmp_path) == ["x"]
    assert weights.read_tensors(tmp_path / "x")[1]["step"] == "3"
    for path in (tmp_path / "y", tmp_path):
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            weights.read_tensors(path)


# ---- transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs() -> Any:
    """A tiny model of transformers' with vision, its layer scalars different in encode and denoise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    text = transformers.DiffusionGemmaTextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=16,
        sliding_window=8,
        layer_types=[SLIDING, SLIDING, FULL],
        use_bidirectional_attention="vision",
        **RELEASED_SPELLING,
    )
    size = dict.fromkeys(("hidden_size", "intermediate_size", "head_dim", "position_embedding_size"), 16)
    count = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    config = transformers.DiffusionGemmaConfig(
        text_config=text, vision_config={"model_type": "gemma4_vision", **size, **count}, canvas_length=8
    )
    model = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
    with torch.no_grad():
        stir_(dict(model.named_parameters()), seed=3)
        stir_({name: buffer for name, buffer in model.named_buffers() if "layer_scalar" in name}, seed=4)
    return model


@torch.no_grad()
def difference(ours: Model, theirs: Any) -> float:
    """The largest between the hidden states of encode, and logits of denoise with and without soft embedding."""
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 97, (2, 21), generator=generator)
    canvas = torch.randint(0, 97, (2, 8), generator=generator)
    past = DynamicCache(config=theirs.config.text_config)
    out = theirs(input_ids=tokens, past_key_values=past, decoder_input_ids=canvas)
    again = theirs(past_key_values=past, decoder_input_ids=canvas, self_conditioning_logits=out.logits)
    cache = KVCache.allocate(ours.config, 2, 64)
    hidden = ours.encode(tokens, cache)
    logits = ours.logits(ours.denoise(canvas, cache))
    soft = ours.ops.soft_embedding(out.logits, ours.embed_tokens.weight, ours.embed_scale)
    pairs = (
        (hidden, out.encoder_last_hidden_state),
        (logits, out.logits),
        (ours.logits(ours.denoise(canvas, cache, soft)), again.logits),
    )
    return max(float((one - two).abs().max()) for one, two in pairs)


def respell(folder: Path) -> None:
    """transformers' config.json in the release's spelling."""

    def change(raw: dict[str, Any]) -> None:
        del raw["text_config"]["per_layer_config"]
        raw["text_config"] |= RELEASED_SPELLING

    edit(folder / "config.json", change)


@pytest.mark.parametrize(("spelling", "shard"), [("released", "30KB"), ("per_layer_config", "5GB")])
def test_theirs_loads_here(theirs: Any, tmp_path: Path, spelling: str, shard: str) -> None:
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "5GB")
    if spelling == "released":
        respell(tmp_path)
    heard: list[str] = []
    ours = weights.load(tmp_path, ops="reference", notice=heard.append)
    assert len(heard) == 1
    assert "vision" in heard[0] and "\n" not in heard[0]
    assert difference(ours, theirs) < 1e-4
    scalars = ours.state_dict()
    assert not torch.equal(scalars["layers.0.encode_scalar"], scalars["layers.0.denoise_scalar"])


@pytest.mark.parametrize(("dtype", "shard_bytes"), [(torch.float32, 20_000), (torch.bfloat16, 1 << 30)])
def test_ours_loads_in_theirs(tmp_path: Path, model: Model, shard_bytes: int, dtype: torch.dtype) -> None:
    """No vision config of its own: what is written makes transformers build a small tower."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    of_theirs: Any = transformers.DiffusionGemmaForBlockDiffusion
    weights.save(model.to(dtype), tmp_path, shard_bytes=shard_bytes, generation={"max_denoising_steps": 9})
    theirs, report = of_theirs.from_pretrained(tmp_path, output_loading_info=True)
    assert theirs.dtype == dtype
    assert report["unexpected_keys"] == set() and report["mismatched_keys"] == set()
    assert all(".vision_tower." in name or ".embed_vision." in name for name in report["missing_keys"])
    assert sum(p.numel() for p in theirs.model.encoder.vision_tower.parameters()) < 30_000
    assert theirs.generation_config.max_denoising_steps == 9
    assert theirs.generation_config.eos_token_id == [1, 5]
    theirs = of_theirs.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert difference(weights.load(tmp_path, dtype="float32", ops="reference"), theirs) < 1e-4


def test_nano_loads_in_theirs() -> None:
    from transformers import DiffusionGemmaForBlockDiffusion

    theirs = DiffusionGemmaForBlockDiffusion.from_pretrained(weights.NANO, dtype=torch.float32).eval()
    ours = weights.load("nano", dtype="float32", ops="reference")
    assert difference(ours, theirs) < 1e-4
    assert list(ours.config.eos_ids) == theirs.generation_config.eos_token_id
    assert sum(p.numel() for p in theirs.model.encoder.vision_tower.parameters()) < 30_000


def test_a_config_that_cannot_be_written_is_not_saved(tmp_path: Path) -> None:
    unequal = make(replace(TINY, layers=(SLIDE, replace(SLIDE, kv_heads=4), WHOLE)))
    with pytest.raises(InputError, match=r"config\.json cannot say"):
        weights.save(unequal, tmp_path)
    assert files(tmp_path) == []


def test_vision_config_survives(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "a")
    weights.save(weights.load(tmp_path / "a"), tmp_path / "b")
    a, b = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert b["vision_config"] == a["vision_config"]
    assert {b[name] == a[name] for name in ("image_token_id", "boi_token_id", "eoi_token_id")} == {True}


def test_tied_copies_are_left_aside(folder: Path, model: Model) -> None:
    """lm_head without a word, the encoder's own copies with one."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.decoder.embed_tokens.weight"] + 1}, path)
    heard: list[str] = []
    assert same(weights.load(folder, notice=heard.append), model)
    assert heard == []
    copies = {
        name.replace("model.decoder.", ENCODER): tensor + 1
        for name, tensor in tensors.items()
        if name.startswith("model.decoder.") and "layer_scalar" not in name and "self_conditioning" not in name
    }
    assert ENCODER + "norm.weight" in copies and ENCODER + "embed_tokens.weight" in copies
    save_file(tensors | copies, path)
    assert same(weights.load(folder, notice=heard.append), model)
    assert len(heard) == 1 and f"{len(copies)} tensors twice" in heard[0]
    assert same(weights.load(folder), model)  # and nobody need listen


# ---- damage ---------------------------------------------------------------------------------------------------------

NORM = "model.decoder.norm.weight"
SCALAR = ENCODER + "layers.1.layer_scalar"


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def with_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def with_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """The checkpoint in shards, and its index changed."""

    def damage(folder: Path) -> None:
        weights.save(weights.load(folder), folder, shard_bytes=20_000)
        edit(folder / "model.safetensors.index.json", change)

    return damage


def with_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", lambda raw: raw["text_config"].update(changes))


def with_duplicate(folder: Path) -> None:
    weights.save(weights.load(folder), folder, shard_bytes=20_000)
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
    "no weights": (without("model.safetensors"), r"neither model\.safetensors nor .*never read"),
    "pickle alone": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"pickled weights .* are never read",
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
        weights.load(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_long_names_are_cut_short(folder: Path) -> None:
    with_tensors(lambda t: t.update({"x\n" * 5000: torch.ones(1)}))(folder)
    with pytest.raises(CheckpointError, match="unexpected tensor x x") as caught:
        weights.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_file_that_shrinks_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matched = weights._matched

    def cut(*arguments: Any) -> Any:
        os.truncate(folder / "model.safetensors", 60_000)
        return matched(*arguments)

    monkeypatch.setattr(weights, "_matched", cut)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends inside model\."):
        weights.load(folder)

    def remove(*arguments: Any) -> Any:
        found = matched(*arguments)
        (folder / "model.safetensors").unlink()
        return found

    monkeypatch.setattr(weights, "_matched", remove)
    weights.save(make(), folder)
    with pytest.raises(CheckpointError, match=r"cannot read model\.decoder\.embed_tokens\.weight from .*No such file"):
        weights.load(folder)


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
        weights.load(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)
    finally:
        path.write_bytes(whole)


def test_wrong_arguments(folder: Path) -> None:
    with pytest.raises(InputError, match="device 'toaster' cannot be used"):
        weights.load(folder, device="toaster")
    with pytest.raises(InputError, match="dtype is 'int8'; choose one of bfloat16, float16, float32, float64"):
        weights.load(folder, dtype="int8")
    with pytest.raises(InputError, match=r"dtype is 'torch\.int8'"):
        weights.load(folder, dtype=torch.int8)
    with pytest.raises(InputError, match="no operations named 'x'"):
        weights.load(folder, ops="x")


# ---- where checkpoints come from ------------------------------------------------------------------------------------


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert weights.resolve("nano") == Path(weights.__file__).parents[1] / "nano"
    assert weights.resolve(tmp_path) == weights.resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder nano"):
        weights.resolve(Path("nano"))
    (tmp_path / "nano").mkdir()
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "file.bin").touch()
    assert weights.resolve(Path("nano")) == Path("nano")
    assert weights.resolve("owner/name") == Path("owner/name")  # a folder comes before the hub
    with pytest.raises(CheckpointError, match=r"file\.bin is a file; give a \.gguf file, or the folder"):
        weights.resolve("file.bin")
    for path in ("", "none", "a/b/c", "/a/b", "../b", "a/b c", "a/b\n", "~nobody-at-all/x/y", "a\0b", "x" * 5000):
        with pytest.raises(CheckpointError, match="there is no folder"):
            weights.resolve(path)


def test_hub(folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def download(name: str, **how: Any) -> str:
        asked.append((name, how))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert same(weights.load("google/diffusiongemma-26B-A4B-it"), model)
    assert weights.resolve("a/b", weights=False) == folder
    assert asked[0][0] == "google/diffusiongemma-26B-A4B-it"
    assert set(asked[0][1]["allow_patterns"]) == {"*.json", "*.jinja", "*.safetensors"}
    assert set(asked[1][1]["allow_patterns"]) == {"*.json", "*.jinja"}
    from huggingface_hub.utils import filter_repo_objects

    names = ["config.json", "a.safetensors", "x/a.safetensors", "a.bin", "a.py", "x.jinja", "x/y.json"]
    assert list(filter_repo_objects(names, **asked[0][1])) == ["config.json", "a.safetensors", "x.jinja"]


def test_hub_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    for error, sentence in (
        (LocalEntryNotFoundError("many\nlines"), "it is not in the cache and the hub cannot be reached"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("one\ntwo"), "ValueError: one two"),
    ):

        def download(*arguments: Any, error: Exception = error, **more: Any) -> str:
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        with pytest.raises(CheckpointError, match=f"cannot get a/b from the hub: .*{sentence}") as caught:
            weights.resolve("a/b")
        assert "\n" not in str(caught.value)


def test_offline_cache(folder: Path, tmp_path: Path) -> None:
    """The hub's real cache layout, HF_HUB_OFFLINE set: found without a network; what is not there is one sentence."""
    cache = tmp_path / "hub" / "models--owner--name"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, cache / "snapshots" / ("0" * 40))
    script = (
        "from sfumato import weights\n"
        "print(len(weights.load('owner/name').state_dict()))\n"
        "try: weights.load('owner/other')\n"
        "except weights.CheckpointError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    out = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == [
        str(len(make().state_dict())),
        "cannot get owner/other from the hub: it is not in the cache and the hub cannot be reached",
    ]
    assert out.stderr == ""


# ---- memory ---------------------------------------------------------------------------------------------------------

WATCH = """
import sys, torch
from pathlib import Path
from sfumato import weights

def status(name):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name + ":"))
    return int(line.split()[1]) * 1024

weights.load(sys.argv[1], dtype=sys.argv[3])  # what torch sets up once
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
model = weights.load(sys.argv[2], dtype=sys.argv[3])
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
    weights.save(empty.to_empty(device="cpu"), tmp_path / "large")
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
