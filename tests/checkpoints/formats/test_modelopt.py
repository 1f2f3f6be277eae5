"""checkpoints/formats/modelopt.py: modelopt's NVFP4 and FP8, held against checkpoints written here by hand and weights
computed in float64.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_config
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint
from sfumato.checkpoints.formats.modelopt import open_modelopt
from sfumato.errors import CheckpointError
from sfumato.model.config import ModelConfig

CONFIG = tiny_config(hidden_size=64, expert_size=32, num_experts=3)
LINEAR = "model.decoder.layers.1.mlp.gate_proj"
EXPERTS = "model.decoder.layers.2.experts"
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]}
HALVES = (0, 1, 2, 3, 4, 6, 8, 12)
"""What the eight magnitudes of a 4-bit float are, in halves."""


def opened(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any] | None = NVFP4) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {**CONFIG.to_dict(), **({"quantization_config": settings} if settings is not None else {})}
    return open_modelopt(folder, json.loads(json.dumps(config)))


def module(rows: int, columns: int, seed: int, second: float | None = None) -> dict[str, Tensor]:
    """Any codes and any finite scales, in the shapes that modelopt writes."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randint(0, 127, (rows, columns // 16), generator=generator, dtype=torch.uint8)
    return {
        "weight": torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8),
        "weight_scale": scale.view(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(second or float(torch.rand((), generator=generator)) * 1e-3),
        "input_scale": torch.tensor(0.01),
    }


def defined(parts: dict[str, Tensor]) -> Tensor:
    """Code x scale x second scale, exactly but for float64's last bit, by reading the bytes one at a time."""
    rows = []
    for codes, scales in zip(parts["weight"].tolist(), parts["weight_scale"].view(torch.uint8).tolist(), strict=True):
        row = []
        for place, byte in enumerate(codes):
            scale = scales[place // 8]
            exponent, mantissa = scale >> 3 & 15, scale & 7
            size = math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9)
            for code in (byte & 15, byte >> 4):
                row.append((-1) ** (code >> 3) * HALVES[code & 7] / 2 * size * float(parts["weight_scale_2"]))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def named(prefix: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{part}": tensor for part, tensor in parts.items()}


@pytest.mark.parametrize("second", [None, 2.0**-9, 1.0, 3.3e-5, 1e-30, 7e20])
def test_weight_is_the_product_of_three(tmp_path: Path, second: float | None) -> None:
    parts = module(40, 96, 0, second)
    checkpoint = opened(tmp_path, named(LINEAR, parts))
    entry = checkpoint.entries[f"{LINEAR}.weight"]
    exact = defined(parts)
    assert entry.shape == exact.shape and entry.stored == "nvfp4" and entry.packed is not None
    # Code x scale needs no rounding, so that the product is rounded once: to the nearest float32 of what is meant.
    assert torch.equal(entry.read(0, 40), exact.float())
    assert torch.equal(entry.read(3, 17), exact[3:17].float())
    packed = entry.packed(3, 17)
    assert (packed.kind, packed.group, packed.shape) == ("nvfp4", 16, (14, 96))
    assert packed.factor is not None and packed.factor.tolist() == [float(parts["weight_scale_2"])] * 14
    assert torch.equal(packed.data, parts["weight"][3:17])
    assert torch.equal(packed.dense(), entry.read(3, 17))
    assert entry.nbytes == 40 * 48 + 40 * 6 + 4


def test_another_reader_of_the_layout_agrees(tmp_path: Path) -> None:
    """compressed-tensors converts such checkpoints; what it then decompresses, in bfloat16, is the same but rounded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("compressed_tensors", reason="needs the library's converter")
        from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
        from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter
        from compressed_tensors.quantization import preset_name_to_scheme
    parts = module(24, 64, 3)
    ours = opened(tmp_path, named(LINEAR, parts)).entries[f"{LINEAR}.weight"].read(0, 24)
    converted = ModelOptNvfp4Converter(targets=["re:.*mlp.*"]).process(named(LINEAR, parts))
    theirs = {name.removeprefix(f"{LINEAR}."): tensor.clone() for name, tensor in converted.items()}
    theirs["weight_global_scale"] = theirs["weight_global_scale"].reshape(1)
    weight = NVFP4PackedCompressor.decompress(theirs, preset_name_to_scheme("NVFP4", ["Linear"]))["weight"]
    assert weight.dtype == torch.bfloat16
    assert ((ours - weight.float()).abs() <= ours.abs() * (2.0**-8 + 2.0**-20)).all()


def test_the_even_input_is_the_low_half(tmp_path: Path) -> None:
    parts = module(1, 16, 0, 1.0)
    parts["weight"] = torch.tensor([[0x2F, *[0] * 7]], dtype=torch.uint8)
    parts["weight_scale"] = torch.ones(1, 1).to(torch.float8_e4m3fn)
    row = opened(tmp_path, named(LINEAR, parts)).entries[f"{LINEAR}.weight"].read(0, 1)[0]
    assert row[:4].tolist() == [-6.0, 1.0, 0.0, 0.0]


def experts() -> dict[str, dict[str, Tensor]]:
    return {
        f"{number}.{kind}_proj": module(*((64, 32) if kind == "down" else (32, 64)), 10 * number + place)
        for number in range(3)
        for place, kind in enumerate(("gate", "up", "down"))
    }


def flat(modules: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: t for name, parts in modules.items() for key, t in named(f"{EXPERTS}.{name}", parts).items()}


def test_experts_become_stacks_and_all_else_is_as_it_was(tmp_path: Path) -> None:
    modules = experts()
    norm = torch.randn(64).bfloat16()
    tensors = {
        "model.decoder.norm.weight": norm,
        "model.decoder.layers.0.self_attn.k_proj.k_scale": torch.tensor(1.0),
    }
    checkpoint = opened(tmp_path, flat(modules) | tensors)
    gate_up, down = (checkpoint.entries[f"{EXPERTS}.{stack}"] for stack in ("gate_up_proj", "down_proj"))
    assert len(checkpoint.entries) == 3 and checkpoint.format == "modelopt NVFP4"
    exact = {name: defined(parts).float() for name, parts in modules.items()}
    both = torch.stack([torch.cat([exact[f"{e}.gate_proj"], exact[f"{e}.up_proj"]]) for e in range(3)])
    alone = torch.stack([exact[f"{e}.down_proj"] for e in range(3)])
    for entry, whole in ((gate_up, both), (down, alone)):
        assert entry.shape == whole.shape and entry.packed is not None
        assert torch.equal(entry.read(0, 3), whole) and torch.equal(entry.read(1, 3), whole[1:])
        packed = entry.packed(0, 3)
        assert packed.factor is not None and packed.factor.shape == whole.shape[:2]
        assert torch.equal(packed.dense(), whole) and torch.equal(entry.packed(2, 3).dense(), whole[2:])
    entry = checkpoint.entries["model.decoder.norm.weight"]
    assert entry.packed is None and torch.equal(entry.read(0, 64), norm) and entry.read(0, 64).dtype == torch.bfloat16
    assert [n.split(" is")[0] for n in checkpoint.notices] == ["input_scale, in 9 places,", "k_scale, in 1 places,"]
    assert ModelConfig.from_dict(checkpoint.config) == CONFIG and "quantization_config" not in checkpoint.config


def test_experts_may_be_plain(tmp_path: Path) -> None:
    stack = torch.randn(3, 64, 64).bfloat16()
    entry = opened(tmp_path, {f"{EXPERTS}.gate_up_proj": stack}).entries[f"{EXPERTS}.gate_up_proj"]
    assert entry.packed is None and torch.equal(entry.read(1, 3), stack[1:])
    modules = experts()
    modules["1.up_proj"] = {"weight": torch.randn(32, 64).bfloat16()}
    entry = opened(tmp_path, flat(modules)).entries[f"{EXPERTS}.gate_up_proj"]
    assert entry.packed is None
    assert torch.equal(entry.read(1, 2)[0, 32:], modules["1.up_proj"]["weight"].float())


@pytest.mark.parametrize("shape", [(), (1,), (24, 1), (24,)])
def test_fp8(tmp_path: Path, shape: tuple[int, ...]) -> None:
    codes = torch.arange(24 * 16).remainder(127).to(torch.uint8).view(24, 16).view(torch.float8_e4m3fn)
    scale = torch.rand(shape) + 0.5
    parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(1.0)}
    entry = opened(tmp_path, named(LINEAR, parts), {"quant_algo": "FP8"}).entries[f"{LINEAR}.weight"]
    whole = (
        codes.double() * scale.double().expand(24).view(24, 1) if len(shape) < 2 else codes.double() * scale
    ).float()
    assert entry.packed is not None
    assert torch.equal(entry.read(0, 24), whole) and torch.equal(entry.read(5, 7), whole[5:7])
    packed = entry.packed(5, 7)
    assert packed.scale.shape == (2,) and torch.equal(packed.dense(), whole[5:7])


def signed(parts: dict[str, Tensor]) -> Tensor:
    """modelopt's `pack_int4_in_uint8` undone: the even output low, four bits with a sign, times the group's scale."""
    codes = torch.stack([parts["weight"] & 15, parts["weight"] >> 4], 1).flatten(0, 1).int()
    codes = torch.where(codes > 7, codes - 16, codes)
    return codes.float() * parts["weight_scale"].float().repeat_interleave(32, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int4_of_two_outputs_a_byte(tmp_path: Path, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(1)
    parts = {
        "weight": torch.randint(0, 256, (20, 64), generator=draw, dtype=torch.uint8),
        "weight_scale": torch.rand(40, 2, generator=draw).to(dtype),
    }
    entry = opened(tmp_path, named(LINEAR, parts), {"quant_algo": "W4A16_AWQ", "group_size": 32}).entries
    weight = entry[f"{LINEAR}.weight"]
    assert weight.shape == (40, 64) and torch.equal(weight.read(0, 40), signed(parts)) and weight.packed is not None
    packed = weight.packed(3, 18)
    assert packed.kind == "int4" and packed.bias is None and torch.equal(packed.dense(), signed(parts)[3:18])


def test_scaled_inputs_are_part_of_the_weight(tmp_path: Path) -> None:
    """AWQ multiplies each input by a scale before the product; no code says that, so that it is held as int8."""
    parts = module(40, 64, 0)
    scale = torch.rand(64, generator=torch.Generator().manual_seed(2)).bfloat16()
    tensors = named(LINEAR, {**parts, "pre_quant_scale": scale})
    entry = opened(tmp_path, tensors, {"quant_algo": "NVFP4_AWQ", "group_size": 16}).entries[f"{LINEAR}.weight"]
    assert torch.equal(entry.read(1, 9), defined(parts).float()[1:9] * scale.float())
    assert (entry.packed, entry.fallback, entry.stored) == (None, "int8", "nvfp4, inputs scaled")
    with pytest.raises(CheckpointError, match=r"pre_quant_scale.*shape"):
        opened(tmp_path, named(LINEAR, {**parts, "pre_quant_scale": scale[:63]}))


@pytest.mark.parametrize(("algorithm", "kind"), [("MXFP8", "mxfp8"), ("mxfp4", "mxfp4"), ("W8A16", "int8")])
def test_microscaling_and_int8(tmp_path: Path, algorithm: str, kind: str) -> None:
    draw = torch.Generator().manual_seed(1)
    exponents = torch.randint(100, 150, (40, 2), generator=draw, dtype=torch.uint8)
    data = torch.randint(-127, 120, (40, 64), generator=draw)
    values = {
        "mxfp8": data.div(4).to(torch.float8_e4m3fn),
        "mxfp4": torch.randint(0, 256, (40, 32), generator=draw, dtype=torch.uint8),
        "int8": data.to(torch.int8),
    }[kind]
    scale = torch.rand(40, generator=draw) if kind == "int8" else exponents
    entries = opened(
        tmp_path, named(LINEAR, {"weight": values, "weight_scale": scale}), {"quant_algo": algorithm}
    ).entries
    wide = scale[:, None] if kind == "int8" else (scale.double() - 127).exp2().repeat_interleave(32, 1)
    if kind == "mxfp4":
        codes = torch.stack([values & 15, values >> 4], -1).flatten(1)
        exact = torch.tensor([half / 2 for half in HALVES])[(codes & 7).int()] * (1 - 2 * (codes >> 3).float()) * wide
    else:
        exact = values.float() * wide
    entry = entries[f"{LINEAR}.weight"]
    assert entry.packed is not None and entry.packed(0, 40).kind == entry.stored == kind
    assert torch.equal(entry.read(0, 40), exact.float()) and torch.equal(entry.packed(0, 40).dense(), exact.float())


@pytest.mark.parametrize("place", ["config", "nested", "own file"])
def test_where_the_quantisation_is_described(tmp_path: Path, place: str) -> None:
    own = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    nested = {"producer": {"name": "modelopt"}, "quantization": own}
    if place == "own file":
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(nested))
    settings = {"config": own, "nested": {"quant_method": "modelopt", **nested}, "own file": None}[place]
    assert f"{LINEAR}.weight" in opened(tmp_path, named(LINEAR, module(8, 32, 0)), settings).entries


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (None, "hf_quant_config.json"),
        ({"quant_algo": "NVFP4_SVD"}, "NVFP4_SVD"),
        ({"quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
        ({"quant_algo": None}, "quant_algo"),
        ({"quant_algo": ["NVFP4"]}, "quant_algo"),
        ({"quant_algo": {}}, "quant_algo"),
        ({}, "quant_algo"),
        ([], "does not say"),
        ({"quantization": 7}, "does not say"),
        ({"quant_algo": "NVFP4", "group_size": 32}, "group_size"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "NVFP4_SVD"}}}, "NVFP4_SVD"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": [1]}, "quantized_layers"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": 1}}, "quantized_layers"),
        ({"quant_algo": "X" * 100_000}, "XXX"),
    ],
)
def test_other_algorithms_are_refused_by_name(tmp_path: Path, settings: Any, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        opened(tmp_path, named(LINEAR, module(8, 32, 0)), settings)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_mixed_precision_is_read_layer_by_layer(tmp_path: Path) -> None:
    settings = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {LINEAR: {"quant_algo": "FP8"}, "x": NVFP4}}
    fp8 = {"weight": torch.ones(8, 16).to(torch.float8_e4m3fn), "weight_scale": torch.tensor(0.5)}
    entries = opened(tmp_path, named(LINEAR, fp8) | flat(experts()), settings).entries
    assert entries[f"{LINEAR}.weight"].stored == "fp8" and entries[f"{EXPERTS}.down_proj"].stored == "nvfp4"


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("weight", None, "without the weight"),
        ("weight_scale", None, "weight_scale"),
        ("weight_scale_2", None, "must be U8"),
        ("weight_scale_2", torch.ones(2), "shape"),
        ("weight_scale_2", torch.ones(()).bfloat16(), "BF16"),
        ("weight_scale", torch.ones(8, 3).to(torch.float8_e4m3fn), "shape"),
        ("weight_scale", torch.ones(8, 2).byte(), "U8"),
        ("weight_scale", torch.ones(16).to(torch.float8_e4m3fn), "shape"),
        ("weight", torch.zeros(8, 32).bfloat16(), "BF16"),
        ("weight", torch.zeros(8, 9).byte(), "weight_scale"),
        ("weight", torch.zeros(2, 8, 16).byte(), "shape"),
        ("weight", torch.zeros(16).byte(), "shape"),
        ("weight", torch.zeros(8, 0).byte(), "shape"),
        ("weight_zero_point", torch.zeros(8, 2).byte(), "layouts"),
    ],
)
def test_tensors_that_do_not_go_together(tmp_path: Path, part: str, value: Tensor | None, match: str) -> None:
    parts = module(8, 32, 0)
    parts.pop(part, None)
    parts |= {} if value is None else {part: value}
    with pytest.raises(CheckpointError, match=match) as caught:
        opened(tmp_path, named(LINEAR, parts))
    assert LINEAR in str(caught.value) and "\n" not in str(caught.value)


def test_codes_without_any_scale(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight.*U8.*no scales"):
        opened(tmp_path, {f"{LINEAR}.weight": torch.zeros(8, 16).byte()})


@pytest.mark.parametrize("part", ["weight_scale", "weight_scale_2"])
def test_damaged_scales(tmp_path: Path, part: str) -> None:
    parts = module(8, 32, 0)
    parts[part] = torch.full(parts[part].shape, math.nan).to(parts[part].dtype)
    entry = opened(tmp_path, named(LINEAR, parts)).entries[f"{LINEAR}.weight"]
    assert entry.packed is not None
    for read in (entry.read, entry.packed):
        with pytest.raises(CheckpointError, match=rf"{part} .*not finite"):
            read(0, 8)


@pytest.mark.parametrize(("missing", "match"), [("1.up_proj", "expert 1"), ("2.down_proj", "expert 2")])
def test_an_expert_that_is_missing(tmp_path: Path, missing: str, match: str) -> None:
    modules = experts()
    del modules[missing]
    with pytest.raises(CheckpointError, match=match):
        opened(tmp_path, flat(modules))


def test_an_expert_too_many_and_one_of_another_shape(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="too many"):
        opened(tmp_path, flat({**experts(), "3.up_proj": module(32, 64, 0)}))
    with pytest.raises(CheckpointError, match="shape"):
        opened(tmp_path, flat({**experts(), "1.up_proj": module(32, 32, 0)}))


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, flat(experts()))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="ends inside"):
        for entry in checkpoint.entries.values():
            entry.read(0, 3)
