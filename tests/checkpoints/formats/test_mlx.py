"""checkpoints/formats/mlx.py: what MLX and its tools write, against `mlx.core.dequantize`; and files that lie."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mlx_files import DTYPES, groups_of_all_kinds, mlx_dtype, numbers, put, quantise, random_weights, wide_config
from safetensors.torch import save_file
from torch import Tensor

from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.formats.bits import as_words
from sfumato.checkpoints.formats.mlx import open_mlx
from sfumato.checkpoints.formats.mlx_writer import rounded
from sfumato.errors import CheckpointError
from sfumato.ops.packed import Packed

FORMS = list(itertools.product((1, 2, 3, 4, 5, 6, 8), (32, 64, 128)))

# ---- reading what mlx writes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_reads_as_mlx_dequantizes(tmp_path: Path, bits: int, group: int, dtype: torch.dtype) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    weight = groups_of_all_kinds(dtype)
    stack = weight[:12].reshape(3, 4, 384)
    tensors: dict[str, Any] = {}
    values, rounded = {}, {}
    for name, tensor in (("model.decoder.some_proj", weight), ("model.decoder.layers.0.experts.down_proj", stack)):
        there = mx.array(tensor.float().numpy()).astype(mlx_dtype(dtype))
        words, scales, biases = mx.quantize(there, group, bits)
        tensors |= {f"{name}.weight": words, f"{name}.scales": scales, f"{name}.biases": biases}
        exact = (part.astype(mx.float32) for part in (scales, biases))
        values[name] = torch.from_numpy(numbers(mx.dequantize(words, *exact, group, bits)))
        rounded[name] = mx.dequantize(words, scales, biases, group, bits)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    checkpoint = open_mlx(tmp_path, wide_config().to_dict() | {"quantization": {"bits": bits, "group_size": group}})
    assert checkpoint.format == f"MLX affine {bits}-bit" and "quantization" not in checkpoint.config
    for name, value in values.items():
        entry = checkpoint.entries[name if "experts" in name else f"{name}.weight"]
        assert entry.shape == tuple(value.shape) and entry.packed
        form = entry.packed(0, len(value))
        assert (form.kind, form.group, form.shape) == ("int4" if bits <= 4 else "int8", group, entry.shape)
        assert form.scale.dtype == (dtype if bits <= 4 else torch.float32)
        assert torch.equal(form.dense(), value) and torch.equal(entry.read(0, len(value)), value)
        assert torch.equal(entry.read(1, 3), value[1:3]) and torch.equal(entry.packed(1, 3).dense(), value[1:3])
        # In its own dtype mlx rounds twice: the product, then the sum.
        scale, bias = (form.parts[part].to(dtype)[..., None] for part in ("scale", "bias"))
        code = ((value.unflatten(-1, (-1, group)) - bias.float()) / scale.float()).round().to(dtype)
        twice = (code * scale + bias).flatten(-2)
        assert torch.equal(twice.float(), torch.from_numpy(numbers(rounded[name].astype(mx.float32))))


@pytest.mark.parametrize(("bits", "bytes_", "codes"), [(4, [0x21, 0x43], [1, 2, 3, 4]), (8, [200, 7], [200, 7])])
def test_layout(tmp_path: Path, bits: int, bytes_: list[int], codes: list[int]) -> None:
    form = _by_hand(tmp_path, bits, bytes_)
    assert form.dense()[0, : len(codes)].tolist() == [code * 0.5 - 3 for code in codes]


def _by_hand(folder: Path, bits: int, start: list[int]) -> Any:
    words = torch.zeros(1, 32 * bits // 8, dtype=torch.uint8)
    words[0, : len(start)] = torch.tensor(start, dtype=torch.uint8)
    tensors = {"a.weight": words.view(torch.uint32), "a.scales": torch.tensor([[0.5]]), "a.biases": -torch.ones(1, 1)}
    tensors["a.biases"] *= 3
    config = wide_config().to_dict() | {"quantization": {"bits": bits, "group_size": 32}}
    entry = put(folder, tensors, config).entries["a.weight"]
    assert entry.packed
    return entry.packed(0, 1)


@pytest.mark.parametrize(
    ("bits", "codes"),
    [
        (1, [1, 0, 0, 1, 1, 0, 1, 1]),
        (2, [1, 3, 0, 2, 2, 1, 3, 0]),
        (3, [1, 6, 0, 7, 5, 2, 3, 4]),
        (5, [1, 30, 0, 17, 9, 31, 4, 22]),
        (6, [1, 62, 33, 20, 0, 63, 7, 40]),
    ],
)
def test_layout_of_bits_that_cross_bytes(tmp_path: Path, bits: int, codes: list[int]) -> None:
    word = sum(code << bits * place for place, code in enumerate(codes))
    form = _by_hand(tmp_path, bits, list(word.to_bytes(bits, "little")))
    assert form.dense()[0, :8].tolist() == [code * 0.5 - 3 for code in codes]
    assert (form.kind, form.data.dtype) == ("int4" if bits < 4 else "int8", torch.uint8)


MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
EVERY_SCALE = {"mxfp4": range(255), "mxfp8": range(255), "nvfp4": [scale for scale in range(256) if scale & 127 != 127]}


def every_value(mode: str) -> tuple[Tensor, Tensor]:
    """Every code under every scale of a mode that is a number: words [S, ..] and scales [S, ..] as bytes."""
    bits, group = MODES[mode]
    codes = torch.arange(32, dtype=torch.uint8) & 15
    if bits == 8:
        codes = torch.arange(256, dtype=torch.uint8)
        codes[codes & 127 == 127] = 0
    scales = torch.tensor(list(EVERY_SCALE[mode]), dtype=torch.uint8)
    words = (codes[::2] | codes[1::2] << 4 if bits == 4 else codes).expand(len(scales), -1).contiguous()
    return words.view(torch.uint32), scales[:, None].expand(-1, len(codes) // group).contiguous()


@pytest.mark.parametrize("mode", MODES)
def test_reads_floats_as_mlx_dequantizes(tmp_path: Path, mode: str) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    (bits, group), (words, scales) = MODES[mode], every_value(mode)
    half = len(words) // 2
    stack = [part[: half * 2].unflatten(0, (2, half)).clone() for part in (words, scales)]
    tensors = {"a.weight": words, "a.scales": scales}
    tensors |= {"l.experts.down_proj.weight": stack[0], "l.experts.down_proj.scales": stack[1]}
    settings = {"bits": bits, "group_size": group, "mode": mode}
    checkpoint = put(tmp_path, tensors, wide_config().to_dict() | {"quantization": settings})
    assert checkpoint.format == f"MLX {mode}"
    there = mx.load(str(tmp_path / "model.safetensors"))
    for name, entry in checkpoint.entries.items():
        module = name.removesuffix(".weight")
        parts = there[f"{module}.weight"], there[f"{module}.scales"]
        assert entry.packed
        packed = entry.packed(0, entry.shape[0])
        assert (packed.kind, packed.group, packed.shape, entry.stored) == (mode, group, entry.shape, mode)
        for dtype in (torch.bfloat16, torch.float32):
            value = mx.dequantize(*parts, None, group, bits, mode, dtype=mlx_dtype(dtype)).astype(mx.float32)
            assert torch.equal(packed.dense(dtype).float(), torch.from_numpy(numbers(value)))
        assert torch.equal(entry.read(1, 2), torch.from_numpy(numbers(value))[1:2])


def test_floats_by_hand(tmp_path: Path) -> None:
    """For where mlx is not installed: 2^(scale - 127), or e4m3, times e2m1 or e4m3."""
    tensors = {
        "a.weight": torch.full((1, 16), 0x21, dtype=torch.uint8).view(torch.uint32),
        "a.scales": torch.tensor([[129]], dtype=torch.uint8),
        "b.weight": torch.full((1, 32), 0x3C, dtype=torch.uint8).view(torch.uint32),
        "b.scales": torch.tensor([[126]], dtype=torch.uint8),
        "c.weight": torch.full((1, 8), 0xF7, dtype=torch.uint8).view(torch.uint32),
        "c.scales": torch.tensor([[0x40]], dtype=torch.uint8),
    }
    settings = {"bits": 8, "group_size": 32, "mode": "mxfp8", "a": {"mode": "mxfp4"}, "c": {"mode": "nvfp4"}}
    entries = put(tmp_path, tensors, wide_config().to_dict() | {"quantization": settings}).entries
    assert entries["a.weight"].read(0, 1)[0, :2].tolist() == [0.5 * 4, 1.0 * 4]
    assert entries["b.weight"].read(0, 1).unique().tolist() == [1.5 / 2]
    assert entries["c.weight"].read(0, 1)[0, :2].tolist() == [6.0 * 2, -6.0 * 2]


@pytest.mark.parametrize("key", ["weight_scale_2", "weight_global_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (5, 24)])
def test_second_scales_of_nvfp4(tmp_path: Path, key: str, shape: tuple[int, ...]) -> None:
    """mlx_vlm/quantization/nvfp4.py: the product is multiplied by the one, and divided by the other."""
    dice = torch.Generator().manual_seed(0)
    words = torch.randint(0, 256, (5, 24, 32), generator=dice, dtype=torch.uint8)
    scales = torch.randint(1, 120, (5, 24, 4), generator=dice, dtype=torch.uint8)
    outer = torch.rand(shape, generator=dice) + 0.5
    name = "l.experts.down_proj"
    tensors = {f"{name}.weight": words.view(torch.uint32), f"{name}.scales": scales, f"{name}.{key}": outer}
    settings = {"bits": 4, "group_size": 16, "mode": "nvfp4"}
    entry = put(tmp_path, tensors, wide_config().to_dict() | {"quantization": settings}).entries[name]
    plain = Packed("nvfp4", (5, 24, 64), words, scales.view(torch.float8_e4m3fn), 16).dense()
    each = outer.reshape(5, -1, 1) if len(shape) and shape[0] == 5 else outer
    expected = plain * each if key == "weight_scale_2" else plain / each
    assert torch.equal(entry.read(0, 5), expected) and torch.equal(entry.read(1, 3), expected[1:3]) and entry.packed
    assert torch.allclose(entry.packed(0, 5).dense(), expected, rtol=3e-7, atol=0)
    assert torch.equal(entry.packed(3, 5).dense(), entry.packed(0, 5).dense()[3:])


# ---- what has settings of its own -----------------------------------------------------------------------------------


def affine(name: str, weight: Tensor, bits: int, group: int) -> dict[str, Tensor]:
    codes, scale, bias = rounded(weight, bits, group, torch.float32)
    words = as_words(codes, bits).contiguous().view(torch.uint32)
    return {f"{name}.weight": words, f"{name}.scales": scale, f"{name}.biases": bias}


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("model.decoder.layers.0.q_proj", "model.decoder.layers.0.q_proj"),
        ("layers.0.q_proj", "model.decoder.layers.0.q_proj"),
        ("language_model.model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("model.layers.0.q_proj", "language_model.model.layers.0.q_proj"),
        ("model.decoder.layers.0.experts.gate_up_proj", "model.decoder.layers.0.experts.gate_up_proj"),
        ("layers.0.experts.switch_glu.down_proj", "layers.0.experts.down_proj"),
        ("layers.0.experts.down_proj", "layers.0.experts.switch_glu.down_proj"),
    ],
)
@pytest.mark.parametrize("default", [{"bits": 4, "group_size": 64}, {"mode": "mxfp8"}])
def test_settings_under_other_names(tmp_path: Path, key: str, module: str, default: dict[str, Any]) -> None:
    """Whatever stands before, a module's own bits count; what they leave out is affine's, not the file's."""
    weight = torch.randn(5, 16, 64, generator=torch.Generator().manual_seed(1))
    weight = weight if "experts" in module else weight[0]
    config = wide_config().to_dict() | {"quantization": default | {key: {"bits": 5, "group_size": 32}}}
    (entry,) = put(tmp_path, affine(module, weight, 5, 32), config).entries.values()
    assert entry.stored == "affine 5-bit, group 32, F32"
    assert torch.equal(entry.read(0, len(weight)), quantise(weight, 5, 32, torch.float32).dense())


def test_settings_of_a_stack_are_those_of_its_experts(tmp_path: Path) -> None:
    """mlx-vlm stacks experts, then joins gate and up; settings name what comes of it."""
    weight = torch.randn(5, 2, 8, 64, generator=torch.Generator().manual_seed(1))
    tensors: dict[str, Tensor] = {}
    for number in range(5):
        for half, which in enumerate(("gate", "up")):
            tensors |= affine(f"model.decoder.l.experts.{number}.{which}_proj", weight[number, half], 3, 64)
    settings = {"bits": 8, "group_size": 32, "model.decoder.l.experts.gate_up_proj": {"bits": 3, "group_size": 64}}
    (entry,) = put(tmp_path, tensors, wide_config().to_dict() | {"quantization": settings}).entries.values()
    assert torch.equal(entry.read(0, 5), quantise(weight.flatten(1, 2), 3, 64, torch.float32).dense())


def test_a_mean_that_no_module_has(tmp_path: Path) -> None:
    """A mixture may give its mean as the bits of all; only what a module has is looked at."""
    settings = {"bits": 4.5, "group_size": 64, "a": {"bits": 4}, "b": {"bits": 5}}
    tensors = affine("a", torch.ones(2, 64), 4, 64) | affine("b", torch.ones(2, 64), 5, 64)
    checkpoint = put(tmp_path, tensors, wide_config().to_dict() | {"quantization": settings})
    assert checkpoint.format == "MLX affine 4.5-bit" and len(checkpoint.entries) == 2
    with pytest.raises(CheckpointError, match=r"bits 4\.5 for c;"):
        put(tmp_path, affine("c", torch.ones(2, 64), 4, 64), wide_config().to_dict() | {"quantization": settings})


def test_settings_that_say_plain(tmp_path: Path) -> None:
    """False, and bits for what has no scales: the tensor says what it is."""
    settings = {"bits": 4, "group_size": 64, "b": False, "c": {"bits": 8, "group_size": 64}, "d": True}
    tensors = {f"{name}.weight": torch.randn(2, 64) for name in "bc"} | affine("d", torch.ones(2, 64), 4, 64)
    entries = put(tmp_path, tensors, wide_config().to_dict() | {"quantization": settings}).entries
    assert all(torch.equal(entries[f"{name}.weight"].read(0, 2), tensors[f"{name}.weight"]) for name in "bc")
    assert entries["d.weight"].stored == "affine 4-bit, group 64, F32"


@pytest.mark.parametrize(
    ("gate", "up", "kind", "group"),
    [((4, 64), (8, 64), "int8", 64), ((3, 32), (4, 64), "int4", 32), ((6, 128), (5, 32), "int8", 32)],
)
@pytest.mark.parametrize("way", ["", "switch_glu."])
def test_gate_and_up_in_different_bits(
    tmp_path: Path, gate: tuple[int, int], up: tuple[int, int], kind: str, group: int, way: str
) -> None:
    """As OptiQ gives them: in one stack, to the bit."""
    weights = torch.randn(5, 2, 24, 128, generator=torch.Generator().manual_seed(2))
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {"bits": 4, "group_size": 64}
    halves = []
    for half, (which, (bits, own)) in enumerate((("gate_proj", gate), ("up_proj", up))):
        name = f"l.experts.{way}{which}"
        tensors |= affine(name, weights[:, half], bits, own)
        settings[name] = {"bits": bits, "group_size": own}
        halves.append(quantise(weights[:, half], bits, own, torch.float32).dense())
    (entry,) = put(tmp_path, tensors, wide_config().to_dict() | {"quantization": settings}).entries.values()
    assert entry.name == "l.experts.gate_up_proj" and entry.packed
    packed, expected = entry.packed(0, 5), torch.cat(halves, 1)
    assert (packed.kind, packed.group, packed.shape) == (kind, group, (5, 48, 128))
    assert torch.equal(packed.dense(), expected) and torch.equal(entry.read(1, 3), expected[1:3])
    assert torch.equal(entry.packed(2, 4).dense(), expected[2:4])


def test_a_conversion_that_is_not_quantised(tmp_path: Path) -> None:
    """mlx_vlm.convert without -q: experts end in .weight, the header says who wrote it, config.json says nothing."""
    weights = random_weights(wide_config(), torch.bfloat16)
    named = {
        f"{name}.weight" if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else name for name in weights
    }
    tensors = {name: weights[name if name in weights else name.removesuffix(".weight")] for name in named}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "mlx"})
    (tmp_path / "config.json").write_text(json.dumps(wide_config().to_dict()))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "MLX, not quantised" and checkpoint.entries.keys() == weights.keys()
    for name, entry in checkpoint.entries.items():
        assert torch.equal(entry.read(0, entry.shape[0] if entry.shape else 1), weights[name]) and not entry.packed


@pytest.mark.parametrize("way", ["stacks of gate and up", "an expert each"])
def test_experts_that_lie_apart(tmp_path: Path, way: str) -> None:
    weights = torch.randn(5, 128, 64, generator=torch.Generator().manual_seed(2))
    form = quantise(weights, 4, 64, torch.float32)
    parts = {"weight": form.data.view(torch.uint32), "scales": form.scale, "biases": form.parts["bias"]}
    tensors: dict[str, Tensor] = {}
    for half, which in enumerate(("gate_proj", "up_proj")):
        for part, tensor in parts.items():
            mine = tensor.chunk(2, 1)[half].contiguous()
            if way == "an expert each":
                tensors |= {f"l.experts.{number}.{which}.{part}": mine[number].contiguous() for number in range(5)}
            else:
                tensors[f"l.experts.{which}.{part}"] = mine
    config = wide_config().to_dict() | {"quantization": {"bits": 4, "group_size": 64}}
    (entry,) = put(tmp_path, tensors, config).entries.values()
    assert (entry.name, entry.shape) == ("l.experts.gate_up_proj", (5, 128, 64)) and entry.packed
    assert torch.equal(entry.read(0, 5), form.dense()) and torch.equal(entry.packed(2, 4).dense(), form.dense()[2:4])
    assert entry.nbytes == form.nbytes


# ---- files that lie -------------------------------------------------------------------------------------------------


def good() -> dict[str, Tensor]:
    form = quantise(torch.randn(4, 128, generator=torch.Generator().manual_seed(3)), 4, 64, torch.float32)
    return {"a.weight": form.data.view(torch.uint32), "a.scales": form.scale, "a.biases": form.parts["bias"]}


@pytest.mark.parametrize(("change", "words"), [
    ({"a.scales": torch.ones(4, 3)}, r"a\.weight has 16 words a row|does not go with"),
    ({"a.scales": torch.ones(4, 3), "a.biases": torch.ones(4, 3)}, "has 16 words a row and 3 scales; .* must be 24"),
    ({"a.scales": torch.ones(5, 2), "a.biases": torch.ones(5, 2)}, r"the shape \[5, 2\], which does not go with"),
    ({"a.biases": torch.ones(4, 1)}, r"a\.biases has the shape \[4, 1\]"),
    ({"a.biases": torch.ones(4, 2).half()}, "a.biases is stored as F16; .* must both be"),
    ({"a.scales": torch.ones(4, 2, dtype=torch.int32)}, "a.scales is stored as I32"),
    ({"a.weight": torch.ones(4, 16, dtype=torch.int32)}, "stored as I32; codes must be U32"),
    ({"a.weight": torch.tensor(1.0)}, "a.weight has scales but is stored as F32; codes must be U32"),
    ({"a.weight": torch.tensor(1).to(torch.uint32)}, r"does not go with \[\] of a.weight"),
    ({"a.weight_scale_2": torch.ones(1)}, "a.weight_scale_2 is there in .*, and affine 4-bit, group 64 has no place"),
    ({"a.scales": None}, "a.weight in .* is stored as U32 and has no scales"),
    ({"a.biases": None}, "a.biases is missing"),
    ({"a.weight": None}, None),
    ({"l.experts.0.up_proj.weight": torch.ones(4, 4)}, "l.experts.up_proj lacks expert 1 of 5"),
    ({"l.experts.5.up_proj.weight": torch.ones(4, 4)}, "experts.5.up_proj.weight is one expert too many"),
    ({f"l.experts.{n}.up_proj.weight": torch.ones(4, 4 + n // 4) for n in range(5)}, r"4\.up_proj.* \[4, 5\], ex"),
    ({f"l.experts.{n}.up_proj.weight": torch.ones(4) for n in range(5)}, "must be matrices of one shape"),
    ({f"l.experts.{n}_proj.weight": torch.ones(5, 4, 4 + len(n)) for n in ("up", "gate")}, "they must be stacks"),
    ({f"l.experts.down_proj{end}": torch.ones(5, 4, 4) for end in ("", ".weight")}, "there twice"),
    ({"l.experts.gate_proj.weight": torch.ones(5, 4, 4)}, "gate_proj is there without its up_proj"),
])  # fmt: skip
def test_tensors_that_do_not_go_together(tmp_path: Path, change: dict[str, Any], words: str | None) -> None:
    tensors = {name: tensor for name, tensor in (good() | change).items() if tensor is not None}
    config = wide_config().to_dict() | {"quantization": {"bits": 4, "group_size": 64}}
    if words is None:  # scales that belong to nothing go on under their own name, which no model has
        assert set(put(tmp_path, tensors, config).entries) == {"a.scales", "a.biases"}
        return
    with pytest.raises(CheckpointError, match=words) as caught:
        put(tmp_path, tensors, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("settings", "words"), [
    ({"bits": 7, "group_size": 64}, "bits 7 for a; .* affine with bits 1, 2, 3, 4, 5, 6 or 8 is read"),
    ({"bits": 4, "group_size": 17}, "group_size 17 for a; .* affine with group_size 32, 64 or 128 is read"),
    ({"bits": 4, "group_size": 10**30}, "group_size 1000.* for a"),
    ({"bits": True, "group_size": 64}, "bits True"),
    ({"bits": 4, "group_size": [64]}, r"group_size \[64\]"),
    ({"bits": 4, "group_size": 32, "mode": "fp4"}, "mode fp4 for a; .* mode affine, mxfp4, mxfp8 or nvfp4 is read"),
    ({"bits": 4, "group_size": 32, "mode": ["mxfp4"]}, r"mode \['mxfp4'\] for a"),
    ({"bits": 8, "group_size": 32, "mode": "mxfp4"}, "bits 8 for a; .* mxfp4 with bits 4 is read"),
    ({"bits": 4, "group_size": 64, "mode": "nvfp4"}, "group_size 64 for a; .* nvfp4 with group_size 16 is read"),
    ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "a.biases is there in .*, and mxfp4 has no place for it"),
    ({"bits": 4, "group_size": 64, "a": {"bits": 0, "group_size": 64}}, "bits 0 for a;"),
    ({"bits": 4, "group_size": 64, "a": False}, "quantization says False for a, which has scales"),
    (None, "quantization says nothing for a, which has scales"),
    ({"bits": 4, "group_size": 64, "a": {"bits": 4}, "model.a": {"bits": 8}}, "and .*8.* for model.a; .* must be one"),
    ({"bits": 4, "group_size": 64, "a": {"bits": 8, "group_size": 64}}, "with 8 bits in groups of 64"),
    ({"bits": 6, "group_size": 64}, "with 6 bits in groups of 64 there must be 24 words"),
    ("4 bits", "no quantization with bits"),
])  # fmt: skip
def test_settings_that_are_not_mlx(tmp_path: Path, settings: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        put(tmp_path, good(), wide_config().to_dict() | {"quantization": settings})


@pytest.mark.parametrize("part", ["a.scales", "a.biases"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scales_that_are_no_numbers(tmp_path: Path, part: str, bad: float) -> None:
    tensors = good()
    tensors[part][1, 1] = bad
    config = wide_config().to_dict() | {"quantization": {"bits": 4, "group_size": 64}}
    entry = put(tmp_path, tensors, config).entries["a.weight"]
    assert entry.packed and entry.read(2, 4).isfinite().all()
    for read in (entry.read, entry.packed):
        with pytest.raises(CheckpointError, match=rf"{part} in .* not finite; it is damaged"):
            read(0, 4)


@pytest.mark.parametrize(
    ("mode", "part", "value"),
    [
        *(("mxfp4", "scales", 255), ("mxfp8", "scales", 255), ("nvfp4", "scales", 0x7F), ("nvfp4", "scales", 0xFF)),
        *(("mxfp8", "weight", 0x7F), ("mxfp8", "weight", 0xFF)),
    ],
)
def test_floats_that_are_no_numbers(tmp_path: Path, mode: str, part: str, value: int) -> None:
    (bits, group), (words, scales) = MODES[mode], every_value(mode)
    tensors = {"a.weight": words, "a.scales": scales}
    tensors[f"a.{part}"].view(torch.uint8)[1, 1 if part == "weight" else 0] = value
    config = wide_config().to_dict() | {"quantization": {"bits": bits, "group_size": group, "mode": mode}}
    entry = put(tmp_path, tensors, config).entries["a.weight"]
    assert entry.packed and entry.read(2, 4).isfinite().all()
    for read in (entry.read, entry.packed):
        with pytest.raises(CheckpointError, match=rf"a.{part} in .* not finite; it is damaged"):
            read(0, 4)


@pytest.mark.parametrize(("change", "words"), [
    ({"a.scales": torch.ones(2, 4)}, "a.scales is stored as F32; scales of nvfp4 must be U8"),
    ({"a.scales": None}, "stored as U32 and has no scales"),
    ({"a.weight": torch.ones(2, 7, dtype=torch.int32).view(torch.uint32)}, "7 words a row and 4 scales; .* must be 8"),
    ({"a.weight_scale_2": torch.ones(3)}, r"a.weight_scale_2 is F32 of shape \[3\]; it must be .* one for each of 2"),
    ({"a.weight_scale_2": torch.ones(1).half()}, "a.weight_scale_2 is F16"),
    ({f"a.{key}": torch.ones(1) for key in ("weight_scale_2", "weight_global_scale")}, "global_scale is there in"),
])  # fmt: skip
def test_tensors_that_do_not_go_with_nvfp4(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    tensors = {"a.weight": torch.ones(2, 8, dtype=torch.int32).view(torch.uint32), "a.scales": torch.ones(2, 4).byte()}
    tensors = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    config = wide_config().to_dict() | {"quantization": {"bits": 4, "group_size": 16, "mode": "nvfp4"}}
    with pytest.raises(CheckpointError, match=words):
        put(tmp_path, tensors, config)


@pytest.mark.parametrize(("key", "bad"), [("weight_scale_2", math.inf), ("weight_global_scale", 0.0)])
def test_second_scales_that_are_no_scales(tmp_path: Path, key: str, bad: float) -> None:
    words, scales = every_value("nvfp4")
    config = wide_config().to_dict() | {"quantization": {"bits": 4, "group_size": 16, "mode": "nvfp4"}}
    entry = put(tmp_path, {"a.weight": words, "a.scales": scales, f"a.{key}": torch.tensor(bad)}, config).entries[
        "a.weight"
    ]
    with pytest.raises(CheckpointError, match=f"a.{key} in .* no scales; it is damaged"):
        entry.read(0, 1)


# ---- mlx-vlm --------------------------------------------------------------------------------------------------------

RECIPES = ["mixed_2_6", "mixed_3_4", "mixed_3_5", "mixed_3_6", "mixed_3_8", "mixed_4_6", "mixed_4_8"]
WAYS: list[dict[str, Any]] = [
    {},
    *({"q_bits": bits} for bits in (2, 3, 4, 5, 6, 8)),
    *({"q_bits": 4, "q_group_size": group} for group in (32, 128)),
    *({"q_mode": mode} for mode in MODES),
    *({"quant_predicate": recipe} for recipe in RECIPES),
]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reads_what_mlx_vlm_converts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: dict[str, Any], dtype: str
) -> None:
    """`mlx_vlm.convert` itself, with every choice it has; and what it makes of its own files is what we read."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    conversion = pytest.importorskip("mlx_vlm.convert", reason="mlx-vlm is not installed")
    utils = pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed")
    (plain := tmp_path / "plain").mkdir()
    weights = random_weights(wide_config(), getattr(torch, dtype))
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    (plain / "config.json").write_text(
        json.dumps(wide_config().to_dict() | {"vision_config": None, "torch_dtype": dtype})
    )
    processor = type("Processor", (), {"save_pretrained": staticmethod(lambda folder: None)})
    monkeypatch.setattr(
        conversion,
        "fetch_from_hub",
        lambda path, **_: (utils.load_model(path, lazy=True), utils.load_config(path), processor),
    )
    monkeypatch.setattr(conversion, "create_model_card", lambda *_: None)
    conversion.convert(
        str(plain), str(tmp_path / "mlx"), quantize=bool(way), **({"q_group_size": None, "q_bits": None} | way)
    )
    there, checkpoint = utils.load_model(tmp_path / "mlx"), open_checkpoint(tmp_path / "mlx")
    assert checkpoint.format.startswith("MLX") and checkpoint.entries.keys() == weights.keys()
    kinds = set()
    for name, entry in checkpoint.entries.items():
        module: Any = there
        *path, leaf = name.split(".")
        for step in path:
            module = module[int(step)] if step.isdigit() else getattr(module, step)
        if path[-1] == "experts":
            module, leaf = getattr(module, leaf), "weight"
        value = getattr(module, leaf)
        if value.dtype == mx.uint32:
            kinds.add((module.mode, module.bits, module.group_size))
            parts = [
                part if part is None or part.dtype == mx.uint8 else part.astype(mx.float32)
                for part in (module.scales, module.biases)
            ]
            value = mx.dequantize(value, *parts, module.group_size, module.bits, module.mode, dtype=mx.float32)
            assert entry.packed
        actual = entry.read(0, entry.shape[0] if entry.shape else 1)
        assert torch.equal(actual.float(), torch.from_numpy(numbers(value.astype(mx.float32)))), name
    assert bool(kinds) == bool(way) and len(kinds) < 5
