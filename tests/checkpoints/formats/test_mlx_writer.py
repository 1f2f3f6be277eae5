"""checkpoints/formats/mlx_writer.py: our quantiser against mlx's own, and what is written, read again."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlx_files import (
    DTYPES,
    checkpoint_of,
    groups_of_all_kinds,
    mlx_dtype,
    numbers,
    quantise,
    random_weights,
    wide_config,
    write,
)
from safetensors.torch import load_file, save_file
from tiny import oracle_name
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint, Entry
from sfumato.checkpoints.formats.bits import as_words
from sfumato.checkpoints.formats.mlx import open_mlx
from sfumato.checkpoints.formats.mlx_writer import plan_mlx, rounded
from sfumato.errors import InputError
from sfumato.model.config import ModelConfig
from sfumato.ops import load

FORMS = list(itertools.product((3, 4, 5, 6, 8), (32, 64, 128)))

# ---- the quantiser --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_quantise_is_mlx_quantize_to_the_bit(bits: int, group: int, dtype: torch.dtype) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    weight = groups_of_all_kinds(dtype)
    codes, scale, bias = rounded(weight, bits, group, dtype)
    there = mx.array(weight.float().numpy()).astype(mlx_dtype(dtype))
    words, scales, biases = mx.quantize(there, group, bits)
    assert torch.equal(as_words(codes, bits), torch.from_numpy(numbers(words.view(mx.uint8))))
    assert torch.equal(scale.float(), torch.from_numpy(numbers(scales.astype(mx.float32))))
    assert torch.equal(bias.float(), torch.from_numpy(numbers(biases.astype(mx.float32))))
    assert scales.dtype == mlx_dtype(dtype) and scale.dtype == bias.dtype == dtype


def test_quantise_gives_what_mlx_gave() -> None:
    """mlx.core.quantize, 0.32.4, for where mlx is not installed."""
    weight = torch.tensor([[(i * i * 7 % 31 - 13) * 0.25 + (0.1 if i % 3 == 0 else 0) for i in range(32)]])
    four, eight = (quantise(weight, bits, 32, torch.float32) for bits in (4, 8))
    assert four.data.view(torch.int32).tolist() == [[-0x12BA1F41, 0x1BC6A5A7, 0x7A5A6CB2, -0x04F1AB22]]
    assert eight.data[0, :8].tolist() == [0xFC, 0xC0, 0, 0xF3, 0x52, 0x49, 0xD8, 0xED]
    actual = [form.parts[part].item() for form in (four, eight) for part in ("scale", "bias")]
    assert actual == [-0.46875, 3.75, -0.027372263371944427, 3.75]


@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_quantise_keeps_the_far_end_exact(bits: int, group: int) -> None:
    weight = torch.randn(16, 384, generator=torch.Generator().manual_seed(1))
    form = quantise(weight, bits, group, torch.float32)
    error = (form.dense() - weight).abs().unflatten(-1, (-1, group))
    rows = weight.unflatten(-1, (-1, group))
    far = rows.abs().argmax(-1, keepdim=True)
    assert (error.gather(-1, far) <= 1e-6).all()
    step = (rows.amax(-1) - rows.amin(-1)) / (2**bits - 1)
    # Half a step anywhere, but at the near end, which the snapped bias may cut off by half a step more.
    assert (error.amax(-1) <= step * 1.05).all() and (error.mean(-1) <= step * 0.35).all()
    zero = quantise(torch.cat([weight, torch.zeros(16, 384)], -1), bits, group, torch.float32).dense()
    assert (zero[:, 384:] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_quantise_refuses_what_has_no_scale(bad: float) -> None:
    weight = torch.ones(1, 64)
    weight[0, 3], weight[0, 4] = bad, -bad
    with pytest.raises(InputError, match="not finite, or too far apart"):
        quantise(weight, 4, 64, torch.float32)


# ---- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group", "expert_size", "dtype"), [
    (4, 64, 64, torch.bfloat16),
    (4, 32, 64, torch.float32),
    (4, 128, 96, torch.float16),
    (8, 64, 40, torch.bfloat16),
    (3, 64, 64, torch.bfloat16),
    (5, 32, 64, torch.float32),
    (6, 64, 64, torch.float16),
])  # fmt: skip
def test_what_is_written_reads_the_same(
    tmp_path: Path, bits: int, group: int, expert_size: int, dtype: torch.dtype
) -> None:
    config = wide_config(expert_size)
    weights = random_weights(config, dtype)
    stored = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    written = write(tmp_path, checkpoint_of(config, weights, stored), bits, group)
    assert written["quantization"] == written["quantization_config"]
    assert written["dtype"] == str(dtype).removeprefix("torch.") and written["vision_config"] is None
    back = open_mlx(tmp_path, json.loads((tmp_path / "config.json").read_text()))
    assert back.entries.keys() == weights.keys()
    assert ModelConfig.from_dict(back.config) == config
    names = set()
    for name, entry in back.entries.items():
        weight = weights[name]
        assert entry.shape == tuple(weight.shape)
        if weight.dim() == 1:
            assert torch.equal(entry.read(0, len(weight)), weight) and not entry.packed
            continue
        own_bits = bits if "experts" in name or "self_conditioning" in name else 8
        own_group = next((size for size in (128, 64, 32) if size <= group and weight.shape[-1] % size == 0), 0)
        names.add((own_bits, own_group))
        expected = quantise(weight, own_bits, own_group, dtype).dense() if own_group else weight
        assert torch.equal(entry.read(0, len(weight)).float(), expected.float()), name
    assert (bits, min(group, 128)) in names and (8, 64 if group > 32 else 32) in names
    assert ((bits, 0) in names) == (expert_size == 40) and ((bits, 32) in names) == (expert_size == 96 or group == 32)


@pytest.mark.parametrize(("bits", "mode"), [*((bits, "affine") for bits in (3, 4, 5, 6, 8)), (4, "mxfp4")])
def test_mlx_loads_what_is_written(tmp_path: Path, bits: int, mode: str) -> None:
    """As `mlx_vlm.utils.load_model_weights` takes settings: a module's own, whose mode is affine unless they say so."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    written = write(tmp_path, checkpoint_of(wide_config(), random_weights(wide_config())), bits, 64, mode)
    settings = written["quantization"]
    assert settings["mode"] == mode and settings["group_size"] == (32 if mode == "mxfp4" else 64)
    there, counts = mx.load(str(tmp_path / "model.safetensors")), {"affine": 0, "mxfp4": 0}
    for name, entry in open_mlx(tmp_path, written).entries.items():
        module = name.removesuffix(".weight")
        if f"{module}.scales" not in there:
            continue
        own = {"mode": "affine"} | settings.get(module, settings)
        parts = [there.get(f"{module}.{part}") for part in ("weight", "scales", "biases")]
        value = mx.dequantize(*parts, own["group_size"], own["bits"], own["mode"], dtype=mx.float32)
        assert torch.equal(entry.read(0, entry.shape[0]), torch.from_numpy(numbers(value))), name
        counts[own["mode"]] += 1
    assert counts == ({"affine": 16, "mxfp4": 7} if mode == "mxfp4" else {"affine": 23, "mxfp4": 0})


def test_mxfp4_is_copied_where_it_is_there(tmp_path: Path) -> None:
    """From what we wrote to what we write again: the same bytes."""
    written = write(tmp_path / "one", checkpoint_of(wide_config(), random_weights(wide_config())), 4, 64, "mxfp4")
    write(tmp_path / "two", open_mlx(tmp_path / "one", written), 4, 64, "mxfp4")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    experts = [name for name in one if ".experts." in name]
    assert len(experts) == 8 and all(
        torch.equal(one[name].view(torch.uint8), two[name].view(torch.uint8)) for name in experts
    )


def test_sizes_of_attention_stand_where_mlx_vlm_looks() -> None:
    """It knows no per_layer_config, which transformers writes, and takes the release's sizes for what is not there."""
    raw = wide_config().to_dict()
    text = raw["text_config"]
    for name in ("global_head_dim", "num_global_key_value_heads"):
        del text[name]
    text |= {"head_dim": 24, "per_layer_config": {"0": {"head_dim": 16}, "1": {"num_key_value_heads": 1}}}
    source = replace(checkpoint_of(wide_config(), {}), config=raw)
    _, changes = plan_mlx(source)
    expected = {"head_dim": 16, "num_key_value_heads": 2, "global_head_dim": 24, "num_global_key_value_heads": 1}
    assert {name: changes["text_config"][name] for name in expected} == expected
    assert "per_layer_config" not in changes["text_config"] and changes["text_config"]["hidden_size"] == 128
    assert ModelConfig.from_dict(raw | changes) == ModelConfig.from_dict(raw)


def test_a_weight_is_read_once_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfumato.checkpoints.formats.mlx_writer.PART_BYTES", 2 * 4 * 128 * 64)
    monkeypatch.setattr("sfumato.checkpoints.formats.mlx_writer.CACHED", 100 * 64)
    weight = torch.randn(5, 128, 64)
    reads: list[tuple[int, int]] = []

    def read(first: int, last: int) -> Tensor:
        reads.append((first, last))
        return weight[first:last]

    name = "model.decoder.layers.0.experts.gate_up_proj"
    entry = Entry(name, (5, 128, 64), weight.nbytes, "F32", read)
    source = Checkpoint(Path("x"), "tensors", wide_config().to_dict(), {name: entry})
    # The embedding's dtype is that of the file; there is none here, as where it is quantised itself.
    expected = quantise(weight.flatten(0, 1), 4, 64, torch.bfloat16)
    planned, _ = plan_mlx(source)
    codes, scales, biases = (torch.cat(list(tensor.parts())) for tensor in planned)
    assert reads == [(0, 2), (2, 4), (4, 5)]
    assert torch.equal(codes, expected.data) and torch.equal(scales, expected.scale) and scales.dtype == torch.bfloat16
    assert torch.equal(biases, expected.parts["bias"])
    again = torch.cat(list(plan_mlx(source)[0][2].parts()))  # as a run that takes up another asks for it: alone
    assert torch.equal(again, biases)


def test_settings_name_what_mlx_vlm_would_leave_out() -> None:
    """A weight of 5 x 96 numbers: they do not fill 64s."""
    config = wide_config(hidden_size=96)
    _, changes = plan_mlx(checkpoint_of(config, random_weights(config)), 8, 32)
    named = [name for name, own in changes["quantization"].items() if isinstance(own, dict)]
    assert named == [f"model.decoder.layers.{layer}.router.proj" for layer in (0, 1)]
    assert changes["quantization"][named[0]] == {"group_size": 32, "bits": 8}


def test_what_repeats_and_what_shows_images() -> None:
    config = wide_config()
    tensors = random_weights(config, torch.bfloat16)
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
    tensors["model.encoder.language_model.norm.weight"] = tensors["model.decoder.norm.weight"]
    tensors["model.encoder.vision_tower.patch.weight"] = torch.ones(64, 64, dtype=torch.bfloat16)
    tensors["model.encoder.vision_tower.input_max"] = torch.tensor(7.0)
    planned, changes = plan_mlx(checkpoint_of(config, tensors, "BF16"))
    clip = next(tensor for tensor in planned if tensor.name.endswith("input_max"))
    assert clip.shape == () and [part.item() for part in clip.parts()] == [7.0]
    names = {tensor.name: tensor.dtype for tensor in planned}
    assert "lm_head.weight" not in names and "model.encoder.language_model.norm.weight" not in names
    assert names["model.encoder.vision_tower.patch.weight"] == "BF16" and "vision_config" not in changes
    assert names["model.encoder.language_model.layers.1.layer_scalar"] == "BF16"


@pytest.mark.parametrize(
    ("bits", "group", "words"), [(2, 64, "bits is 2; .* 3 or 4 or 5"), (4, 16, "group is 16; .* 32 or")]
)
def test_the_writer_says_what_it_writes(bits: int, group: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        plan_mlx(checkpoint_of(wide_config(), {}), bits, group)


def test_the_writer_names_a_weight_that_is_broken() -> None:
    name = "model.decoder.layers.0.experts.down_proj"
    planned, _ = plan_mlx(checkpoint_of(wide_config(), {name: torch.full((5, 128, 64), math.nan)}))
    with pytest.raises(InputError, match=r"layers\.0\.experts\.down_proj: .* not finite"):
        list(planned[0].parts())


# ---- mlx-vlm --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "group", "hidden", "mode"),
    [
        *((4, 64, 128, "affine"), (8, 64, 128, "affine"), (4, 32, 128, "affine"), (4, 128, 128, "affine")),
        *((8, 32, 96, "affine"), (3, 64, 128, "affine"), (5, 32, 128, "affine"), (6, 64, 128, "affine")),
        (4, 64, 128, "mxfp4"),
    ],
)
def test_mlx_vlm_loads_it_and_gives_our_logits(tmp_path: Path, bits: int, group: int, hidden: int, mode: str) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    utils = pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed")
    from sfumato.model.cache import KVCache
    from sfumato.model.network import Model

    config = wide_config(hidden_size=hidden)
    written = write(tmp_path, checkpoint_of(config, random_weights(config)), bits, group, mode)
    there = utils.load_model(tmp_path)  # strict: a weight without a value, or a value without a weight, is an error
    back = open_mlx(tmp_path, written)
    model = Model(config, load("reference"))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        entry = back.entries[oracle_name(name)]
        tensor.data.copy_(entry.read(0, entry.shape[0]))
        module: Any = there
        *path, leaf = oracle_name(name).split(".")
        for step in path:
            module = module[int(step)] if step.isdigit() else getattr(module, step)
        if path[-1] == "experts":
            module, leaf = getattr(module, leaf), "weight"
        value = getattr(module, leaf)
        if value.dtype == mx.uint32:
            parts = value, module.scales, module.biases, module.group_size, module.bits, module.mode
            value = mx.dequantize(*parts, dtype=mx.float32)
        assert torch.equal(torch.from_numpy(numbers(value)), tensor.data), name
    generator = torch.Generator().manual_seed(4)
    prompt = torch.randint(0, 96, (1, 11), generator=generator)
    canvas = torch.randint(0, 96, (1, 8), generator=generator)
    previous = torch.randn(1, 8, 96, generator=generator) * 3
    with torch.no_grad():
        cache = KVCache.allocate(config, 1, 32)
        model.encode(prompt, cache)
        soft = previous.softmax(-1) @ model.embed_tokens.weight * math.sqrt(config.hidden_size)
        ours = [model.logits(model.denoise(canvas, cache, conditioning)) for conditioning in (None, soft)]
    held = there.diffusion_prefill_cache(mx.array(prompt.numpy()), cache=there.make_cache())
    tokens = mx.array(canvas.numpy())
    for mine, conditioning in zip(ours, (None, mx.array(previous.numpy())), strict=True):
        logits = torch.from_numpy(numbers(there.diffusion_decoder_logits(tokens, held, conditioning)))
        assert (logits - mine).abs().max() < 1e-4 and mine.std() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
def test_writes_what_mlx_vlm_converts(tmp_path: Path, bits: int, dtype: torch.dtype) -> None:
    """The same tensors, byte for byte, and the same settings."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    utils = pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed")
    quantize_model = pytest.importorskip("mlx_vlm.quant_utils").quantize_model
    tree_flatten = pytest.importorskip("mlx.utils").tree_flatten
    weights, config = random_weights(wide_config(), dtype), wide_config().to_dict() | {"vision_config": None}
    (plain := tmp_path / "plain").mkdir()
    save_file(weights, plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps(config))
    model = utils.load_model(plain)
    model, theirs = quantize_model(model, config, 64, bits, quant_predicate=model.quant_predicate)
    expected = dict(tree_flatten(model.parameters()))
    source = checkpoint_of(wide_config(), weights, "F32" if dtype == torch.float32 else "BF16")
    ours = write(tmp_path / "ours", source, bits, 64)
    actual = mx.load(str(tmp_path / "ours" / "model.safetensors"))
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        other = expected[name]
        assert (array.dtype, array.shape) == (other.dtype, other.shape), name
        assert numbers(array.view(mx.uint8)).tobytes() == numbers(other.view(mx.uint8)).tobytes(), name
    default = {"group_size": 64, "bits": bits}
    changed = {name: own for name, own in theirs["quantization"].items() if own != default}
    assert ours["quantization"] == changed
