"""ops/triton/linear.py, product.py and forms.py: under the interpreter, against the reference; and compiled."""

from __future__ import annotations

import math
from dataclasses import replace

import ptx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")
import triton_fp8
import triton_interpreter

from sfumato.errors import InputError
from sfumato.ops import reference
from sfumato.ops.packed import Packed
from sfumato.ops.triton import ahead, forms, linear, product, tuning
from sfumato.quant import formats

if triton_interpreter.IS_ON:
    triton_fp8.put_right()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["", "int8", "fp8", "int4", "int4-asym", "nvfp4"]
# float16 takes no way of its own through the last two.
PAIRS = [(kind, dtype) for kind in KINDS for dtype in DTYPES[: 3 if kind in KINDS[:4] else 2]]
SMALL = {"BLOCK_N": 32, "BLOCK_M": 16, "BLOCK_K": 32}


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def packed(weight: Tensor, kind: str) -> Tensor | Packed:
    return forms.pack(formats.pack(weight, kind) if kind else weight)


def fitted(size: int, kind: str) -> int:
    """So many inputs, or a few more where the kind packs some together."""
    least = {"int4": 4, "int4-asym": 4, "nvfp4": 16, "mxfp4": 32}.get(kind, 1)
    return -(-size // least) * least


def whole(weight: Tensor | Packed) -> Tensor:
    return weight.dense() if isinstance(weight, Packed) else weight.float()


def met(x: Tensor, kind: str) -> Tensor:
    """x in float32 as weights of this kind meet it."""
    return triton_fp8.rows(x) if kind.startswith("fp8") else x.float()


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.float() - exact).norm() / exact.norm())


def bound(plain: Tensor, exact: Tensor) -> float:
    """Twice the error of plain PyTorch at the same precision; float32 sums in another order may differ a little."""
    return max(2 * relative(plain, exact), 1e-6)


@pytest.mark.parametrize(("kind", "dtype"), PAIRS, ids=str)
@pytest.mark.parametrize(("rows", "width"), [((3, 6), 96), ((1,), 64), ((2, 1, 5), 136)])
def test_linear(kind: str, dtype: torch.dtype, rows: tuple[int, ...], width: int) -> None:
    width = fitted(width, kind)
    x = normal(*rows, width).to(dtype)
    weights = [packed(normal(n, width, seed=n, scale=0.1).to(dtype), kind) for n in (40, 17, 32, 5)]
    with tuning.using("linear", **SMALL):
        outs = linear.linear(x, *weights)
    for weight, out in zip(weights, outs, strict=True):
        exact = F.linear(met(x, kind), whole(weight))
        assert out.dtype == dtype and out.shape == exact.shape
        (plain,) = reference.linear(met(x, kind).to(dtype), whole(weight).to(dtype))
        if kind == "fp8":
            plain = exact.to(dtype)  # FP8 sums are float32 in both; only the result is rounded
        assert relative(out, exact) <= bound(plain, exact)


@pytest.mark.parametrize(
    ("kind", "count"), [(kind, n) for kind in KINDS for n in (1, 2, 3) if n > 2 or kind in KINDS[:4]]
)
def test_weights_of_one_launch_do_not_mix(kind: str, count: int) -> None:
    x = normal(18, 64)
    weights = [packed(normal(n, 64, seed=n), kind) for n in (33, 64, 31)[:count]]
    with tuning.using("linear", **SMALL):
        together = linear.linear(x, *weights)
        for weight, out in zip(weights, together, strict=True):
            (alone,) = linear.linear(x, weight)
            assert torch.equal(alone, out)


def test_kinds_may_be_mixed() -> None:
    x = normal(4, 64)
    weights = [packed(normal(32, 64, seed=i), kind) for i, kind in enumerate(KINDS)]
    with tuning.using("linear", **SMALL):
        outs = linear.linear(x, *weights)
    for kind, weight, out in zip(KINDS, weights, outs, strict=True):
        assert relative(out, F.linear(met(x, kind), whole(weight))) < 1e-6


@pytest.mark.parametrize(("kind", "dtype"), PAIRS, ids=str)
def test_a_row_does_not_depend_on_its_batch(kind: str, dtype: torch.dtype) -> None:
    x, hidden = normal(19, 96).to(dtype), fitted(40, kind)
    gate, up = (packed(normal(hidden, 96, seed=i, scale=0.1).to(dtype), kind) for i in (1, 2))
    down = packed(normal(24, hidden, seed=3, scale=0.1).to(dtype), kind)
    with tuning.using("linear", **SMALL), tuning.using("gate_up", **SMALL):
        (many,), wide = linear.linear(x, gate), linear.feed_forward(x, gate, up, down)
        for n in (0, 18):
            assert torch.equal(linear.linear(x[n : n + 1], gate)[0], many[n : n + 1])
            assert torch.equal(linear.feed_forward(x[n : n + 1], gate, up, down), wide[n : n + 1])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, for the same numbers
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_says_so(kind: str, value: float) -> None:
    x = normal(3, 64)
    x[1, 5] = value
    with tuning.using("linear", **SMALL):
        (out,) = linear.linear(x, packed(normal(32, 64, seed=1), kind))
    assert torch.isfinite(out).all(-1).tolist() == [True, False, True]


@pytest.mark.parametrize(("kind", "dtype"), PAIRS, ids=str)
@pytest.mark.parametrize(("width", "hidden"), [(96, 72), (64, 22)])
def test_feed_forward(kind: str, dtype: torch.dtype, width: int, hidden: int) -> None:
    x, hidden = normal(2, 9, width).to(dtype), fitted(hidden, kind)
    gate, up = (packed(normal(hidden, width, seed=i, scale=0.2).to(dtype), kind) for i in (1, 2))
    down = packed(normal(width, hidden, seed=3, scale=0.2).to(dtype), kind)
    with tuning.using("linear", **SMALL), tuning.using("gate_up", **SMALL):
        out = linear.feed_forward(x, gate, up, down)
    exact = reference.feed_forward(met(x, kind), whole(gate), whole(up), whole(down))
    if kind == "fp8":  # what lies between the products is rounded to FP8 too
        middle = reference.gated(F.linear(met(x, kind), whole(gate)), F.linear(met(x, kind), whole(up)))
        plain = F.linear(met(middle.to(dtype), kind), whole(down)).to(dtype)
    else:
        plain = reference.feed_forward(x, *(whole(weight).to(dtype) for weight in (gate, up, down)))
    assert out.dtype == dtype and out.shape == exact.shape
    assert relative(out, exact) <= bound(plain, exact)


def test_feed_forward_takes_kinds_that_differ() -> None:
    x = normal(5, 64)
    gate, up = (packed(normal(48, 64, seed=i, scale=0.2), "int4") for i in (1, 2))
    down = packed(normal(64, 48, seed=3), "int8")
    exact = reference.feed_forward(x, whole(gate), whole(up), whole(down))
    assert relative(linear.feed_forward(x, gate, up, down), exact) < 1e-6
    for kind in ("int8", "nvfp4", "int4-g32-asym"):
        other = packed(whole(up), kind)
        for down_DF in (down, packed(normal(64, 64, seed=3)[:, :48], "int4-g32")):
            exact = reference.feed_forward(x, whole(gate), whole(other), whole(down_DF))
            assert relative(linear.feed_forward(x, gate, other, down_DF), exact) < 1e-6
    with pytest.raises(ValueError, match="gate has 48 outputs and up 64"):
        linear.feed_forward(x, gate, packed(normal(64, 64), "int8"), down)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("width", [256, 96])
@pytest.mark.parametrize(("block", "bias"), [(32, ""), (64, ""), (128, ""), (32, "-asym"), (128, "-asym")])
def test_int4_groups_and_steps(group: int, width: int, block: int, bias: str) -> None:
    x, weight = normal(3, width), packed(normal(20, width, seed=1) + 0.5, f"int4-g{group}{bias}".replace("-g64", ""))
    with tuning.using("linear", **{**SMALL, "BLOCK_K": block}):
        (out,) = linear.linear(x, weight)
    assert relative(out, F.linear(x, whole(weight))) < 1e-6


def test_one_group_for_all_inputs() -> None:
    """As GPTQ has it; 96 is no power of two."""
    code, scale = formats.pack(normal(20, 96, seed=1), "int4").data, normal(20, 1, seed=2).abs()
    x, weight = normal(3, 96), Packed("int4", (20, 96), code, scale, 96, bias=normal(20, 1, seed=3))
    with tuning.using("linear", **{**SMALL, "BLOCK_K": 128}):
        (out,) = linear.linear(x, forms.pack(weight))
    assert relative(out, F.linear(x, weight.dense())) < 1e-6


@pytest.mark.parametrize("stores", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("kind", ["int4", "int4-asym"])
def test_scales_of_different_dtypes(kind: str, stores: tuple[torch.dtype, torch.dtype]) -> None:
    def stored(seed: int, store: torch.dtype) -> Packed:
        weight = formats.pack(normal(32, 64, seed=seed, scale=0.2), kind)
        bias = None if weight.bias is None else weight.bias.to(store)
        return replace(weight, scale=weight.scale.to(store), bias=bias)

    x, gate, up = normal(5, 64), stored(1, stores[0]), stored(2, stores[1])
    down = packed(normal(64, 32, seed=3), kind)
    with tuning.using("linear", **SMALL), tuning.using("gate_up", **SMALL):
        outs, wide = linear.linear(x, gate, up), linear.feed_forward(x, gate, up, down)
    for weight, out in zip((gate, up), outs, strict=True):
        assert relative(out, F.linear(x, whole(weight))) < 1e-6
    assert relative(wide, reference.feed_forward(x, whole(gate), whole(up), whole(down))) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["fp8-block", "fp8-tensor", "mxfp4"])
@pytest.mark.parametrize("width", [160, 256])
def test_further_formats(kind: str, dtype: torch.dtype, width: int) -> None:
    x, weights = normal(3, width).to(dtype), [packed(normal(n, width, seed=n), kind) for n in (150, 20)]
    with tuning.using("linear", **{**SMALL, "BLOCK_K": 64}):
        outs = linear.linear(x, *weights)
    for weight, out in zip(weights, outs, strict=True):
        exact = F.linear(met(x, kind), whole(weight))
        plain = exact.to(dtype) if kind.startswith("fp8") else F.linear(x, whole(weight).to(dtype))
        assert relative(out, exact) <= bound(plain, exact)


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (64, 32), (64, 96), (128, 256)])
def test_fp8_in_blocks_of_other_sizes(rows: int, columns: int) -> None:
    outputs, width = 192, 224  # neither is a whole number of blocks
    scale = normal(-(-outputs // rows), -(-width // columns), seed=2).exp()
    codes = normal(outputs, width, seed=1).to(torch.float8_e4m3fn)
    weight = Packed("fp8", (outputs, width), codes, scale, columns)
    assert weight.block_rows == rows
    exact = codes.float() * scale.repeat_interleave(rows, 0)[:outputs].repeat_interleave(columns, 1)[:, :width]
    assert torch.equal(weight.dense(), exact) and torch.equal(weight.in_blocks_of(32).dense(), exact)
    x = normal(3, width)
    for form in (forms.pack(weight), weight):
        with tuning.using("linear", **SMALL):
            (out,) = linear.linear(x, form)
        assert relative(out, F.linear(met(x, "fp8"), exact)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_every_code_of_four_bits_with_every_scale_is_exact(kind: str, dtype: torch.dtype) -> None:
    group = 16 if kind == "nvfp4" else 32
    code, scale = torch.arange(0, 256, dtype=torch.uint8), torch.arange(256, dtype=torch.uint8)
    scale = scale[(scale & 0x7F) != 0x7F] if kind == "nvfp4" else scale[:253]  # the rest are no numbers, or infinite
    data = torch.stack([code[17 * i : 17 * i + group // 2] for i in range(8)]).repeat_interleave(len(scale), 0)
    scale = scale.repeat(8)[:, None]
    scale = scale.view(torch.float8_e4m3fn) if kind == "nvfp4" else scale
    weight = forms.pack(Packed(kind, (len(data), group), data, scale, group))
    (out,) = linear.linear(torch.eye(group, dtype=dtype), weight)
    assert torch.equal(out, whole(weight).T.to(dtype)) and torch.unique(whole(weight)).numel() > 300


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["fp8", "fp8-block"])
def test_fp8_without_fp8_hardware(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "has_fp8", lambda device: False)
    x, weight = normal(5, 160).to(dtype), packed(normal(20, 160, seed=1), kind)
    with tuning.using("linear", **SMALL):
        (out,) = linear.linear(x, weight)
    exact = F.linear(x.float(), whole(weight))
    assert relative(out, exact) <= bound(F.linear(x, whole(weight).to(dtype)), exact)


def test_every_fp8_code_is_widened_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "has_fp8", lambda device: False)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = torch.where(codes.float().isnan(), torch.zeros(256), codes.float()).to(torch.float8_e4m3fn)
    weight = Packed("fp8", (256, 32), codes[:, None].expand(256, 32).contiguous(), torch.ones(256), 32)
    (out,) = linear.linear(torch.eye(32)[:1], weight)
    assert torch.equal(out[0], codes.float())


def test_rows_of_zeros_and_outliers_in_fp8() -> None:
    x = normal(4, 64)
    x[1], x[2, 5] = 0, 1e4
    weight = packed(normal(20, 64, seed=1), "fp8")
    (out,) = linear.linear(x, weight)
    assert (out[1] == 0).all()
    assert relative(out, F.linear(met(x, "fp8"), whole(weight))) < 1e-6


def test_nothing_in_nothing_out() -> None:
    weight = normal(8, 64)
    assert linear.linear(torch.empty(0, 64), weight)[0].shape == (0, 8)
    assert linear.feed_forward(torch.empty(2, 0, 64), weight, weight, normal(64, 8)).shape == (2, 0, 64)


def test_slices_are_taken() -> None:
    x = normal(4, 6, 128)[:, 1::2, 64:]
    weight = normal(8, 128)[:, :64]
    (out,) = linear.linear(x, weight)
    assert relative(out, F.linear(x, weight)) < 1e-6


def test_refusals() -> None:
    with pytest.raises(ValueError, match="width 32"):
        linear.linear(normal(2, 32), normal(8, 64))
    with pytest.raises(ValueError, match="one dtype"):
        linear.linear(normal(2, 64).bfloat16(), normal(8, 64))


def test_pack() -> None:
    weight = normal(3, 8, 64)
    assert forms.pack(weight) is weight
    for kind in KINDS[1:]:
        codes = formats.pack(weight, kind)
        laid = forms.pack(codes.each(lambda part: part.repeat_interleave(2, 1)[:, ::2]))
        assert isinstance(laid, Packed) and laid.kind == codes.kind and laid.shape == (3, 8, 64)
        assert all(part.is_contiguous() for part in laid.parts.values()) and torch.equal(whole(laid), codes.dense())


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (Packed("int8", (8, 64), torch.zeros(8, 64, dtype=torch.int8), torch.ones(8, 2), 32), "not one every 32"),
        (Packed("int3", (8, 64), torch.zeros(8, 24, dtype=torch.uint8), torch.ones(8, 2), 32), "int3.*only int8"),
        (Packed("int4", (8, 66), torch.zeros(8, 33, dtype=torch.uint8), torch.ones(8, 2), 33), "groups .* of 4 .* 33"),
        (Packed("int4", (8, 22), torch.zeros(8, 11, dtype=torch.uint8), torch.ones(8, 1), 22), "groups .* of 4 .* 22"),
        (Packed("int4", (8, 64), torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 2), 48), "divide the 64 inputs"),
        (
            Packed("fp8", (2, 8, 64), torch.zeros(2, 8, 64).to(torch.float8_e4m3fn), torch.ones(2, 1, 1), 128),
            "blocks of 64, not 8",
        ),
        (
            Packed("fp8", (64, 64), torch.zeros(64, 64).to(torch.float8_e4m3fn), torch.ones(2, 2), 32),
            "blocks of 64 outputs or more, not of 32",
        ),
        (
            Packed("fp8", (64, 64), torch.zeros(64, 64).to(torch.float8_e4m3fn), torch.ones(1, 4), 16),
            "a multiple of 32 inputs, not of 16",
        ),
    ],
    ids=[
        "int8 by groups",
        "unknown",
        "odd group",
        "words cut in two",
        "group does not divide",
        "blocks across experts",
        "blocks of few outputs",
        "blocks of few inputs",
    ],
)
def test_what_no_kernel_unpacks_is_refused(weight: Packed, why: str) -> None:
    with pytest.raises(InputError, match=f'{why}.*choose ops="fused" or quantize="int4"'):
        forms.pack(weight)


def test_the_assembly_says_what_the_plain_way_says() -> None:
    """All words, in both halves of a register; every scale that e2m1 may have."""
    word = torch.arange(65536)
    register = ptx.pair(word, word.flip(0))
    codes = torch.stack([word >> 4 * place & 15 for place in range(4)])
    for text, dtype in zip(ptx.assemblies(product, "_quarters"), DTYPES[1:], strict=True):
        for quarter, code in zip(ptx.run(text, {"$4": register}, 4), codes, strict=True):
            numbers = ptx.halves(quarter, dtype).float()
            assert torch.equal(numbers[:, 0], code - 8.0) and torch.equal(numbers[:, 1], code.flip(0) - 8.0)

    e2m1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    e2m1 = torch.cat([e2m1, -e2m1])
    (text,) = ptx.assemblies(product, "_e2m1_quarters")
    for scale in (2.0**-127, 2.0**-9, 1.0, 1.125, 448.0, 2.0**120):
        bits = torch.tensor(scale, dtype=torch.bfloat16).view(torch.int16).expand(65536)
        for quarter, code in zip(ptx.run(text, {"$4": register, "$5": ptx.pair(bits, bits)}, 4), codes, strict=True):
            numbers = ptx.halves(quarter, torch.bfloat16)
            exact = (e2m1.double() * scale).to(torch.bfloat16)
            assert torch.equal(numbers[:, 0], exact[code]) and torch.equal(numbers[:, 1], exact[code.flip(0)])


@pytest.mark.skipif(triton_interpreter.IS_ON, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", [89])  # with the least memory; all of them are `test_triton_ahead`'s
def test_ahead(arch: int) -> None:
    for special in linear.ahead(arch) + product.ahead(arch):
        if any(text in special.name for text in ("qkv", "gate_up", "classes", "rows", "groups")):
            row = ahead.compile_one(special, arch)
            assert row["spills"] <= 32, special.name
            assert row["shared"] <= tuning.SHARED_KIB[arch] * 1024, special.name


_compiled = test_ahead  # here, not in the child: the interpreter replaces what would be compiled
triton_interpreter.in_a_child(globals())
test_ahead = _compiled
