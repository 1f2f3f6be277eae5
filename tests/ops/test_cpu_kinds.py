"""ops/cpu/groups.h: every kind of codes against the reference, in every group and with every scale that files have, by
every way of multiplying tiles; and weights of two forms beside each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sfumato import ops
from sfumato.errors import InputError
from sfumato.ops import cpu, reference
from sfumato.ops.cpu import build
from sfumato.ops.packed import BLOCK, CODES, Packed
from sfumato.quant import formats

pytestmark = pytest.mark.skipif(build.obstacle() is not None, reason=f"the library cannot be built: {build.obstacle()}")

TABLES = ("int4", "iq4", "iq3", "iq3s", "iq2", "iq1", "nf4", "fp4")
GROUPS = (16, 32, 64, 128)
HALF, FLOAT8 = torch.float16, torch.float8_e4m3fn
FORMS: dict[str, dict[str, Any]] = {
    **{f"{kind} by {group}": {"kind": kind, "group": group} for kind in TABLES for group in GROUPS},
    **{f"int4 by {group}, bias": {"kind": "int4", "group": group, "bias": True} for group in GROUPS},
    **{f"int8 by {group}": {"kind": "int8", "group": group} for group in GROUPS},
    "int4 by 16, float16": {"kind": "int4", "group": 16, "bias": True, "scale": HALF},
    "iq4 by 32, float16": {"kind": "iq4", "group": 32, "scale": HALF},
    "nf4 by 64, bfloat16": {"kind": "nf4", "group": 64, "scale": torch.bfloat16},
    "int8 by 32, bias": {"kind": "int8", "group": 32, "bias": True},
    "nvfp4": {"kind": "nvfp4", "group": 16, "scale": FLOAT8, "factor": True},
    "nvfp4, no factor": {"kind": "nvfp4", "group": 16, "scale": FLOAT8},
    "mxfp4": {"kind": "mxfp4", "group": 32, "scale": torch.uint8},
    "mxfp8": {"kind": "mxfp8", "group": 32, "scale": torch.uint8},
    "fp8": {"kind": "fp8", "group": 0},
    "fp8 by blocks": {"kind": "fp8", "group": BLOCK},
}
SHAPES = {"narrow": (7, 45, 128), "the release's": (37, 70, 704)}


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale


def codes_of(kind: str, shape: tuple[int, ...], has_bias: bool) -> Tensor:
    """Any codes of a kind that stand for numbers; the smallest and the largest among them."""
    draw = torch.Generator().manual_seed(len(kind) + sum(shape))
    if kind == "int8":
        codes = torch.randint(0, 256, shape, generator=draw).to(torch.uint8)
        return codes if has_bias else codes.view(torch.int8)
    if CODES[kind].bits == 8:
        codes = torch.randint(0, 256, shape, generator=draw)
        return torch.where(codes & 127 == 127, 8, codes).to(torch.uint8).view(FLOAT8)
    table = torch.tensor(CODES[kind].table or [0.0] * 16)
    known = torch.arange(16)[table.isfinite()]
    low, high = (known[torch.randint(0, len(known), (*shape[:-1], shape[-1] // 2), generator=draw)] for _ in range(2))
    return (low | high << 4).to(torch.uint8)


def packed_as(name: str, *shape: int) -> Packed:
    """A weight of this shape in one of `FORMS`: random codes, scales and what else belongs to it."""
    form = {"scale": torch.float32, "bias": False, "factor": False, **FORMS[name]}
    kind, group, (*stack, outputs, inputs) = form["kind"], form["group"] or shape[-1], shape
    rows = -(-outputs // BLOCK) if form["group"] == BLOCK and kind == "fp8" else outputs
    wide = (*stack, rows, -(-inputs // group)) if form["group"] else (*stack, outputs)
    size = 0.02 / (1.0 if kind in ("nf4", "fp4", "iq1") else 8.0 if kind != "fp8" else 64.0)
    scale = random(*wide, seed=2).abs() * size + size / 4
    if form["scale"] == torch.uint8:
        scale = torch.randint(116, 124, wide, generator=torch.Generator().manual_seed(1))
    elif form["scale"] == FLOAT8:
        scale = scale * 2000
    scale = scale.to(form["scale"])
    bias = random(*wide, seed=3, scale=0.05).to(scale.dtype) if form["bias"] else None
    factor = random(*stack, outputs, seed=4, scale=0.01) if form["factor"] else None
    return Packed(kind, shape, codes_of(kind, shape, form["bias"]), scale, group, bias, factor)


def exact_product(x: Tensor, packed: Packed, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What the library promises, in float64: x in bfloat16, or as fp8 rounds it; what codes stand for in bfloat16; and
    of groups narrower than a tile, whose scales come first, the weight itself."""
    kind = packed.kind
    if (table := CODES[kind].table) is not None:
        near = tuple(torch.tensor(table).bfloat16().tolist())
        monkeypatch.setitem(CODES, kind, type(CODES[kind])(kind, near))  # type: ignore[call-arg]
    weight = packed.dense(torch.bfloat16 if packed.group < 32 and kind not in ("nvfp4", "fp8") else torch.float32)
    if packed.bias is not None and packed.group < 32:  # code x scale + bias in one rounding
        codes = replace(packed, scale=torch.ones_like(packed.scale), bias=torch.zeros_like(packed.bias)).dense()
        scale, bias = (part.repeat_interleave(packed.group, -1).double() for part in (packed.scale, packed.bias))
        weight = (codes * scale + bias).float().bfloat16()
    return packed.round_input(x.bfloat16()).double() @ weight.double().mT


def check_near(result: Tensor, exact: Tensor, size: Tensor) -> None:
    """Within sums in float32: of each output, 2^-19 of the sum of what was added."""
    assert result.shape == exact.shape and result.isfinite().all()
    assert ((result.double() - exact).abs() <= size * 2.0**-19).all()


@pytest.mark.parametrize("name", FORMS)
def test_every_kind(way: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows, outputs, inputs in SHAPES.values():
        if inputs % max(FORMS[name]["group"], 1) and FORMS[name]["kind"] != "fp8":
            inputs += -inputs % FORMS[name]["group"]
        x, packed = random(rows, inputs), packed_as(name, outputs, inputs)
        (result,) = cpu.linear(x, cpu.pack(packed))
        with monkeypatch.context() as patch:
            exact = exact_product(x, packed, patch)
            size = packed.round_input(x.bfloat16()).double().abs() @ packed.dense().double().abs().mT
        check_near(result, exact, size)
        (rounded,) = cpu.linear(x.bfloat16(), cpu.pack(packed))
        assert ((rounded.double() - exact).abs() <= size * 2.0**-18 + exact.abs() * 2.0**-8).all()
        plain = reference.linear(x.bfloat16().float(), packed)[0]
        assert (result - plain).norm() <= 0.006 * exact.norm()


@pytest.mark.parametrize("outputs, inputs", [(1, 48), (33, 16), (64, 2816), (40, 2112)])
@pytest.mark.parametrize("name", ["int4 by 16, bias", "iq2 by 16", "int8 by 16", "nvfp4", "fp8", "fp8 by blocks"])
def test_a_last_tile_that_is_not_full(
    way: str, name: str, outputs: int, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing behind a row is read: what lies there is not a number."""
    x, packed = random(3, inputs), packed_as(name, outputs, inputs)
    whole = torch.cat([packed.data.view(torch.uint8).flatten(), torch.full((64,), 0x7F, dtype=torch.uint8)])
    packed = replace(packed, data=whole[:-64].view(packed.data.dtype).view(packed.data.shape))
    (result,) = cpu.linear(x, cpu.pack(packed))
    exact = exact_product(x, packed, monkeypatch)
    check_near(result, exact, packed.round_input(x.bfloat16()).double().abs() @ packed.dense().double().abs().mT)


def test_blocks_of_many_outputs(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp8 by blocks of 128 x 128 of which the last is smaller along both: 704 is five and a half."""
    x, packed = random(5, 704), packed_as("fp8 by blocks", 300, 704)
    assert packed.scale.shape == (3, 6)
    size = packed.round_input(x.bfloat16()).double().abs() @ packed.dense().double().abs().mT
    check_near(cpu.linear(x, cpu.pack(packed))[0], exact_product(x, packed, monkeypatch), size)


def test_fp8_in_blocks_of_fewer_outputs() -> None:
    """Joined gate and up, and other tools' blocks: the same weight, and so the same sums to the bit."""
    x, packed = random(5, 704), packed_as("fp8 by blocks", 300, 704)
    (exact,) = cpu.OPS.linear(x, cpu.OPS.pack(packed))
    for rows in (64, 32, 16, 1):
        fewer = packed.in_blocks_of(rows)
        assert fewer.block_rows == rows
        assert torch.equal(cpu.OPS.linear(x, cpu.OPS.pack(fewer))[0], exact)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_what_is_no_number_stays_none(way: str, code: int) -> None:
    """A float code, an e4m3 scale, an exponent of two: only their outputs are touched, as the reference has it."""
    x = random(3, 128)
    for name, part in (("fp8", "data"), ("mxfp8", "data"), ("nvfp4", "scale"), ("mxfp8", "scale")):
        packed = packed_as(name, 40, 128)
        tensor = getattr(packed, part).view(torch.uint8).clone()
        tensor[7, 3] = 0xFF if tensor.dtype == getattr(packed, part).dtype else code
        packed = replace(packed, **{part: tensor.view(getattr(packed, part).dtype)})
        (result,) = cpu.linear(x, cpu.pack(packed))
        assert torch.equal(result.isnan(), reference.linear(x, packed)[0].isnan())
        assert result[:, 7].isnan().all() and result.isnan().sum() == 3


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 33])
@pytest.mark.parametrize("name", ["iq4 by 32", "nvfp4", "fp8 by blocks", "mxfp8"])
def test_a_row_is_the_same_alone(way: str, name: str, rows: int) -> None:
    x, packed = random(40, 256), cpu.pack(packed_as(name, 70, 256))
    assert torch.equal(cpu.linear(x[:rows], packed)[0], cpu.linear(x, packed)[0][:rows])


@pytest.mark.parametrize("group", [48, 96, 192, 704])
@pytest.mark.parametrize("bias", ["", ", bias"])
def test_longer_groups_are_taken_in_parts(group: int, bias: str) -> None:
    """One scale for all inputs, as GPTQ has it, is the scale of each part of them."""
    inputs, x = (704, random(9, 704)) if group == 704 else (192, random(9, 192))
    packed = packed_as(f"int4 by 16{bias}", 40, inputs)
    every = slice(0, None, group // 16)
    whole = replace(
        packed, group=group, scale=packed.scale[:, every], bias=None if packed.bias is None else packed.bias[:, every]
    )
    own = cpu.pack(whole)
    assert isinstance(own, Packed) and own.group in GROUPS and torch.equal(own.dense(), whole.dense())
    (result,) = cpu.linear(x, own)
    exact = reference.linear(x.bfloat16().float(), whole)[0]
    assert (result - exact).norm() <= 3e-3 * exact.norm()
    with pytest.raises(InputError, match=r"groups of .* call Model.pack_ first"):
        cpu.linear(x, whole)


def test_every_format_of_ours_is_taken() -> None:
    for name in formats.FORMATS:
        for shape in ((64, 256), (3, 64, 256)):
            packed = formats.pack(random(*shape), name)
            assert cpu.obstacle(torch.float32, [packed]) is None or cpu._way() == cpu.PLAIN
            assert tuple(cpu.pack(packed).shape) == shape


# ---- two forms beside each other -------------------------------------------------------------------------------------

MIXED = ("plain", "int8", "int4 by 32", "int4 by 32, bias", "int4 by 64, bias", "iq4 by 32, float16", "nvfp4", "fp8",
         "fp8 by blocks", "int8 by 16", "int8 by 32, bias")  # fmt: skip


def weight_of(name: str, *shape: int) -> Tensor | Packed:
    if name == "plain":
        return random(*shape, seed=9, scale=0.1)
    return formats.pack(random(*shape, seed=9, scale=0.1), "int8") if name == "int8" else packed_as(name, *shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", MIXED)
@pytest.mark.parametrize("up", MIXED)
def test_gate_and_up_in_two_forms(gate: str, up: str, dtype: torch.dtype) -> None:
    """As the same weights one by one, each product rounded to x's dtype as the reference rounds it."""
    x, down = random(19, 128).to(dtype), cpu.pack(random(128, 64, seed=5, scale=0.1))
    one, two = cpu.pack(weight_of(gate, 64, 128)), cpu.pack(weight_of(up, 64, 128))
    hidden = reference.gated(*(cpu.linear(x, weight)[0] for weight in (one, two)))
    result, exact = cpu.feed_forward(x, one, two, down), cpu.linear(hidden, down)[0]
    assert (result - exact).float().norm() <= 2e-3 * exact.float().norm()
    for first, second in ((one, two), (two, one)):
        for got, want in zip(cpu.linear(x, first, second, first), (first, second, first), strict=True):
            assert torch.equal(got, cpu.linear(x, want)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate_up, down", [*zip(MIXED, reversed(MIXED), strict=True), ("mxfp8", "mxfp4")])
def test_experts_in_any_form(way: str, gate_up: str, down: str, dtype: torch.dtype) -> None:
    inner = 64
    x, index = random(50, 128).to(dtype), torch.arange(100).reshape(50, 2) % 4
    share = torch.full((50, 2), 0.5)
    one, two = (cpu.pack(weight_of(gate_up, 4, 2 * inner, 128)), cpu.pack(weight_of(down, 4, 128, inner)))
    exact = torch.zeros(50, 128)
    for expert in range(4):
        gate, up = cpu.linear(x, one[expert])[0].chunk(2, -1)
        part = cpu.linear(reference.gated(gate, up), two[expert])[0].float()
        exact += part * ((index == expert) * share).sum(-1, keepdim=True)
    result = cpu.experts(x, index, share, one, two)
    assert (result.float() - exact).norm() <= (2e-3 if dtype == torch.float32 else 2e-2) * exact.norm()


@pytest.mark.parametrize("name", ["reference", "fused"])
def test_the_others_take_two_forms_too(name: str) -> None:
    x, gate, up, down = random(3, 128), packed_as("nvfp4", 64, 128), packed_as("iq4 by 32", 64, 128), random(128, 64)
    plain = reference.feed_forward(x, gate.dense(), up.dense(), down)
    torch.testing.assert_close(ops.load(name).feed_forward(x, gate, up, down), plain)


def test_a_model_whose_layers_mix_forms_runs_as_its_unpacked_twin() -> None:
    """`block` too: every product of a layer in another form, gate and up among them."""
    from sfumato.model.cache import KVCache
    from sfumato.model.network import products, replace_

    def run(is_packed: bool) -> Tensor:
        model = tiny.tiny_model(seed=3, name="cpu" if is_packed else "reference")
        names = iter(["fp8 by blocks", "fp8", "int8 by 16", "nvfp4", "int4 by 16, bias", "iq2 by 16"] * 20)
        for owner, leaf in list(products(model)):
            form, shape = next(names), getattr(owner, leaf).shape
            if shape[-1] % 16 == 0:
                weight = packed_as(form, *shape)
                replace_(owner, leaf, cpu.pack(weight) if is_packed else weight)
        cache = KVCache.allocate(model.config, 1, 64)
        tokens, canvas = torch.arange(12)[None] % 7, torch.arange(model.config.canvas_length)[None] % 5
        with torch.inference_mode():
            return torch.cat([model.encode(tokens, cache), model.denoise(canvas, cache)], 1)

    result, exact = run(True), run(False)
    assert (result - exact).norm() <= 0.05 * exact.norm()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, change, match",
    [
        ("iq4 by 32", {"group": 24}, "iq4 weights in groups of 24 along 192 inputs"),
        ("iq4 by 32", {"group": 128}, "iq4 weights in groups of 128 along 192 inputs"),
        ("iq4 by 32", {"scale": torch.ones(40, 6, dtype=torch.float64)}, "scales and biases of torch.float64"),
        ("iq4 by 32", {"scale": torch.ones(40, 5)}, r"codes \[40, 96\] with scales \[40, 5\] of iq4 weights"),
        ("iq4 by 32", {"data": torch.zeros(40, 95, dtype=torch.uint8)}, r"codes \[40, 95\]"),
        ("iq4 by 32", {"data": torch.zeros(40, 96, dtype=torch.int8)}, "codes in torch.int8 of iq4 weights"),
        ("int4 by 32, bias", {"bias": torch.ones(40, 5)}, r"a bias \[40, 5\] of int4 weights"),
        ("iq4 by 32", {"bias": torch.ones(40, 6)}, r"a bias \[40, 6\] of iq4 weights"),
        ("nvfp4", {"factor": torch.ones(1)}, r"a factor \[1\] in torch.float32"),
        ("fp8", {"scale": torch.ones(40, dtype=torch.bfloat16)}, "scales and biases of torch.bfloat16"),
        ("fp8 by blocks", {"scale": torch.ones(41, 2)}, r"scales \[41, 2\] of fp8 weights"),
    ],
)
def test_a_weight_that_is_not_what_it_says_is_refused(name: str, change: dict[str, Any], match: str) -> None:
    packed = replace(packed_as(name, 40, 192), **change)
    with pytest.raises(InputError, match=f"the cpu operations cannot take .*{match}"):
        cpu.pack(packed)
    with pytest.raises(InputError, match=match):
        cpu.linear(random(3, 192), packed)
