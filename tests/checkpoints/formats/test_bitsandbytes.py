"""checkpoints/formats/bitsandbytes.py: what bitsandbytes itself has stored and unpacked (`record_bitsandbytes.py`), to
the bit; hostile files are refused by name.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint
from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.load import load
from sfumato.checkpoints.names import released_name
from sfumato.errors import CheckpointError
from sfumato.ops.packed import CODES, Packed
from sfumato.options import LoadOptions

RECORD = load_file(Path(__file__).with_name("bitsandbytes.safetensors"))
CONFIG = tiny_config(hidden_size=64, expert_size=32, intermediate_size=96, num_experts=3)
LINEAR = "model.decoder.layers.0.mlp.gate_proj"
EXPERTS = "model.decoder.layers.0.experts"


def recorded(case: str) -> dict[str, Tensor]:
    return {name.partition("/")[2]: part for name, part in RECORD.items() if name.partition("/")[0] == case}


def opened(folder: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps({**CONFIG.to_dict(), "quantization_config": settings}))
    return open_checkpoint(folder)


def state(kind: str, **says: Any) -> dict[str, Tensor]:
    text = json.dumps({"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", **says})
    return {f".quant_state.bitsandbytes__{kind}": torch.tensor(list(text.encode()), dtype=torch.uint8)}


def stored(shape: tuple[int, ...], kind: str = "nf4", block: int = 64, seed: int = 0) -> dict[str, Tensor]:
    """Any codes and scales of a weight, by what comes after its name."""
    draw, count = torch.Generator().manual_seed(seed), math.prod(shape)
    return {
        "": torch.randint(0, 256, (count // 2, 1), generator=draw, dtype=torch.uint8),
        ".absmax": torch.rand(-(-count // block), generator=draw) * 0.1,
        ".quant_map": torch.tensor(CODES[kind].table),
        **state(kind, shape=list(shape), blocksize=block),
    }


def named(name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}{part}": tensor for part, tensor in parts.items()}


def unpacked(parts: dict[str, Tensor], shape: tuple[int, ...], block: int) -> Tensor:
    """`_dequantize_4bit_compute` of bitsandbytes' backends/default/ops.py: the high half first, by flat blocks.

    So do its CUDA kernels; its CPU kernel takes other scales where blocks do not end with rows."""
    data = parts[""].view(torch.uint8).flatten()
    codes = torch.stack([data >> 4, data & 15], 1).flatten().int()
    scale = parts[".absmax"].repeat_interleave(block)[: len(codes)]
    return (parts[".quant_map"][codes] * scale).view(shape)


@pytest.mark.parametrize("case", ["nf4", "fp4", "nf4 nested", "fp4 nested", "int8"])
def test_what_bitsandbytes_unpacks(tmp_path: Path, case: str) -> None:
    parts = recorded(case)
    exact = parts.pop("values")
    checkpoint = opened(tmp_path, {f"{LINEAR}.{part}": tensor for part, tensor in parts.items()})
    entry = checkpoint.entries[f"{LINEAR}.weight"]
    assert list(checkpoint.entries) == [f"{LINEAR}.weight"]
    assert (
        entry.shape == (6, 128) and torch.equal(entry.read(0, 6), exact) and torch.equal(entry.read(1, 4), exact[1:4])
    )
    assert entry.packed is not None and entry.fallback is None
    packed = entry.packed(0, 6)
    assert packed.kind == case.removesuffix(" nested")
    if case == "int8":
        assert ((packed.dense() - exact).abs() <= exact.abs() * 2.0**-22).all()
    else:
        assert torch.equal(packed.dense(), exact) and packed.group == 64
        assert torch.equal(entry.packed(1, 4).dense(), exact[1:4])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("shape", "block"), [((8, 128), 64), ((5, 6), 64), ((3, 8, 20), 32), ((4, 2816), 128), ((4, 512), 4096)]
)
def test_blocks_over_rows_and_wide_storage(
    tmp_path: Path, shape: tuple[int, ...], block: int, dtype: torch.dtype
) -> None:
    name = f"{EXPERTS}.gate_up_proj" if len(shape) == 3 else f"{LINEAR}.weight"
    parts = stored(shape, block=block)
    exact = unpacked(parts, shape, block)
    if parts[""].numel() % dtype.itemsize:
        pytest.skip("the codes fill no whole number of such values")
    parts[""] = parts[""].flatten().view(dtype)[:, None]
    entry = opened(tmp_path, named(name, parts)).entries[name]
    assert torch.equal(entry.read(0, shape[0]), exact) and torch.equal(entry.read(1, 3), exact[1:3])
    assert entry.packed is not None and entry.packed(0, shape[0]).group <= 128, "more is not what kernels take"


def test_a_whole_checkpoint_stays_packed(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for own, weight in tiny_model(CONFIG).state_dict().items():
        if "mlp." in own and own.endswith("weight"):
            shape = tuple(weight.shape)
            parts = stored(shape, seed=len(kept))
            tensors |= named(released_name(own), parts)
            kept[own] = unpacked(parts, shape, 64)
        else:
            tensors[released_name(own)] = weight.bfloat16()
    notices: list[str] = []
    model = load(opened(tmp_path, tensors), LoadOptions(device="cpu", ops="reference"), notice=notices.append)
    assert len(kept) == 12 and not [one for one in notices if "held as" in one]
    for own, exact in kept.items():
        owner, _, leaf = own.rpartition(".")
        held = getattr(model.get_submodule(owner), leaf)
        assert isinstance(held, Packed) and held.kind == "nf4" and torch.equal(held.dense(), exact)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"": None}, "without the weight"),
        ({"": torch.zeros(31, 1, dtype=torch.uint8)}, "31 bytes"),
        ({".absmax": None}, "absmax .*missing"),
        ({".absmax": torch.ones(2)}, "absmax .*must be F32"),
        ({".absmax": torch.ones(1).half()}, "absmax .*F16"),
        ({".nested_absmax": torch.ones(1)}, "absmax .*must be U8"),
        ({".nested_quant_map": torch.ones(255)}, "nested_quant_map"),
        ({".quant_map": None}, "quant_map .*missing"),
        ({".quant_map": torch.ones(15)}, "quant_map"),
        (state("nf4", shape=[4, 15]), "odd number"),
        (state("nf4", shape=[4, 16, 1, 1]), "shape"),
        (state("nf4", shape=[-4, -16]), "shape"),
        (state("nf4", shape=[2**40, 16]), "shape"),
        (state("nf4", shape="4x16"), "shape"),
        (state("nf4", shape=[4, 16], blocksize=0), "blocksize"),
        (state("nf4", shape=[4, 16], blocksize=True), "blocksize"),
        (state("nf4", shape=[4, 16], blocksize=63), "blocksize"),
        (state("nf4", shape=[4, 16], blocksize=10**30), "blocksize"),
        (state("nf4", shape=[4, 16], nested_blocksize=-1), "nested_blocksize"),
        (state("nf4", shape=[4, 16], nested_offset=math.inf), "nested_offset"),
        (state("nf4", shape=[4, 16], nested_offset="1"), "nested_offset"),
        (state("nf4", shape=[4, 16], quant_type="fp4"), "type nf4"),
        (state("nf4", shape=[4, 16], more="x" * 5000), "at most 4096"),
        ({".quant_state.bitsandbytes__nf4": torch.tensor([255, 1], dtype=torch.uint8)}, "no JSON"),
        ({".quant_state.bitsandbytes__nf4": torch.tensor(list(b"[" * 4000), dtype=torch.uint8)}, "no JSON"),
        ({".quant_state.bitsandbytes__nf4": torch.tensor(list(b"[1]"), dtype=torch.uint8)}, "object"),
        ({".quant_state.bitsandbytes__nf4": torch.ones(3)}, "F32"),
    ],
)
def test_files_that_lie(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    parts: dict[str, Any] = {**stored((4, 16)), **change}
    with pytest.raises(CheckpointError, match=match) as caught:
        opened(tmp_path, named(f"{LINEAR}.weight", {part: one for part, one in parts.items() if one is not None}))
    assert LINEAR in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_another_type(tmp_path: Path) -> None:
    parts = {f".quant_state.bitsandbytes__{'af4'}": torch.ones(3, dtype=torch.uint8), "": torch.ones(3, 1).byte()}
    with pytest.raises(CheckpointError, match="af4"):
        opened(tmp_path, named(f"{LINEAR}.weight", parts))


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("absmax", torch.full((1,), math.nan), "not finite"),
        ("quant_map", torch.linspace(-1, 1, 16), "not the table of nf4"),
    ],
)
def test_damage_that_reading_finds(tmp_path: Path, part: str, value: Tensor, match: str) -> None:
    entry = opened(tmp_path, named(f"{LINEAR}.weight", {**stored((4, 16)), f".{part}": value})).entries
    with pytest.raises(CheckpointError, match=match):
        entry[f"{LINEAR}.weight"].read(0, 4)


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("weight", None, "without the weight"),
        ("weight", torch.zeros(6, 128), "F32"),
        ("SCB", torch.ones(5), "SCB"),
        ("SCB", torch.ones(6).half(), "F16"),
        ("weight_format", torch.ones((), dtype=torch.uint8), "rows"),
    ],
)
def test_llm_int8_that_is_none(tmp_path: Path, part: str, value: Tensor | None, match: str) -> None:
    parts = recorded("int8")
    del parts["values"], parts[part]
    parts |= {} if value is None else {part: value}
    with pytest.raises(CheckpointError, match=match) as caught:
        opened(tmp_path, {f"{LINEAR}.{name}": tensor for name, tensor in parts.items()})
    assert "\n" not in str(caught.value)
