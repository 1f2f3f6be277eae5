"""checkpoints/formats/fp8.py: transformers' FP8, held against its own quantiser and dequantiser; what stays packed, and
how much memory a file of the released sizes takes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from released_config import RELEASED
from safetensors.torch import save_file
from tiny import tiny_config, tiny_model
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint
from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.load import load
from sfumato.checkpoints.names import released_name
from sfumato.errors import CheckpointError, InputError
from sfumato.ops.packed import Packed
from sfumato.options import LoadOptions

CONFIG = tiny_config(hidden_size=64, expert_size=96, intermediate_size=192, num_experts=3)
LINEAR = "model.decoder.layers.0.self_attn.q_proj"
EXPERTS = "model.decoder.layers.0.experts"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def opened(
    folder: Path,
    tensors: dict[str, Tensor],
    block: Any = (128, 128),
    plain: dict[str, Tensor] | None = None,
    **more: Any,
) -> Checkpoint:
    save_file({**(plain or {}), **tensors}, folder / "model.safetensors")
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block, **more}
    (folder / "config.json").write_text(json.dumps({**CONFIG.to_dict(), "quantization_config": settings}))
    return open_checkpoint(folder)


def e4m3(*shape: int, seed: int = 0) -> Tensor:
    codes = torch.randint(0, 254, shape, generator=generator(seed), dtype=torch.uint8)
    return torch.where(codes >= 127, codes + 1, codes).view(torch.float8_e4m3fn)


def scales(*shape: int, seed: int = 9) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).exp()


def dequantised(codes: Tensor, scale: Tensor) -> Tensor:
    """By transformers itself, in float32; its blocks are what the shapes give, so that they must be whole."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="needs transformers as the oracle")
    weight: Tensor = fp8.Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
    return weight


def in_blocks(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """What FP8Linear's kernel multiplies by, where a last block may be smaller: code x scale of its block."""
    wide = scale.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return codes.float() * wide[..., : codes.shape[-2], : codes.shape[-1]]


@pytest.mark.parametrize(
    ("shape", "grid", "block"),
    [
        ((256, 384), (2, 3), (128, 128)),
        ((256, 384), (4, 3), (64, 128)),
        ((256, 384), (1, 4), (512, 96)),
        ((96, 128), (96, 1), (1, 128)),
        ((256, 512), (2, 2), (128, 256)),
        ((96, 120), (4, 3), (24, 40)),
        ((96, 128), (1, 1), None),
        ((96, 128), (), None),
    ],
)
def test_a_linear_is_what_transformers_makes_of_it(
    tmp_path: Path, shape: tuple[int, int], grid: tuple[int, ...], block: Any
) -> None:
    codes, scale = e4m3(*shape), scales(*grid)
    tensors = {f"{LINEAR}.weight": codes, f"{LINEAR}.weight_scale_inv": scale}
    tensors[f"{LINEAR}.activation_scale"] = torch.ones(())
    checkpoint = opened(tmp_path, tensors, block)
    assert checkpoint.format == "transformers FP8" and any("activation_scale" in one for one in checkpoint.notices)
    entry = checkpoint.entries[f"{LINEAR}.weight"]
    theirs = dequantised(codes, scale.reshape(grid or (1, 1)))
    assert torch.equal(entry.read(0, shape[0]), theirs) and entry.packed is not None and entry.fallback is None
    packed = entry.packed(0, shape[0])
    assert packed.kind == "fp8" and packed.data.dtype == torch.float8_e4m3fn and torch.equal(packed.dense(), theirs)
    assert torch.equal(entry.read(3, 90), theirs[3:90])
    if block and block[0] > 1:
        with pytest.raises(InputError, match="row 3 begins none"):
            entry.packed(3, 90)


def test_blocks_that_are_not_whole(tmp_path: Path) -> None:
    codes, scale = e4m3(300, 200), scales(3, 2)
    entry = opened(tmp_path, {f"{LINEAR}.weight": codes, f"{LINEAR}.weight_scale_inv": scale}).entries[
        f"{LINEAR}.weight"
    ]
    exact = in_blocks(codes, scale, (128, 128))
    assert torch.equal(entry.read(0, 300), exact) and entry.packed is not None
    assert torch.equal(entry.packed(0, 300).dense(), exact)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize(("grid", "block", "kind"), [((96, 4), (1, 32), "mxfp8"), ((3, 2), (32, 64), "fp8")])
def test_scales_that_are_powers_of_two(
    tmp_path: Path, dtype: torch.dtype, grid: tuple[int, int], block: tuple[int, int], kind: str
) -> None:
    codes = e4m3(96, 128)
    exponents = torch.randint(100, 150, grid, generator=generator(1), dtype=torch.uint8)
    tensors = {f"{LINEAR}.weight": codes, f"{LINEAR}.weight_scale_inv": exponents.view(dtype)}
    entry = opened(tmp_path, tensors, block, scale_fmt="ue8m0").entries[f"{LINEAR}.weight"]
    assert entry.packed is not None and entry.packed(0, 96).kind == kind
    theirs = dequantised(codes, exponents)
    assert torch.equal(entry.read(0, 96), theirs) and torch.equal(entry.packed(0, 96).dense(), theirs)


@pytest.mark.parametrize(
    ("shape", "grid", "block"),
    [
        ((3, 384, 256), (3, 3, 2), (128, 128)),
        ((3, 192, 64), (3, 2, 1), (256, 128)),  # gate and up have a scale each, however few they are
        ((3, 192, 64), (3, 2, 1), None),
        ((3, 64, 96), (3, 1, 1), None),
    ],
)
def test_experts_fused(tmp_path: Path, shape: tuple[int, ...], grid: tuple[int, ...], block: Any) -> None:
    codes, scale = e4m3(*shape), scales(*grid)
    tensors = {f"{EXPERTS}.gate_up_proj": codes, f"{EXPERTS}.gate_up_proj_scale_inv": scale}
    tensors[f"{EXPERTS}.gate_up_proj_activation_scale"] = torch.ones(3)
    entry = opened(tmp_path, tensors, block).entries[f"{EXPERTS}.gate_up_proj"]
    theirs = dequantised(codes, scale)
    assert entry.shape == shape and torch.equal(entry.read(0, 3), theirs) and entry.packed is not None
    assert torch.equal(entry.packed(1, 3).dense(), theirs[1:])


def test_experts_of_four_bits(tmp_path: Path) -> None:
    codes = torch.randint(-128, 128, (3, 64, 48), generator=generator(0), dtype=torch.int8)
    exponents = torch.randint(100, 150, (3, 64, 3), generator=generator(1), dtype=torch.uint8)
    tensors = {f"{EXPERTS}.down_proj": codes, f"{EXPERTS}.down_proj_scale_inv": exponents.view(torch.float8_e8m0fnu)}
    entry = opened(tmp_path, tensors, expert_dtype="fp4", scale_fmt="ue8m0").entries[f"{EXPERTS}.down_proj"]
    theirs = dequantised(codes, exponents)
    assert entry.shape == (3, 64, 96) and entry.stored == "mxfp4" and torch.equal(entry.read(0, 3), theirs)
    assert entry.packed is not None and torch.equal(entry.packed(1, 2).dense(), theirs[1:2])


@pytest.mark.parametrize("outputs", [128, 96, 40, 7, 704])
def test_blocks_of_gate_and_up_join_wherever_they_end(tmp_path: Path, outputs: int) -> None:
    """The release's 704 outputs are five blocks and a half: the seam between gate and up lies within one."""
    tensors, grid = {}, (math.ceil(outputs / 128), 2)
    for number in range(3):
        for kind in ("gate", "up"):
            tensors[f"{EXPERTS}.{number}.{kind}_proj.weight"] = e4m3(outputs, 200, seed=number)
            tensors[f"{EXPERTS}.{number}.{kind}_proj.weight_scale_inv"] = scales(
                *grid, seed=number + 3 * (kind == "up")
            )
    entry = opened(tmp_path, tensors).entries[f"{EXPERTS}.gate_up_proj"]
    for number in range(3):
        for kind, rows in (("gate", slice(0, outputs)), ("up", slice(outputs, None))):
            prefix = f"{EXPERTS}.{number}.{kind}_proj.weight"
            assert torch.equal(
                entry.read(number, number + 1)[0, rows],
                in_blocks(tensors[prefix], tensors[f"{prefix}_scale_inv"], (128, 128)),
            )
    assert entry.packed is not None
    packed = entry.packed(0, 3)
    assert torch.equal(packed.dense(), entry.read(0, 3))
    assert (packed.block_rows, packed.data.nbytes) == (math.gcd(outputs, 128), 3 * 2 * outputs * 200)


def quantised(weight: Tensor) -> dict[str, Tensor]:
    """By transformers' own quantiser, which passes over what is not in whole blocks."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="needs transformers as the oracle")
    quantiser = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=(32, 64), scale_fmt="float"))
    parts: dict[str, Tensor] = fp8.Fp8Quantize(quantiser)._quantize_one("x.weight", weight)
    return parts


def test_a_whole_checkpoint_stays_packed(tmp_path: Path) -> None:
    model = tiny_model(CONFIG)
    tensors: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for own, weight in model.state_dict().items():
        name = released_name(own)
        parts = quantised(weight) if "_proj" in name and ".layers." in name else {}
        if len(parts) == 2:
            codes, scale = parts.values()
            tensors |= {name: codes, f"{name}_scale_inv": scale}
            kept[own] = dequantised(codes, scale)
        else:
            tensors[name] = weight.bfloat16()
    checkpoint = opened(tmp_path, tensors, (32, 64))
    notices: list[str] = []
    loaded = load(checkpoint, LoadOptions(device="cpu", ops="reference"), notice=notices.append)
    assert any("experts.gate_up_proj" in name for name in kept) and any("self_attn" in name for name in kept)
    for own, exact in kept.items():
        owner, _, leaf = own.rpartition(".")
        weight = getattr(loaded.get_submodule(owner), leaf)
        assert isinstance(weight, Packed) and weight.kind == "fp8" and torch.equal(weight.dense(), exact)
    assert not [one for one in notices if "held as" in one]


def test_the_released_sizes_stay_packed(tmp_path: Path) -> None:
    """From shapes: what the experts of the release take when they are loaded, half of what they take in bfloat16."""
    text = RELEASED["text_config"]
    width, hidden, count, layers = (
        text[key] for key in ("hidden_size", "moe_intermediate_size", "num_experts", "num_hidden_layers")
    )
    few = 2  # experts that are really made; the codes of each take as many bytes
    tensors = {}
    for kind, (outputs, inputs) in {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}.items():
        for number in range(few):
            prefix = f"{EXPERTS}.{number}.{kind}_proj"
            tensors[f"{prefix}.weight"] = torch.zeros(outputs, inputs, dtype=torch.float8_e4m3fn)
            tensors[f"{prefix}.weight_scale_inv"] = torch.ones(math.ceil(outputs / 128), math.ceil(inputs / 128))
    save_file(tensors, tmp_path / "model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = json.loads(json.dumps({**RELEASED, "quantization_config": settings}))
    config["text_config"] |= {"num_experts": few, "top_k_experts": few}
    (tmp_path / "config.json").write_text(json.dumps(config))
    entries = open_checkpoint(tmp_path).entries
    nbytes = 0
    for stack in ("gate_up_proj", "down_proj"):
        packed = entries[f"{EXPERTS}.{stack}"].packed
        assert packed is not None
        nbytes += packed(0, few).nbytes
    whole = nbytes / few * count * layers
    assert whole / 1e9 == pytest.approx(22.847, abs=0.001)
    assert whole < 0.501 * (2 * count * layers * 3 * hidden * width)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gate_up_proj": None}, "without the stack"),
        ({"gate_up_proj": torch.zeros(3, 64, 64)}, "F32"),
        ({"gate_up_proj": torch.zeros(64, 64).to(torch.float8_e4m3fn)}, "stack"),
        ({"gate_up_proj": torch.zeros(3, 0, 64).to(torch.float8_e4m3fn)}, "stack"),
        ({"gate_up_proj_scale_inv": torch.ones(3, 3, 1)}, "shape"),
        ({"gate_up_proj_scale_inv": torch.ones(2, 1, 1)}, "shape"),
        ({"gate_up_proj_scale_inv": torch.ones(3, 1, 1).double()}, "F64"),
    ],
)
def test_stacks_that_are_not_as_they_should_be(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    parts: dict[str, Any] = {"gate_up_proj": e4m3(3, 64, 64), "gate_up_proj_scale_inv": torch.ones(3, 1, 1), **change}
    tensors = {f"{EXPERTS}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=match) as caught:
        opened(tmp_path, tensors)
    assert EXPERTS in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("block", [[0, 128], [128], "128", [10**9, 1], [1.5, 2], 7, [[1], 2]])
def test_blocks_that_cannot_be(tmp_path: Path, block: Any) -> None:
    with pytest.raises(CheckpointError, match="weight_block_size"):
        opened(tmp_path, {f"{LINEAR}.weight": e4m3(4, 8), f"{LINEAR}.weight_scale_inv": torch.ones(1, 1)}, block)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_damaged_scales(tmp_path: Path, value: float) -> None:
    tensors = {f"{EXPERTS}.gate_up_proj": e4m3(3, 64, 64), f"{EXPERTS}.gate_up_proj_scale_inv": torch.ones(3, 1, 1)}
    tensors[f"{EXPERTS}.gate_up_proj_scale_inv"][1] = value
    entry = opened(tmp_path, tensors).entries[f"{EXPERTS}.gate_up_proj"]
    with pytest.raises(CheckpointError, match="not finite"):
        entry.read(0, 3)
