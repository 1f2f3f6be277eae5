"""ops/triton/block.py, between.py and heads.py: a whole block, under the interpreter, against the reference's
operations one by one; what it prepares for the next block, what it leaves in the rings; adapters; products in parts;
and a model of thirty layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton_fp8
import triton_interpreter
from triton.runtime import interpreter

from sfumato.model.cache import KVCache
from sfumato.model.config import LayerConfig, ModelConfig, Rope
from sfumato.model.network import Block, Model
from sfumato.ops import reference
from sfumato.ops import triton as kernels
from sfumato.ops.contract import After, BlockPass, BlockResult, JoinNorms, Layer, Matrix
from sfumato.ops.lowrank import LanePair, Lanes, LaneSwitch, LowRank
from sfumato.ops.masks import Mask
from sfumato.ops.packed import Packed
from sfumato.ops.triton import forms, linear, product, tuning
from sfumato.ops.triton.block import block
from sfumato.ops.triton.product import Ready
from sfumato.quant import formats

if triton_interpreter.IS_ON:
    triton_fp8.put_right()

SMALL = {"BLOCK_N": 64, "BLOCK_M": 32, "BLOCK_K": 32}
WIDTH, HEADS, GROUPS, HEAD, INNER, EXPERTS, EXPERT, TOP_K = 96, 4, 2, 16, 64, 6, 32, 2
EPS = 1e-6


@pytest.fixture(autouse=triton_interpreter.IS_ON)
def small() -> Iterator[None]:
    """Small tiles, of which small shapes have several; every sum that may be split is."""
    with (
        tuning.using("linear", **SMALL),
        tuning.using("gate_up", **SMALL),
        tuning.using("experts_gate_up", **{**SMALL, "BLOCK_M": 16}),
        tuning.using("experts_down", BLOCK_N=64, BLOCK_K=32),
        tuning.using("route", BLOCK_K=32, SPLITS=2),
        tuning.using("attention", BLOCK_M=16, BLOCK_N=16, SPLITS=3),
        tuning.using("parts", PARTS=2),
        tuning.using("between", VALUES=1024),
        tuning.using("end", VALUES=1024),
    ):
        yield


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def layer_of(kind: str, dtype: torch.dtype, has_values: bool = True) -> Layer:
    def norm(size: int, seed: int) -> Tensor:
        return (1 + normal(size, seed=seed, scale=0.2)).to(dtype)

    def weight(*shape: int, seed: int) -> Any:
        one = normal(*shape, seed=seed, scale=shape[-1] ** -0.5).to(dtype)
        return forms.pack(formats.pack(one, kind) if kind else one)

    return Layer(
        norm(WIDTH, 1),
        weight(HEADS * HEAD, WIDTH, seed=2),
        weight(GROUPS * HEAD, WIDTH, seed=3),
        weight(GROUPS * HEAD, WIDTH, seed=4) if has_values else None,
        weight(WIDTH, HEADS * HEAD, seed=5),
        norm(HEAD, 6),
        norm(HEAD, 7),
        norm(WIDTH, 8),
        norm(WIDTH, 9),
        weight(INNER, WIDTH, seed=10),
        weight(INNER, WIDTH, seed=11),
        weight(WIDTH, INNER, seed=12),
        norm(WIDTH, 13),
        norm(WIDTH, 14),
        normal(EXPERTS, WIDTH, seed=15).to(dtype),
        norm(EXPERTS, 16),
        norm(WIDTH, 17),
        weight(EXPERTS, 2 * EXPERT, WIDTH, seed=18),
        weight(EXPERTS, WIDTH, EXPERT, seed=19),
        norm(WIDTH, 20),
        norm(WIDTH, 21),
        TOP_K,
        EPS,
    )


def products_of(layer: Layer) -> tuple[Matrix, ...]:
    """What takes the input of a block with this layer."""
    return tuple(weight for weight in (layer.q, layer.k, layer.v) if weight is not None)


def in_float32(layer: Layer) -> Layer:
    def widened(part: Any) -> Any:
        if isinstance(part, LowRank):
            return dataclasses.replace(part, base=widened(part.base), a=part.a.float(), b=part.b.float())
        if isinstance(part, Packed):
            return part  # reference unpacks it to x's dtype
        return part.float() if isinstance(part, Tensor) else part

    return Layer(*map(widened, layer))


def by_reference(x_BTD: Tensor, layer: Layer, block_pass: BlockPass) -> tuple[Tensor, Tensor, Tensor]:
    """The block's output and its new keys and values, operation by operation."""
    cos, sin, _, _, mask, scale = block_pass
    ops, (batch, tokens, _) = reference, x_BTD.shape
    normed = ops.rms_norm(x_BTD, layer.input_norm, EPS)
    weights = [each for each in (layer.q, layer.k, layer.v) if each is not None]
    q, k, *v = (y.view(batch, tokens, -1, HEAD) for y in ops.linear(normed, *weights))
    value = ops.rms_norm(v[0] if v else k, None, EPS)
    q, key = (ops.norm_rope(*pair, EPS, cos, sin) for pair in ((q, layer.q_norm), (k, layer.k_norm)))
    mixed = ops.attention(q, key, value, block_pass.k_XRGK, block_pass.v_XRGK, mask).reshape(batch, tokens, -1)
    x = ops.norm_add(x_BTD, ops.linear(mixed, layer.o)[0], layer.after_attention, EPS).view(-1, WIDTH)
    dense = ops.feed_forward(ops.rms_norm(x, layer.before_dense, EPS), layer.gate, layer.up, layer.down)
    routed = ops.route(x, layer.router_scale, layer.router, layer.per_expert, TOP_K, EPS)
    sparse = ops.experts(ops.rms_norm(x, layer.before_experts, EPS), *routed, layer.gate_up, layer.expert_down)
    norms = JoinNorms(layer.after_dense, layer.after_experts, layer.after)
    return ops.join(x, dense, sparse, norms, EPS, scale).view_as(x_BTD), key, value


ROWS = {
    "canvas": ([21], [0], 0, 11),
    "encode": ([0, 9], [7, 2], 7, 0),
    "both": ([30, 4, 0], [5, 2, 0], 5, 6),
}


def inputs(rows: str, dtype: torch.dtype, window: int | None = 12) -> tuple[Tensor, BlockPass]:
    """The block's x, and what it takes from its pass."""
    lengths, counts, encode, canvas = ROWS[rows]
    batch, tokens = len(lengths), encode + canvas
    ring = 24 if window else 64
    order = [2, 0, 1][:batch]
    places = torch.tensor(order), torch.tensor(lengths), torch.tensor(counts)
    mask = Mask(order, *places, encode, canvas, window, ring, min(ring, max(lengths)))
    angles = normal(batch, tokens, HEAD, seed=30) * 5
    angles = torch.cat([angles[..., : HEAD // 2]] * 2, -1)
    k, v = (normal(4, ring + 1, GROUPS, HEAD, seed=n).to(dtype) for n in (31, 32))
    scale = normal(batch * tokens, 1, seed=33) if encode and canvas else torch.tensor([0.7])
    x = normal(batch, tokens, WIDTH, seed=34)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return x.to(dtype), BlockPass(cos, sin, k, v, mask, scale.to(dtype))


def rings(block_pass: BlockPass) -> tuple[Tensor, Tensor]:
    return block_pass.k_XRGK, block_pass.v_XRGK


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.float() - exact.float()).norm() / exact.float().norm())


def real(mask: Mask) -> Tensor:
    new_T = torch.arange(mask.encode + mask.canvas)
    return (new_T >= mask.encode) | (new_T < mask.counts_B[:, None])


CASES: list[Any] = [(kind, "both", torch.float32) for kind in ("", "int4-asym", "mxfp4")]
CASES += [("", "encode", torch.float32), ("", "canvas", torch.bfloat16), ("fp8", "canvas", torch.bfloat16)]
CASES += [
    pytest.param(*case, marks=pytest.mark.slow)  # the operations have these kinds in tests of their own
    for case in (
        *((kind, "both", torch.float32) for kind in ("int8", "fp8", "int4", "nvfp4")),
        *((kind, "canvas", torch.bfloat16) for kind in ("int8", "int4-asym")),
    )
]


@pytest.mark.slow  # a minute
@pytest.mark.parametrize("kinds", [("int4", "int8"), ("int8", "nvfp4"), ("int4-asym", "int4")], ids=str)
def test_gate_and_up_in_two_kinds(kinds: tuple[str, str]) -> None:
    """Two launches instead of one; what lies before and behind them is the same."""
    gate, up = (layer_of(kind, torch.float32) for kind in kinds)
    layer, (x, block_pass) = gate._replace(up=up.up), inputs("canvas", torch.float32)
    exact, _, _ = by_reference(x, layer, block_pass)
    assert relative(block(x, layer, block_pass)[0], exact) <= 1e-5


@pytest.mark.parametrize(("kind", "rows", "dtype"), CASES, ids=str)
def test_a_block_is_its_operations(kind: str, rows: str, dtype: torch.dtype) -> None:
    layer, (x, block_pass) = layer_of(kind, dtype, rows != "encode"), inputs(rows, dtype)
    plain, key, value = by_reference(x, layer, block_pass)
    cos, sin, k, v, mask, scale = block_pass
    floats = BlockPass(cos.float(), sin.float(), k.float(), v.float(), mask, scale.float())
    exact, _, _ = by_reference(x.float(), in_float32(layer), floats)
    before = [ring.clone() for ring in rings(block_pass)]
    fast, none, nothing, next_input = block(x, layer, block_pass)
    assert none is None and nothing is None and next_input is None and fast.dtype == dtype
    is_real = real(mask)
    # FP8 rounds x itself, another way where x differs in its last place.
    least = 0.02 if kind == "fp8" else 1e-5 if dtype == torch.float32 else 4e-3
    assert relative(fast[is_real], exact[is_real]) <= max(2 * relative(plain[is_real], exact[is_real]), least)

    # In the rings: of canvases nothing, of what is encoded the real ones.
    for ring, old, new in zip(rings(block_pass), before, (key, value), strict=True):
        expected = old.clone()
        for b, row in enumerate(mask.rows):
            for t in range(count := int(mask.counts_B[b])):
                assert count <= mask.ring
                expected[row, (int(mask.lengths_B[b]) + t) % mask.ring] = new[b, t]
        is_new = (expected != old).any(-1).any(-1)
        assert is_new.sum() == mask.counts_B.sum() and torch.equal(ring[~is_new], old[~is_new])
        assert not is_new.any() or relative(ring[is_new], expected[is_new]) <= least


@pytest.mark.parametrize("kind", ["", "fp8", "int4", "int4-asym"])
def test_what_is_prepared_is_the_next_blocks_input(kind: str) -> None:
    layer, (x, block_pass) = layer_of(kind, torch.bfloat16), inputs("canvas", torch.bfloat16)
    norm = (1 + normal(WIDTH, seed=40, scale=0.2)).bfloat16()
    x, _, _, prepared = block(x, layer, block_pass, after=After(norm, products_of(layer)))
    following = layer._replace(input_norm=norm)
    alone = block(x, following, block_pass).x_BTD
    result = block(x, following, block_pass, prepared).x_BTD
    assert isinstance(prepared, Ready) and prepared.layout == {"": "plain", "fp8": "fp8", "int4": "classes"}.get(
        kind, "sums"
    )
    assert relative(result, alone) <= 4e-3
    # Weights that meet x in two ways get it plain.
    if kind:
        two = (layer.q, layer_of("", torch.bfloat16).k)
        plain = block(x, layer, block_pass, after=After(norm, two)).next_input
        assert plain.layout == "plain"
        result = block(x, following._replace(k=two[1], v=None), block_pass, plain).x_BTD
        assert result.isfinite().all()


@pytest.mark.parametrize("kind", ["", "int8", "fp8", "int4-asym"])
def test_a_row_does_not_depend_on_its_batch(kind: str) -> None:
    layer, (x, block_pass) = layer_of(kind, torch.bfloat16), inputs("both", torch.bfloat16)
    cos, sin, *_, mask, scale = block_pass
    after = After(layer.input_norm, products_of(layer))
    before = [ring.clone() for ring in rings(block_pass)]
    many, _, _, prepared = block(x, layer, block_pass, after=after)
    scale_BT1 = scale.view(*x.shape[:2], 1)
    for b in range(len(x)):
        one = slice(b, b + 1)
        places = mask.rows_B[one], mask.lengths_B[one], mask.counts_B[one]
        alone = dataclasses.replace(
            mask, rows=mask.rows[one], rows_B=places[0], lengths_B=places[1], counts_B=places[2]
        )
        k, v = (ring.clone() for ring in before)
        own = BlockPass(cos[one], sin[one], k, v, alone, scale_BT1[one].reshape(-1, 1))
        result, _, _, ready = block(x[one], layer, own, after=after)
        is_real = real(alone)
        assert torch.equal(result[is_real], many[one][is_real])
        mine = prepared.x_MK.view(*x.shape)[one][is_real].float()
        assert torch.equal(ready.x_MK.view(*result.shape)[is_real].float(), mine)
        for ring, whole in zip((k, v), rings(block_pass), strict=True):
            assert torch.equal(ring[mask.rows[b]], whole[mask.rows[b]])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, for the same numbers
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_row_that_is_not_finite_says_so(value: float) -> None:
    """And spoils no other row, nor memory: the lists of its experts have room."""
    layer, (x, block_pass) = layer_of("int8", torch.float32), inputs("canvas", torch.float32)
    after = After(layer.input_norm, ())
    # A position that nobody sees: padding behind what a row encodes.
    mask = dataclasses.replace(block_pass.mask, encode=4, canvas=7, counts_B=torch.tensor([2]))
    block_pass = block_pass._replace(mask=mask)
    *_, sound = block(x, layer, block_pass, after=after)
    x[0, 3] = value
    *_, hidden = block(x, layer, block_pass, after=after)
    assert not hidden[0, 3].isfinite().all()
    others = [t for t in range(11) if t != 3]
    assert torch.equal(hidden[0, others], sound[0, others])


def adapted(layer: Layer, switch: LaneSwitch) -> Layer:
    """With factors of three lanes beside every product, and the router."""

    def beside(base: Matrix, seed: int) -> LowRank:
        *stack, outputs, inputs = base.shape
        a, b = (normal(3, *stack, 4, n, seed=seed + n, scale=n**-0.5).to(layer.router_scale) for n in (inputs, outputs))
        return LowRank(base, a, 4 * b, switch)

    names = ("q", "k", "v", "o", "gate", "up", "down", "router", "gate_up", "expert_down")
    changed: dict[str, Any] = {name: beside(getattr(layer, name), 100 * n) for n, name in enumerate(names, 1)}
    return layer._replace(**changed)


@pytest.mark.parametrize("kind", ["fp8", pytest.param("int4-asym", marks=pytest.mark.slow)])
def test_a_block_with_adapters_is_its_operations(kind: str) -> None:
    """Of rows that encode with one and denoise with another, and of what it prepares for the next block."""
    switch, (x, block_pass) = LaneSwitch(), inputs("both", torch.bfloat16)
    bare, is_real = layer_of(kind, torch.bfloat16), real(block_pass.mask)
    layer = adapted(bare, switch)
    cos, sin, k, v, mask, scale = block_pass
    floats = BlockPass(cos.float(), sin.float(), k.float(), v.float(), mask, scale.float())
    after = After(layer.input_norm, products_of(layer))
    switch.lanes = Lanes.of([LanePair(0, 1), LanePair(), LanePair(2, 2)], 5, 6, "cpu")
    plain, _, _ = by_reference(x, layer, block_pass)
    exact, _, _ = by_reference(x.float(), in_float32(layer), floats)
    fast, _, _, prepared = block(x, layer, block_pass, after=after)
    without, _, _ = by_reference(x, bare, block_pass)
    assert relative(without[is_real], exact[is_real]) > 0.1
    least = 0.02 if kind == "fp8" else 4e-3
    assert relative(fast[is_real], exact[is_real]) <= max(2 * relative(plain[is_real], exact[is_real]), least)
    assert prepared.layout == {"fp8": "plain", "int4-asym": "sums"}[kind]  # factors meet x as it is
    result = block(fast, layer, block_pass, prepared).x_BTD
    assert relative(result[is_real], block(fast, layer, block_pass).x_BTD[is_real].float()) <= least


def test_the_order_in_which_programs_come_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes last joins the parts, in their own order; an expert's list may stand in any."""
    layer, (x, block_pass) = layer_of("int8", torch.bfloat16), inputs("both", torch.bfloat16)
    after = After(layer.input_norm, ())
    first, *_, hidden = block(x, layer, block_pass, after=after)
    kind = type(interpreter.interpreter_builder)
    forward = kind.set_grid_idx

    def backward(self: Any, *at: int) -> None:
        forward(self, *(size - 1 - one for size, one in zip(self.grid_dim, at, strict=True)))

    monkeypatch.setattr(kind, "set_grid_idx", backward)
    second, *_, again = block(x, layer, block_pass, after=after)
    assert torch.equal(first, second) and torch.equal(hidden, again)


def test_joined_by_a_kernel_of_its_own() -> None:
    layer, (x, block_pass) = layer_of("int8", torch.bfloat16), inputs("both", torch.bfloat16)
    one = block(x, layer, block_pass).x_BTD
    _, again = inputs("both", torch.bfloat16)
    with tuning.using("attention_combine", LAST=0):
        two = block(x, layer, again).x_BTD
    is_real = real(block_pass.mask)
    assert torch.equal(one[is_real], two[is_real])


def test_parts_add_up() -> None:
    for kind, dtype in (("", torch.float32), ("int8", torch.bfloat16), ("fp8", torch.bfloat16)):
        x = normal(5, 384).to(dtype)
        one = normal(40, 384, seed=1, scale=0.1).to(dtype)
        weight = forms.form(forms.pack(formats.pack(one, kind) if kind else one), x)
        ready = product.prepare(x, weight)
        whole, parts = torch.empty(5, 40), torch.empty(3, 5, 40)
        linear.multiply(ready, [weight], [whole], dtype)
        linear.multiply(ready, [weight], [parts], dtype)
        assert relative(parts.sum(0), whole) < 1e-6 and relative(parts[0] + parts[1], whole) > 0.1


@pytest.mark.skipif(triton_interpreter.IS_ON, reason="with the tiles of the package")
def test_the_parts_of_the_released_model() -> None:
    """Shares of whole steps, as many as one canvas needs for an H200's 132 processors; none for two weights a byte."""
    for kind, inputs, expected in (
        ("plain", 4096, 4),
        ("plain", 8192, 4),
        ("plain", 2112, 3),
        ("int8", 2112, 3),
        ("fp8", 4096, 2),
        ("fp8", 2112, 3),
        ("plain", 704, 1),
        ("int4", 4096, 1),
    ):
        weight = forms.Form(kind, 2816, inputs, 64 if kind == "int4" else 1)
        assert linear.splits(weight, "bfloat16", "sm_90") == expected, (kind, inputs)
    # Where two programs do not fit one processor, no more than there are.
    assert linear.splits(forms.Form("plain", 2816, 4096), "bfloat16", "sm_89") == 2


def test_nothing_is_prepared_for_a_block_with_a_hook() -> None:
    """Its weights may not have come yet (offload.py)."""
    plain = tiny.tiny_model(tiny.tiny_config(), seed=3, name="reference")
    calls: list[tuple[Any, After | None]] = []

    def whole(
        x: Tensor, layer: Layer, block_pass: BlockPass, next_input: Any = None, after: After | None = None
    ) -> BlockResult:
        calls.append((next_input, after))
        return BlockResult(x, None, None, after and len(calls))

    plain.use_(dataclasses.replace(reference.OPS, block=whole))
    plain.layers[2].register_forward_pre_hook(lambda *_: None)
    last = plain.denoise(torch.zeros(1, 8, dtype=torch.long), KVCache.allocate(plain.config, 1, 8))
    count = len(plain.layers)
    assert [next_input for next_input, _ in calls] == [None, 1, None, *range(3, count)] and last == count
    assert [after is None for _, after in calls] == [False, True, *[False] * (count - 2)]
    (_, first), (_, final), second_block = calls[0], calls[-1], plain.layers[1]
    assert first is not None and final is not None and isinstance(second_block, Block)
    assert first.norm is second_block.input_layernorm.weight and len(first.products) >= 2
    assert final.norm is plain.norm.weight and final.products == ()


THIN: ModelConfig = tiny.tiny_config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=32,
    num_experts=128,
    top_k_experts=8,
    expert_size=16,
    canvas_length=3,
    eos_ids=(),
    layers=(*[LayerConfig(8, 2, 6, Rope(10_000.0))] * 5, LayerConfig(16, 1, None, Rope(1e6, 0.5, 1.0, True))) * 5,
)


@pytest.mark.slow  # a minute
def test_thirty_layers_of_many_experts() -> None:
    """Two rows of different length encode a little more and denoise in one pass; each block prepares the next
    one's input, from the first layer to the final norm."""
    plain = tiny.tiny_model(THIN, seed=3, name="reference")
    with torch.device("meta"):
        model = Model(THIN, kernels.record())
    model.load_state_dict(plain.state_dict(), assign=True)
    model = model.requires_grad_(False).eval().pack_()
    results: list[tuple[Tensor, KVCache]] = []
    for one in (plain, model):
        cache = KVCache.allocate(THIN, 2, 32)
        for layer in range(30):  # seven tokens of one row, two of the other, whatever they were
            for ring in cache.ring_of(layer):
                ring.copy_(normal(*ring.shape, seed=layer))
        cache.lengths[:] = cache.peaks[:] = [7, 2]
        tokens, canvas = torch.tensor([[5, 9], [4, 0]]), torch.tensor([[3, 1, 4], [9, 2, 6]])
        _, hidden = one.encode_and_denoise(tokens, [2, 1], canvas, cache)
        results.append((hidden, cache))
    (exact, old), (fast, new) = results
    assert relative(fast, exact) < 1e-4
    for layer in range(30):
        for expected, got in zip(old.ring_of(layer), new.ring_of(layer), strict=True):
            assert relative(got[:, :-1], expected[:, :-1]) < 1e-4  # the last slot is for padding


_of_the_package = test_the_parts_of_the_released_model  # here: the child has small tiles
triton_interpreter.in_a_child(globals())
test_the_parts_of_the_released_model = _of_the_package
