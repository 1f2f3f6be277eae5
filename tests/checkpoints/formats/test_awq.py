"""checkpoints/formats/awq.py: AutoAWQ checkpoints: its packing, read back exactly, and files that lie."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_config
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint
from sfumato.checkpoints.formats.awq import open_awq
from sfumato.errors import CheckpointError

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs lies in a word's lowest four bits, in the next, and so on."""


def words_of(codes: Tensor) -> Tensor:
    """[N, O] codes -> int32 [N, O / 8], as AutoAWQ's WQLinear_GEMM packs them."""
    groups = codes.long().unflatten(1, (-1, 8))
    words = torch.zeros(groups.shape[:2], dtype=torch.long)
    for place, output in enumerate(ORDER):
        words |= groups[..., output] << 4 * place
    return (words - (words >> 31 << 32)).to(torch.int32)


def module(
    outputs: int, inputs: int, group: int, seed: int = 0, dtype: torch.dtype = torch.float16
) -> tuple[dict[str, Tensor], Tensor]:
    """A quantised module's tensors, and the weight [O, I] that they stand for, in float64."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (inputs, outputs), generator=generator)
    zeros = torch.randint(0, 16, (inputs // group, outputs), generator=generator)
    scales = (torch.rand(inputs // group, outputs, generator=generator) * 0.05 + 1e-4).to(dtype)
    wide = [tensor.repeat_interleave(group, 0) for tensor in (zeros, scales.double())]
    value = (codes - wide[0]).double() * wide[1]
    return {"qweight": words_of(codes), "qzeros": words_of(zeros), "scales": scales}, value.T


def named(name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def config(**settings: Any) -> dict[str, Any]:
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    return tiny_config().to_dict() | {"quantization_config": quantization | settings}


def put(folder: Path, tensors: dict[str, Tensor], **settings: Any) -> Checkpoint:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return open_awq(folder, config(**settings))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"),
    [(24, 96, 32), (16, 128, 64), (8, 256, 128), (8, 512, 256), (40, 96, -1), (8, 256, -1)],
)
def test_reads_exactly(tmp_path: Path, outputs: int, inputs: int, group: int, dtype: torch.dtype) -> None:
    parts, value = module(outputs, inputs, inputs if group == -1 else group, dtype=dtype)
    entry = put(tmp_path, named("a", parts), group_size=group).entries["a.weight"]
    assert entry.shape == (outputs, inputs) and entry.nbytes == sum(part.nbytes for part in parts.values())
    assert torch.equal(entry.read(0, outputs), value.float())
    for first, last in ((0, 8), (3, 5), (7, outputs), (outputs - 1, outputs)):
        assert torch.equal(entry.read(first, last), value[first:last].float())
        assert entry.packed is not None
        codes, exact = entry.packed(first, last).dense(), value[first:last].float()
        if dtype != torch.float32:
            assert torch.equal(codes, exact)
        else:  # code x scale + bias rounds otherwise than (code - zero) x scale
            assert ((codes - exact).abs() <= 2.0**-22 * value.float().abs().amax()).all()
    assert entry.packed is not None and entry.fallback is None
    form = entry.packed(0, outputs)
    narrow = {96: 96, 256: 128}.get(inputs, 32) if group == -1 else min(group, 128)
    assert (form.kind, form.group, form.scale.dtype) == ("int4", narrow, torch.float32)


def test_the_order_in_a_word(tmp_path: Path) -> None:
    """The first input's codes are 0 to 7 for the outputs 0 to 7: in a word, from the top, 7 5 3 1 6 4 2 0."""
    words = torch.zeros(32, 1, dtype=torch.int32)
    words[0] = 0x75316420
    parts = {"qweight": words, "qzeros": torch.zeros(1, 1, dtype=torch.int32), "scales": torch.ones(1, 8).half()}
    entry = put(tmp_path, named("a", parts)).entries["a.weight"]
    assert entry.read(0, 8)[:, 0].tolist() == list(range(8))


def test_as_compressed_tensors_converts(tmp_path: Path) -> None:
    reason = "compressed-tensors with its AutoAWQ converter is not installed"
    autoawq = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq", reason=reason)
    parts, _ = module(24, 96, 32, seed=1)
    convert = autoawq.AutoAWQConverter(group_size=32)._convert_gemm_module
    codes, scales, zeros = convert(parts["qweight"], parts["scales"], parts["qzeros"])
    value = ((codes.unflatten(1, (-1, 32)) - zeros[..., None]) * scales.float()[..., None]).flatten(1)
    assert torch.equal(put(tmp_path, named("a", parts)).entries["a.weight"].read(0, 24), value)


def test_without_zero_points(tmp_path: Path) -> None:
    """They may be absent where config.json says so; eight then stands for zero."""
    parts, _ = module(8, 64, 32)
    code = module(8, 64, 32)[0]["qweight"]
    del parts["qzeros"]
    entry = put(tmp_path, named("a", parts), zero_point=False).entries["a.weight"]
    eights = {"qweight": code, "qzeros": torch.full((2, 1), -0x77777778, dtype=torch.int32), "scales": parts["scales"]}
    (other := tmp_path / "other").mkdir()
    expected = put(other, named("a", eights)).entries["a.weight"].read(0, 8)
    assert torch.equal(entry.read(0, 8), expected) and entry.packed
    form = entry.packed(0, 8)
    assert form.bias is None and form.scale.dtype == torch.float16 and torch.equal(form.dense(), expected)


def test_experts_are_stacked(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {"model.decoder.norm.weight": torch.ones(24, dtype=torch.bfloat16)}
    values: dict[str, list[Tensor]] = {"gate_proj": [], "up_proj": [], "down_proj": []}
    prefix = "model.decoder.layers.0.experts"
    for number in range(5):
        for seed, which in enumerate(values):
            shape = (24, 64) if which == "down_proj" else (64, 32)
            parts, value = module(*shape, 32, seed=10 * number + seed)
            values[which].append(value)
            tensors |= named(f"{prefix}.{number}.{which}", parts)
    checkpoint = put(tmp_path, tensors)
    assert checkpoint.entries.keys() == {"model.decoder.norm.weight", f"{prefix}.gate_up_proj", f"{prefix}.down_proj"}
    assert checkpoint.format == "AWQ 4-bit" and "quantization_config" not in checkpoint.config
    stacks = [torch.stack(values[which]).float() for which in values]
    for name, expected in (("gate_up_proj", torch.cat(stacks[:2], 1)), ("down_proj", stacks[2])):
        entry = checkpoint.entries[f"{prefix}.{name}"]
        assert entry.shape == tuple(expected.shape) and entry.packed
        for first, last in ((0, 5), (3, 4)):
            assert torch.equal(entry.read(first, last), expected[first:last])
            assert torch.equal(entry.packed(first, last).dense(), expected[first:last])


def test_plain_tensors_go_through(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"t_min": 0.5}')
    stack = torch.randn(5, 24, 24).bfloat16()
    scale = torch.ones(24)
    tensors = {"l.experts.gate_up_proj": stack, "l.router.scale": scale, "l.q_norm.weight": scale + 1}
    checkpoint = put(tmp_path, tensors)
    assert checkpoint.entries.keys() == tensors.keys() and checkpoint.generation == {"t_min": 0.5}
    for name, tensor in tensors.items():
        entry = checkpoint.entries[name]
        assert entry.read(0, len(tensor)).dtype == tensor.dtype and not entry.packed
        assert torch.equal(entry.read(1, 4), tensor[1:4]) and entry.nbytes == tensor.nbytes


def test_experts_with_scales_of_different_types(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    values = []
    for number in range(5):
        parts, value = module(8, 64, 32, seed=number, dtype=torch.bfloat16 if number == 2 else torch.float16)
        tensors |= named(f"l.experts.{number}.down_proj", parts)
        values.append(value.float())
    entry = put(tmp_path, tensors).entries["l.experts.down_proj"]
    assert entry.packed and torch.equal(entry.read(0, 5), torch.stack(values))
    packed = entry.packed(0, 5)
    assert (packed.kind, packed.scale.dtype) == ("int4", torch.float32)
    assert torch.equal(packed.dense(), torch.stack(values))


# ---- files that lie -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "words"), [
    ({"scales": None}, r"a\.scales is missing; it belongs to a\.qweight"),
    ({"qzeros": None}, r"a\.qzeros is missing"),
    ({"scales": torch.ones(2, 16).half()}, r"a\.scales in .* has the shape \[2, 16\]; .* asks for \[2, 8\]"),
    ({"scales": torch.ones(3, 8).half()}, r"a\.scales in .* has the shape \[3, 8\]"),
    ({"scales": torch.ones(16).half()}, r"a\.scales in .* of shape \[16\]; it must be a matrix"),
    ({"scales": torch.ones(2, 8, dtype=torch.int32)}, "is I32 of shape .* a matrix of BF16 or F16 or F32"),
    ({"qzeros": torch.ones(1, 1, dtype=torch.int32)}, r"a\.qzeros in .* asks for \[2, 1\]"),
    ({"qzeros": torch.ones(2, 1)}, r"a\.qzeros in .* is F32 .* a matrix of I32"),
    ({"qweight": torch.ones(64, 1)}, r"a\.qweight in .* is F32 .* a matrix of I32"),
    ({"qweight": torch.ones(65, 1, dtype=torch.int32)}, "groups must be whole and even"),
    ({"qweight": torch.ones(0, 1, dtype=torch.int32)}, r"of shape \[0, 1\]; it must be"),
    ({"weight": torch.ones(8, 64)}, r"has a\.weight twice: quantised, and as it is"),
    ({"other": torch.ones(8, dtype=torch.int32)}, r"a\.other in .* is stored as I32 .*; a plain weight must be BF16"),
])  # fmt: skip
def test_tensors_that_do_not_go_together(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    parts = {name: tensor for name, tensor in (module(8, 64, 32)[0] | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=words) as caught:
        put(tmp_path, named("a", parts))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("settings", "words"), [
    ({"bits": 3}, "bits 3, version 'gemm'; .* bits 4 in version gemm"),
    ({"bits": "4"}, "bits '4', version 'gemm'"),
    ({"version": "gemv_fast"}, "version 'gemv_fast'"),
    ({"group_size": 17}, "group_size 17; it must be an even number, or -1"),
    ({"group_size": 0}, "group_size 0;"),
    ({"group_size": True}, "group_size True;"),
    ({"group_size": "32"}, "group_size 32;"),
    ({"group_size": 64}, r"has the shape \[2, 8\]; .* in groups of 64 asks for \[1, 8\]"),
    ({"group_size": 1 << 40}, "groups must be whole"),
    ({"quant_method": "gptq"}, "no AWQ checkpoint"),
])  # fmt: skip
def test_settings_that_are_not_awq(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        put(tmp_path, named("a", module(8, 64, 32)[0]), **settings)


@pytest.mark.parametrize(("old", "new", "words"), [
    ("experts.2.up_proj", None, r"experts\.up_proj lacks expert 2 of 5"),
    ("experts.4.up_proj", "experts.5.up_proj", r"experts\.5\.up_proj\.weight is one expert too many; .* asks for 5"),
    ("experts.4.up_proj", "experts.04.up_proj", None),
    ("experts.4.up_proj", "experts.3.gate_up_proj", r"experts\.(up|gate_up)_proj lacks expert"),
    ("up_proj", None, "gate_proj is there without its up_proj"),
])  # fmt: skip
def test_experts_that_are_missing(tmp_path: Path, old: str, new: str | None, words: str | None) -> None:
    tensors: dict[str, Tensor] = {}
    for number in range(5):
        for which in ("gate_proj", "up_proj"):
            tensors |= named(f"l.experts.{number}.{which}", module(8, 64, 32)[0])
    changed = {name.replace(old, new or ""): part for name, part in tensors.items() if new or old not in name}
    if words is None:  # a number is a number
        assert put(tmp_path, changed).entries.keys() == {"l.experts.gate_up_proj"}
        return
    with pytest.raises(CheckpointError, match=words):
        put(tmp_path, changed)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scales_that_are_no_numbers(tmp_path: Path, bad: float) -> None:
    parts, _ = module(8, 64, 32)
    parts["scales"][1, 3] = bad
    entry = put(tmp_path, named("a", parts)).entries["a.weight"]
    assert entry.packed
    for read in (entry.read, entry.packed):
        with pytest.raises(CheckpointError, match=r"a\.scales in .* not finite numbers; it is damaged"):
            read(0, 8)
