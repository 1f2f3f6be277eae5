"""ops/cpu: the library against the specification: every operation, odd shapes, three precisions, and every way of
multiplying tiles that this processor has; AMX on every processor, if need be in plain code (`amx.h`).

Errors are measured against the reference in float64 on the same (rounded) weights, and held against what plain PyTorch
makes of it in the same dtype: an operation may not be less exact than that, beyond what one rounding more costs.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import endings
import pytest
import tiny
import torch
from torch import Tensor

from sfumato import ops
from sfumato.errors import InputError
from sfumato.model.cache import KVCache
from sfumato.model.network import replace_
from sfumato.ops import contract, cpu, reference
from sfumato.ops.contract import BlockPass, JoinNorms, Layer, dense
from sfumato.ops.cpu import build, memory
from sfumato.ops.masks import Mask
from sfumato.ops.packed import Packed
from sfumato.quant import formats

pytestmark = pytest.mark.skipif(build.obstacle() is not None, reason=f"the library cannot be built: {build.obstacle()}")

DTYPES = (torch.float32, torch.bfloat16)
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def check_close(result: Tensor, exact: Tensor, plain: Tensor | None, dtype: torch.dtype, slack: float = 4.0) -> None:
    """The largest error is at most twice plain PyTorch's in this dtype and `slack` last places of the largest value."""
    assert result.shape == exact.shape and result.isfinite().all()
    error = (result.double() - exact.double()).abs().max()
    allowed = slack * EPS[dtype] * exact.double().abs().max()
    if plain is not None:
        allowed = allowed + 2 * (plain.double() - exact.double()).abs().max()
    assert error <= allowed, f"error {error:.3g} above {allowed:.3g}"


# ---- packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (32, 64), (33, 65), (5, 48, 24), (3, 70, 130)])
def test_packing_keeps_every_number(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = random(*shape, dtype=dtype)
    assert torch.equal(dense(cpu.pack(weight), torch.float32), weight.float())


@pytest.mark.parametrize("shape", [(1, 1), (33, 65), (3, 70, 130)])
def test_int8_is_within_half_a_step(shape: tuple[int, ...]) -> None:
    weight = random(*shape)
    packed = cpu.pack(formats.pack(weight, "int8"))
    step = weight.abs().amax(-1, keepdim=True) / 127
    assert ((dense(packed, torch.float32) - weight).abs() <= step * 0.5001).all()
    assert packed.nbytes == packed.data.nbytes + 4 * weight[..., 0].numel()


def test_a_row_of_zeros_stays_zero_in_int8() -> None:
    weight = random(4, 20)
    weight[2] = 0
    packed = cpu.pack(formats.pack(weight, "int8"))
    assert not dense(packed, torch.float32)[2].any()
    assert not cpu.linear(torch.zeros(3, 20), packed)[0].any()


def test_large_weights_lie_in_memory_of_their_own() -> None:
    data = memory.empty_huge(cpu.HUGE + 5)
    data.fill_(7)
    assert data.numel() == cpu.HUGE + 5 and (data == 7).all()


@pytest.mark.parametrize("kind", ["", "int8"])
def test_a_copy_of_a_packed_weight_is_read_where_it_lies(kind: str) -> None:
    """Pointers are kept with a weight once it is used, and do not go along."""
    weight, x = random(40, 33), random(5, 33)
    packed = cpu.pack(formats.pack(weight, kind) if kind else weight)
    y = cpu.linear(x, packed)[0]
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), replace(packed, data=packed.data.clone())):
        assert torch.equal(cpu.linear(x, again)[0], y)
        again.data.zero_()
        assert not cpu.linear(x, again)[0].any() and torch.equal(cpu.linear(x, packed)[0], y)


def test_what_it_cannot_pack_is_said() -> None:
    odd = replace(formats.pack(random(4, 32), "int8"), kind="int9")
    with pytest.raises(InputError, match="cannot take int9 weights; choose ops='fused', or quantize='int8' or 'int4'"):
        cpu.pack(odd)
    with pytest.raises(InputError, match="int4 weights in groups of 8 along 24 inputs"):
        cpu.pack(formats.pack(random(4, 24), "int4"))
    with pytest.raises(InputError, match="float32 and bfloat16"):
        cpu.pack(random(4, 4).half())
    with pytest.raises(InputError, match="choose fused"):
        ops.load("cpu", "cpu", torch.float16)
    assert "float16" in str(cpu.obstacle(torch.float16))


GROUPED = ("8 bits", "8 bits with a bias", "8 bits by 16")
"""What other people's files have beside our own formats."""


def grouped(weight: Tensor, name: str) -> Packed:
    """A format of ours by its name, or 8 bits in groups of 32."""
    if name not in GROUPED:
        return formats.pack(weight, name)
    group = 16 if name == "8 bits by 16" else 32
    groups = weight.float().reshape(*weight.shape[:-1], -1, group)
    if name != "8 bits with a bias":
        scale = groups.abs().amax(-1) / 127
        codes = (groups / scale[..., None]).round().to(torch.int8)
        return Packed("int8", tuple(weight.shape), codes.reshape(weight.shape), scale, group)
    bias = groups.amin(-1)
    scale = (groups.amax(-1) - bias) / 255
    codes = ((groups - bias[..., None]) / scale[..., None]).round().to(torch.uint8)
    return Packed("int8", tuple(weight.shape), codes.reshape(weight.shape), scale, 32, bias)


def rows_of(weight: Tensor | Packed, first: int, last: int) -> Tensor | Packed:
    if isinstance(weight, Tensor):
        return weight[first:last].contiguous()
    return weight.each(lambda part: part[first:last].contiguous(), (last - first, *weight.shape[1:]))


# ---- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, inputs", [(1, 1), (5, 24), (33, 97), (600, 70)])
def test_linear(way: str, dtype: torch.dtype, rows: int, inputs: int) -> None:
    x, weights = random(rows, inputs, dtype=dtype), [random(n, inputs, seed=n, dtype=dtype) for n in (1, 33, 64)]
    result = cpu.linear(x, *map(cpu.pack, weights))
    exact = reference.linear(x.double(), *(w.double() for w in weights))
    plain = reference.linear(x, *weights)
    for one, two, three in zip(result, exact, plain, strict=True):
        check_close(one, two, three, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_in_int8(way: str, dtype: torch.dtype) -> None:
    """Exact on what was rounded: x to a scale a row, weights to a scale an output."""
    x, weight = random(37, 150, dtype=dtype), random(45, 150, seed=1, dtype=dtype)
    packed = cpu.pack(formats.pack(weight, "int8"))
    steps = x.float().abs().amax(-1, keepdim=True) / 127
    exact = (x.double() / steps).round() * steps @ dense(packed, torch.float32).double().T
    check_close(cpu.linear(x, packed)[0], exact, None, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width, inner", [(1, 24, 20), (40, 64, 96), (530, 33, 70)])
def test_feed_forward(way: str, dtype: torch.dtype, rows: int, width: int, inner: int) -> None:
    x = random(rows, width, dtype=dtype)
    gate, up, down = (
        random(*s, seed=s[0], dtype=dtype, scale=0.3) for s in ((inner, width), (inner, width), (width, inner))
    )
    result = cpu.feed_forward(x, cpu.pack(gate), cpu.pack(up), cpu.pack(down))
    exact = reference.feed_forward(x.double(), gate.double(), up.double(), down.double())
    check_close(result, exact, reference.feed_forward(x, gate, up, down), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "count, tokens, width, inner, chosen", [(1, 1, 24, 8, 1), (5, 40, 64, 32, 2), (8, 130, 72, 36, 4)]
)
def test_experts(way: str, dtype: torch.dtype, count: int, tokens: int, width: int, inner: int, chosen: int) -> None:
    x = random(tokens, width, dtype=dtype)
    gate_up = random(count, 2 * inner, width, seed=1, dtype=dtype, scale=0.3)
    down = random(count, width, inner, seed=2, dtype=dtype, scale=0.3)
    # The last expert is chosen by nobody where there is a choice; the first by all.
    index = torch.stack([torch.arange(chosen) + (n % max(1, count - chosen)) * (chosen < count) for n in range(tokens)])
    index[:, 0] = 0
    weight = random(tokens, chosen, seed=3).abs()
    result = cpu.experts(x, index, weight, cpu.pack(gate_up), cpu.pack(down))
    exact = reference.experts(x.double(), index, weight.double(), gate_up.double(), down.double())
    check_close(result, exact, reference.experts(x, index, weight, gate_up, down), dtype)


def test_experts_and_feed_forward_in_int8_are_near(way: str) -> None:
    """Within the noise of 8 bits: relative rms error below 2 %."""
    x, gate_up, down = random(60, 128), random(4, 192, 128, scale=0.1), random(4, 128, 96, scale=0.1)
    index, weight = torch.arange(120).reshape(60, 2) % 4, torch.full((60, 2), 0.5)
    packed = cpu.pack(formats.pack(gate_up, "int8")), cpu.pack(formats.pack(down, "int8"))
    pairs = [(cpu.experts(x, index, weight, *packed), reference.experts(x, index, weight, gate_up, down))]
    three = gate_up[0, :96], gate_up[0, 96:], down[0]
    pairs.append(
        (cpu.feed_forward(x, *(cpu.pack(formats.pack(w, "int8")) for w in three)), reference.feed_forward(x, *three))
    )
    for result, exact in pairs:
        assert (result - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int4", "int4-g32", "int4-g128", "int4-asym", "int4-g32-asym", *GROUPED])
@pytest.mark.parametrize("rows, outputs, inputs", [(1, 7, 128), (37, 45, 384), (600, 33, 256)])
def test_linear_in_groups(way: str, dtype: torch.dtype, name: str, rows: int, outputs: int, inputs: int) -> None:
    """Codes meet x in bfloat16 and are exact; scales multiply in float32: nearer than unpacked bfloat16 weights."""
    x, packed = random(rows, inputs, dtype=dtype), grouped(random(outputs, inputs, seed=1), name)
    kept = torch.bfloat16 if packed.group < 32 else torch.float32  # narrower than a tile: rounded before the product
    exact = x.bfloat16().double() @ packed.dense(kept).double().T
    check_close(cpu.linear(x, cpu.pack(packed))[0], exact, None, dtype, slack=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_of_groups_in_any_dtype(way: str, dtype: torch.dtype) -> None:
    packed = formats.pack(random(40, 256, scale=0.02), "int4-asym")
    assert packed.bias is not None
    packed = replace(packed, scale=packed.scale.to(dtype), bias=packed.bias.to(dtype))
    packed.scale[0, 0] = torch.finfo(torch.float16).smallest_normal / 4  # subnormal in float16
    x = random(9, 256)
    exact = x.bfloat16().double() @ packed.dense().double().T
    check_close(cpu.linear(x, cpu.pack(packed))[0], exact, None, torch.float32, slack=64)


@pytest.mark.parametrize("down", ["", "int8", "int4", "int4-g32-asym", *GROUPED])
@pytest.mark.parametrize("gate_up", ["", "int8", "int4", "int4-g32-asym", *GROUPED])
def test_kinds_may_be_mixed(way: str, gate_up: str, down: str) -> None:
    """Experts, dense layers and queries, keys, values: each weight as it comes."""
    x, weights = random(50, 128), (random(4, 192, 128, scale=0.1), random(4, 128, 96, seed=1, scale=0.1))
    index, share = torch.arange(100).reshape(50, 2) % 4, torch.full((50, 2), 0.5)
    plain = [grouped(w, name) if name else w for w, name in zip(weights, (gate_up, down), strict=True)]
    first, second = map(cpu.pack, plain)
    exact = reference.experts(x, index, share, *plain)
    result = cpu.experts(x, index, share, first, second)
    assert (result - exact).norm() / exact.norm() < 0.03
    one = [part[0] for part in plain]
    both = [rows_of(one[0], 0, 96), rows_of(one[0], 96, 192), one[1]]
    exact = reference.feed_forward(x, *both)
    assert (cpu.feed_forward(x, *map(cpu.pack, both)) - exact).norm() / exact.norm() < 0.03
    several = cpu.linear(x, *(cpu.pack(w) for w in (both[0], both[0], random(70, 128), both[1])))
    for got, want in zip(several, reference.linear(x, both[0], both[0], random(70, 128), both[1]), strict=True):
        assert (got - want).norm() / want.norm() < 0.03


def test_parts_that_lie_with_gaps_are_moved_together() -> None:
    packed = grouped(random(40, 128), "8 bits")
    gaps = packed.each(lambda part: torch.stack([part, torch.zeros_like(part)], 1)[:, 0])
    assert not gaps.data.is_contiguous()
    x = random(5, 128)
    assert torch.equal(cpu.linear(x, cpu.pack(gaps))[0], cpu.linear(x, cpu.pack(packed))[0])


@pytest.mark.parametrize("kind", ["", "int8", "int4", "int4-g32-asym", *GROUPED])
def test_a_rows_answer_depends_neither_on_its_batch_nor_on_threads(way: str, kind: str) -> None:
    x, weight = random(70, 256, dtype=torch.bfloat16), random(96, 256, seed=5, dtype=torch.bfloat16)
    packed = cpu.pack(grouped(weight, kind) if kind else weight)
    whole = cpu.linear(x, packed)[0]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(cpu.linear(x, packed)[0], whole)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat([cpu.linear(x[n : n + 1], packed)[0] for n in range(70)]), whole)


# ---- norms and routing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 24, 100, 256])
def test_norms(dtype: torch.dtype, width: int) -> None:
    x, other, third = (random(7, width, seed=n, dtype=dtype) for n in range(3))
    weights = [1 + random(width, seed=9 + n, dtype=dtype, scale=0.3) for n in range(3)]
    norms, double = JoinNorms(*weights), JoinNorms(*(w.double() for w in weights))
    for weight in (weights[0], None):
        exact = reference.rms_norm(x.double(), None if weight is None else weight.double(), 1e-6)
        check_close(cpu.rms_norm(x, weight, 1e-6), exact, reference.rms_norm(x, weight, 1e-6), dtype)
    exact = reference.norm_add(x.double(), other.double(), double[0], 1e-6)
    check_close(cpu.norm_add(x, other, weights[0], 1e-6), exact, reference.norm_add(x, other, weights[0], 1e-6), dtype)
    for scale in (torch.tensor([0.7]), torch.linspace(0.5, 1.2, 7)[:, None]):
        scale = scale.to(dtype)
        exact = reference.join(x.double(), other.double(), third.double(), double, 1e-6, scale.double())
        plain = reference.join(x, other, third, norms, 1e-6, scale)
        check_close(cpu.join(x, other, third, norms, 1e-6, scale), exact, plain, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 24, 256])
def test_norm_rope(dtype: torch.dtype, size: int) -> None:
    x, weight = random(2, 5, 3, size, dtype=dtype), 1 + random(size, dtype=dtype, scale=0.3)
    angle = random(2, 5, size // 2, seed=4).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    exact = reference.norm_rope(x.double(), weight.double(), 1e-6, cos.double(), sin.double())
    check_close(cpu.norm_rope(x, weight, 1e-6, cos, sin), exact, reference.norm_rope(x, weight, 1e-6, cos, sin), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_route_picks_the_same_experts(dtype: torch.dtype) -> None:
    x, scale = random(61, 96, dtype=dtype), 1 + random(96, dtype=dtype, scale=0.2)
    proj, per = random(32, 96, dtype=dtype), 1 + random(32, dtype=dtype, scale=0.2)
    index, weight = cpu.route(x, scale, proj, per, 4, 1e-6)
    plain_index, plain_weight = reference.route(x, scale, proj, per, 4, 1e-6)
    same = (index.sort(-1).values == plain_index.sort(-1).values).all(-1)
    if dtype == torch.float32:
        assert same.all()
        assert torch.allclose(weight, plain_weight, atol=1e-5)
    assert same.float().mean() > 0.9  # bfloat16 logits tie
    assert index.dtype == torch.int64 and weight.dtype == torch.float32
    picked = [set(row.tolist()) for row in index]
    assert all(len(row) == 4 for row in picked)


# ---- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window, ring", [(None, 320), (70, 138), (4, 20)])
@pytest.mark.parametrize("encode, canvas", [(0, 40), (16, 0), (16, 40)])
@pytest.mark.parametrize("size", [8, 16, 40])
def test_attention(
    way: str, dtype: torch.dtype, window: int | None, ring: int, encode: int, canvas: int, size: int
) -> None:
    """Rows of different length, full and short windows, encode, denoise and both in one pass."""
    heads, groups, rows = 4, 2, (2, 0, 1)
    lengths, counts = (300, 0, 17), (encode, encode // 2, 0) if encode else (0, 0, 0)
    mask = Mask(
        [*rows], torch.tensor(rows), torch.tensor(lengths), torch.tensor(counts), encode, canvas, window, ring,
        min(max(lengths), ring),
    )  # fmt: skip
    width = encode + canvas
    q = random(3, width, heads, size, dtype=dtype)
    k, v = (random(3, width, groups, size, seed=n, dtype=dtype) for n in (1, 2))
    k_ring, v_ring = (random(3, ring + 1, groups, size, seed=n, dtype=dtype) for n in (3, 4))
    result = cpu.attention(q, k, v, k_ring, v_ring, mask)
    exact = reference.attention(q.double(), k.double(), v.double(), k_ring.double(), v_ring.double(), mask)
    plain = reference.attention(q, k, v, k_ring, v_ring, mask)
    for row, count in enumerate(counts):
        real = [*range(count), *range(encode, width)]
        if real:
            check_close(result[row, real], exact[row, real], plain[row, real], dtype, 16.0)
    assert result.isfinite().all()


# ---- a layer --------------------------------------------------------------------------------------------------------


def layer_of(dtype: torch.dtype, has_values: bool, inner: int) -> Layer:
    """A layer of width 48 with 4 heads of 16 in 2 groups, 3 experts of 24, `inner` wide in the dense part."""
    width, heads, groups, head, experts, expert_inner = 48, 4, 2, 16, 3, 24
    norms = iter([random(size, seed=n, dtype=dtype) for n, size in enumerate([width, head, head, *[width] * 7])])

    def pack(*shape: int, seed: int) -> Any:
        return cpu.pack(random(*shape, seed=seed, dtype=dtype, scale=0.1))

    return Layer(
        next(norms),
        pack(heads * head, width, seed=11),
        pack(groups * head, width, seed=12),
        pack(groups * head, width, seed=13) if has_values else None,
        pack(width, heads * head, seed=14),
        next(norms),
        next(norms),
        next(norms),
        next(norms),
        pack(inner, width, seed=15),
        pack(inner, width, seed=16),
        pack(width, inner, seed=17),
        next(norms),
        next(norms),
        random(experts, width, seed=18, dtype=dtype),
        random(experts, seed=19, dtype=dtype),
        next(norms),
        pack(experts, 2 * expert_inner, width, seed=20),
        pack(experts, width, expert_inner, seed=21),
        next(norms),
        next(norms),
        2,
        1e-6,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_values", [True, False])
@pytest.mark.parametrize("is_warm", [True, False])
def test_a_row_takes_the_same_way_through_a_layer_alone_and_in_a_batch(
    way: str, dtype: torch.dtype, has_values: bool, is_warm: bool
) -> None:
    """Of many rows and a layer that stays in the cache a thread takes one at a time; of few rows, or a layer that does
    not, the threads share each operation."""
    batch, encode, canvas, groups, head, ring = 9, 6, 20, 2, 16, 40
    width, inner = 48, 40 if is_warm else 4000
    layer = layer_of(dtype, has_values, inner)
    x, new = random(batch, encode + canvas, width, dtype=dtype), encode + canvas
    cos, sin = (random(batch, new, head, seed=n, dtype=dtype) for n in (22, 23))
    k_ring, v_ring = (random(batch, ring + 1, groups, head, seed=n, dtype=dtype) for n in (24, 25))
    scale = random(batch * new, 1, seed=26, dtype=dtype)
    lengths, counts = torch.arange(batch) * 7, torch.arange(batch) % (encode + 1)

    def through(rows: list[int], threads: int) -> tuple[Tensor, ...]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        at = torch.tensor(rows)
        mask = Mask(rows, at, lengths[at], counts[at], encode, canvas, 30, ring, ring)
        try:
            own_scale = scale.view(batch, -1)[at].reshape(-1, 1)
            result = cpu.block(x[at], layer, BlockPass(cos[at], sin[at], k_ring, v_ring, mask, own_scale))
            assert result.k_BTGK is not None and result.v_BTGK is not None
            return result.x_BTD, result.k_BTGK, result.v_BTGK
        finally:
            torch.set_num_threads(before)

    alone = [through([row], 1) for row in range(batch)]
    for threads in (1, 2, 4):
        for result, each in zip(through([*range(batch)], threads), zip(*alone, strict=True), strict=True):
            assert result.isfinite().all() and torch.equal(result, torch.cat(each))


@pytest.mark.parametrize(
    "of, how",
    [
        ("self_attn.k_proj", "in its place"),
        ("mlp.down_proj", "in fewer bits"),
        ("mlp.gate_proj", "with its module"),
        ("input_layernorm", "its numbers"),
        ("router.proj", "its memory"),
        ("self_attn.q_norm", "with its module"),
    ],
)
def test_a_weight_that_was_replaced_is_not_read_again(of: str, how: str) -> None:
    """However it is replaced between two passes, the model gives what one gives that never ran with another."""
    used, fresh = (tiny.tiny_model(seed=3, name="cpu") for _ in range(2))
    place, child = "layers.1." + of.rpartition(".")[0], of.rpartition(".")[2]
    tokens, canvas = torch.arange(12)[None] % 7, torch.arange(used.config.canvas_length)[None] % 5
    module: Any = used.get_submodule(f"layers.1.{of}")
    weight = random(*module.weight.shape, seed=8)

    def run(model: Any) -> Tensor:
        cache = KVCache.allocate(model.config, 1, 64)
        return torch.cat([model.encode(tokens, cache), model.denoise(canvas, cache)], 1)

    def change(model: Any) -> None:
        parent = model.get_submodule(place.rstrip("."))
        if how == "with its module":
            setattr(parent, child, copy.deepcopy(getattr(parent, child)))
        owner = getattr(parent, child)
        if of.endswith("_proj"):
            kept = formats.pack(weight, "int8") if how == "in fewer bits" else weight
            replace_(owner, "weight", cpu.pack(kept))
        elif how == "its memory":
            owner.weight.data = weight
        else:
            owner.weight.data.copy_(weight)

    with torch.inference_mode():
        before = run(used)
        change(used)
        change(fresh)
        assert torch.equal(run(used), run(fresh)) and not torch.equal(run(used), before)


# ---- the vocabulary -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("words, length, size", [(61, 8, 24), (300, 33, 70), (1000, 70, 64)])
def test_read_out_and_soft_embedding(way: str, dtype: torch.dtype, words: int, length: int, size: int) -> None:
    hidden, embed = random(2, length, size, dtype=dtype), random(words, size, dtype=dtype, scale=size**-0.5)
    temperature, uniform = torch.tensor([0.8, 0.4]), torch.rand(2, length, generator=torch.Generator().manual_seed(1))
    where = torch.rand(2, length, generator=torch.Generator().manual_seed(2)) < 0.5
    banned = where, torch.tensor([0, words - 1, words // 2])
    result = cpu.read_out(hidden, embed, 30.0, temperature, uniform, None, banned)
    exact = reference.read_out(hidden.double(), embed.double(), 30.0, temperature, uniform, None, banned)
    plain = reference.read_out(hidden, embed, 30.0, temperature, uniform, None, banned)
    live = exact.logits_BLV > contract.NEVER / 2
    assert (result.logits_BLV[~live].float() < -1e29).all()
    check_close(
        result.logits_BLV[live], exact.logits_BLV[live], plain.logits_BLV[live], dtype, 10.0
    )  # softcap's own places
    check_close(result.entropy_BL, exact.entropy_BL, plain.entropy_BL, torch.float32, 64.0)
    p = exact.logits_BLV.double().softmax(-1)
    best = p.gather(-1, result.argmax_BL[..., None])[..., 0]
    assert (best >= p.amax(-1) * (1 - 16 * EPS[dtype])).all()
    # The sample is where the cumulative distribution passes the number, within the logits' own rounding.
    cdf = p.cumsum(-1)
    upper = cdf.gather(-1, result.sample_BL[..., None])[..., 0]
    lower = upper - p.gather(-1, result.sample_BL[..., None])[..., 0]
    slack = 1e-5 if dtype == torch.float32 else 0.05
    assert (lower - slack <= uniform).all() and (uniform <= upper + slack).all()
    assert not (torch.isin(result.sample_BL, banned[1]) & where).any()
    assert not (torch.isin(result.argmax_BL, banned[1]) & where).any()

    scale = torch.tensor(size**0.5)
    soft = cpu.soft_embedding(result.logits_BLV, embed, scale, result.tiles)
    exact_soft = reference.soft_embedding(result.logits_BLV.double(), embed.double(), scale.double())
    plain_soft = reference.soft_embedding(result.logits_BLV, embed, scale)
    check_close(soft, exact_soft, plain_soft, dtype, 8.0)
    check_close(cpu.soft_embedding(result.logits_BLV, embed, scale), exact_soft, plain_soft, dtype, 8.0)


def test_the_oracles_noise_is_added_to_the_stored_logits(way: str) -> None:
    hidden, embed, gumbel = random(1, 9, 24), random(61, 24), random(1, 9, 61, seed=3)
    result = cpu.read_out(hidden, embed, 30.0, torch.tensor([0.5]), None, gumbel)
    assert torch.equal(result.sample_BL, (result.logits_BLV.float() + gumbel).argmax(-1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_skipped_tiles_cost_no_more_than_their_bound(way: str, dtype: torch.dtype) -> None:
    """Near the end every position knows its word: most tiles are left out, and the answer moves by less than the bound
    that `soft_embedding` states (beside the rounding of what is not left out)."""
    words, size, length = 4000, 64, 64
    embed = random(words, size, dtype=dtype)
    logits = random(1, length, words, seed=1).mul_(0.5)
    sure = torch.arange(length) % 300
    logits[0, torch.arange(length), sure] = 28.0
    logits = logits.to(dtype)
    peak_N = logits.float().amax(-1)[0]
    sums = (logits.float() - peak_N[:, None]).exp()[0]
    tiles = -(-words // cpu._words())
    padded = torch.nn.functional.pad(sums, (0, tiles * cpu._words() - words))
    mass_WN = (padded.view(length, tiles, -1).sum(-1) / sums.sum(-1, keepdim=True)).T.contiguous()
    skipped = (mass_WN < torch.finfo(dtype).eps / 16 / tiles).all(1)
    assert skipped.float().mean() > (0.5 if dtype == torch.bfloat16 else -1)
    scale = torch.tensor(3.0)
    without = cpu.soft_embedding(logits, embed, scale, (mass_WN, peak_N))
    whole = cpu.soft_embedding(logits, embed, scale)
    bound = torch.finfo(dtype).eps / 4 * embed.float().abs().max() * scale
    rounding = torch.finfo(dtype).eps * whole.float().abs()
    assert ((without.float() - whole.float()).abs() <= bound + rounding).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_read_out_and_soft_embedding_do_not_depend_on_its_batch(way: str, dtype: torch.dtype) -> None:
    """Rows whose length is no multiple of a block, some sure and some not: what is left out is a row's own matter."""
    hidden, embed = random(3, 45, 64, dtype=dtype), random(3000, 64, dtype=dtype)
    hidden[1] *= 8
    temperature, uniform, scale = torch.tensor([0.8, 0.4, 0.6]), torch.rand(3, 45), torch.tensor(8.0)
    whole = cpu.read_out(hidden, embed, 30.0, temperature, uniform)
    soft = cpu.soft_embedding(whole.logits_BLV, embed, scale, whole.tiles)
    for row in range(3):
        some = slice(row, row + 1)
        alone = cpu.read_out(hidden[some], embed, 30.0, temperature[some], uniform[some])
        for one, two in zip(alone[:4], whole[:4], strict=True):
            assert torch.equal(one, two[some])
        assert torch.equal(cpu.soft_embedding(alone.logits_BLV, embed, scale, alone.tiles), soft[some])


def test_memory_of_logits_comes_back() -> None:
    """Large logits take the memory of those that are gone, never of those that live."""
    hidden, embed, temperature = random(1, 64, 16), random(20000, 16), torch.tensor([1.0])
    one = cpu.read_out(hidden, embed, 30.0, temperature).logits_BLV
    two = cpu.read_out(hidden * 2, embed, 30.0, temperature).logits_BLV
    assert one.nbytes >= cpu.HUGE and one.data_ptr() != two.data_ptr() and not torch.equal(one, two)
    view, place = two[:, :1], two.data_ptr()
    del two
    assert cpu.read_out(hidden, embed, 30.0, temperature).logits_BLV.data_ptr() != place  # a view keeps it
    del view
    assert cpu.read_out(hidden, embed, 30.0, temperature).logits_BLV.data_ptr() == place


# ---- the end of a step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_pins, has_early", [(False, False), (True, False), (True, True)])
def test_a_step_ends_as_the_specification_says(
    has_pins: bool, has_early: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All to the bit, with one thread and with two. Three steps each, of which the last has the argmax tokens of the
    one before it; equal entropies, or as they come; rows in any order, one that had stopped among them."""
    reasons, threads = Counter[str](), torch.get_num_threads()
    for seed in range(24):
        form = {"length": (20, 1, 7, 82)[seed % 4], "width": (24, 5, 70)[seed % 3]}
        plain, fused = (endings.canvases(seed, has_pins, has_early, dtype, **form) for _ in range(2))
        at, is_tied = [[0, 1, 2, 3, 4], [4, 2, 0], [3]][seed % 5 % 3], seed % 2 == 0
        result, soft = endings.pass_result(at, 100 + seed, is_tied, dtype, **form)
        torch.set_num_threads(1 + seed % 2)
        for turn in range(3):
            if turn < 2:
                result, soft = endings.pass_result(at, 100 * turn + seed, is_tied, dtype, **form)
            before = plain.is_done_X.clone()
            endings.concluded(monkeypatch, None, plain, at, result, soft)
            endings.concluded(monkeypatch, cpu.conclude_, fused, at, result, soft)
            assert endings.differing(plain, fused) == []
            stopped_X = plain.is_done_X & ~before
            reasons["stopped"] += int(stopped_X.sum())
            reasons["before the cap"] += int((stopped_X & (plain.step_X < plain.rules.max_steps_X)).sum())
            reasons["settled"] += int((plain.settled_X > 0).sum())
    torch.set_num_threads(threads)
    assert reasons["stopped"] > reasons["before the cap"] > 2
    assert (reasons["settled"] > 5) is has_early


@pytest.mark.parametrize("where", ["hidden", "soft", "entropy", "a pinned entropy"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stops(where: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the number stands, even where a pin hides it; but not what a pin puts in place of a soft embedding."""
    plain, fused = (endings.canvases(4, True, False) for _ in range(2))
    at, (result, soft) = [0, 1, 4], endings.pass_result([0, 1, 4], 7, exact=True)
    plain.pin_XL[1, 3:5] = fused.pin_XL[1, 3:5] = torch.tensor([9, -1])
    soft[1, 3, 2] = value
    {
        "hidden": result.hidden_BLD[1, 3],
        "soft": soft[1, 4],
        "entropy": result.read.entropy_BL[1, 4:5],
        "a pinned entropy": result.read.entropy_BL[1, 3:4],
    }[where][-1] = value
    endings.concluded(monkeypatch, None, plain, at, result, soft)
    endings.concluded(monkeypatch, cpu.conclude_, fused, at, result, soft)
    assert fused.is_finite_X[:-1].tolist() == plain.is_finite_X[:-1].tolist() == [True, False, False, True, True]
    assert fused.is_done_X[1] and torch.equal(plain.accepted_XL, fused.accepted_XL)


def test_entropies_of_every_kind_are_accepted_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros of both signs, what rounding left below zero, subnormal numbers, infinity, no numbers at all."""
    kinds = torch.tensor([0.0, -0.0, -1e-7, 1e-40, 1e-3, 0.25, 12.5, math.inf, math.nan])
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        plain, fused = (endings.canvases(seed, False, False) for _ in range(2))
        result, soft = endings.pass_result([0, 1, 2, 4], seed, exact=True)
        kind_BL = torch.randint(0, len(kinds) - seed % 3, result.read.entropy_BL.shape, generator=draw)
        result.read.entropy_BL[:] = kinds[kind_BL]
        endings.concluded(monkeypatch, None, plain, [0, 1, 2, 4], result, soft)
        endings.concluded(monkeypatch, cpu.conclude_, fused, [0, 1, 2, 4], result, soft)
        assert torch.equal(plain.accepted_XL, fused.accepted_XL) and torch.equal(plain.canvas_XL, fused.canvas_XL)


def test_sums_that_are_the_bound_itself_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bit of a sum decides here: it is that of torch's sum along a row."""
    for seed in range(10):
        plain, fused = (endings.canvases(seed, False, False, length=82) for _ in range(2))
        result, soft = endings.pass_result([0, 1, 2, 4], seed, exact=False, length=82)
        ordered_BL = result.read.entropy_BL.sort(-1).values
        plain.rules.entropy_bound_X[[0, 1, 2, 4]] = (ordered_BL.cumsum(-1) - ordered_BL)[:, 40 + seed]
        fused.rules.entropy_bound_X[:] = plain.rules.entropy_bound_X
        endings.concluded(monkeypatch, None, plain, [0, 1, 2, 4], result, soft)
        endings.concluded(monkeypatch, cpu.conclude_, fused, [0, 1, 2, 4], result, soft)
        assert torch.equal(plain.accepted_XL, fused.accepted_XL)
        assert fused.accepted_XL[[0, 1, 2, 4]].sum(-1).min() > 40 + seed


def test_scratch_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    state, before = (endings.canvases(1, True, True) for _ in range(2))
    endings.concluded(monkeypatch, cpu.conclude_, state, [5, 5, 0], *endings.pass_result([5, 5, 0], 1, exact=False))
    whole = [f.name for f in fields(state) if "_X" in f.name]
    assert all(torch.equal(getattr(state, name)[-1], getattr(before, name)[-1]) for name in whole)
    assert not torch.equal(state.canvas_XL[0], before.canvas_XL[0])


# ---- every number of rows, and the ends of a range -------------------------------------------------------------------


@pytest.mark.parametrize("rows", [*range(1, 34), 47, 48, 49])
def test_rows_that_there_are_and_no_others(way: str, rows: int) -> None:
    """Products of AVX-512 take as many rows at a time as fit the registers: every number of them."""
    x, weight = random(49, 96, dtype=torch.bfloat16), random(40, 96, seed=1, dtype=torch.bfloat16)
    for kind in ("", "int8", "int4-g32", "int4-g32-asym"):
        packed = cpu.pack(formats.pack(weight, kind) if kind else weight)
        assert torch.equal(cpu.linear(x[:rows], packed)[0], cpu.linear(x, packed)[0][:rows])


def test_int8_at_its_ends(way: str) -> None:
    """The largest sums, of both signs: exact in integers, though AVX-512 multiplies bytes of which one has no sign."""
    codes = torch.tensor([127, -127, 127, -127])[:, None].expand(4, 4096).to(torch.int8)
    packed = cpu.pack(Packed("int8", (4, 4096), codes.contiguous(), torch.ones(4), 4096))
    x = torch.cat([torch.ones(1, 4096), -torch.ones(1, 4096), torch.ones(1, 2048).repeat(1, 2)])
    x[2, ::2] = -1
    y = cpu.linear(x, packed)[0]
    assert torch.equal(y[0], 127 * 4096 * torch.tensor([1.0, -1, 1, -1])) and torch.equal(y[1], -y[0])
    assert not y[2].any()
