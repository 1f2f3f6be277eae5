"""ops/triton/low_rank.py: adapters beside weights of every kind, under the interpreter, against the reference: each
operation, a whole block, tokens of several lanes in one tile; and what stays as it was where nobody has one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")
import triton_fp8
import triton_interpreter

from sfumato.ops import reference
from sfumato.ops.contract import Matrix
from sfumato.ops.lowrank import NO_LANE, NOBODY, LanePair, Lanes, LaneSwitch, LowRank
from sfumato.ops.packed import Packed
from sfumato.ops.triton import experts, forms, linear, route, tuning
from sfumato.ops.triton.launches import noted
from sfumato.quant import formats

if triton_interpreter.IS_ON:
    triton_fp8.put_right()

KINDS = ["", "fp8", "int4-asym"]
"""x lies plain, quantised, in its four classes: nothing else of a kind is met by factors."""
RARE = [pytest.param(kind, torch.bfloat16, marks=pytest.mark.slow) for kind in ("int8", "int4", "nvfp4")]
SMALL = {"BLOCK_N": 32, "BLOCK_M": 16, "BLOCK_K": 32}
TOKENS = 22
ROWS = [LanePair(0, 2), LanePair(), LanePair(1, NO_LANE), LanePair(2, 0)]
"""Of four rows that encode two tokens each before a canvas of three or four: a tile has tokens of every lane."""
LANES = 3


@pytest.fixture(autouse=triton_interpreter.IS_ON)
def small() -> Iterator[None]:
    """Small tiles, of which small shapes have several; every sum that may be split is."""
    with (
        tuning.using("linear", **SMALL),
        tuning.using("gate_up", **SMALL),
        tuning.using("experts_gate_up", BLOCK_N=64, BLOCK_M=16, BLOCK_K=64),
        tuning.using("experts_down", BLOCK_N=64, BLOCK_K=64),
        tuning.using("route", BLOCK_K=32, SPLITS=2),
        tuning.using("shrink", BLOCK_M=16, BLOCK_K=32, SPLITS=2),
        tuning.using("combine", BLOCK=64),
    ):
        yield


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def lanes(is_static: bool = False) -> Lanes:
    whole = Lanes.of(ROWS, 2, 4, "cpu")
    lane_N = whole.lane_N[:TOKENS]
    runs = tuple(run._replace(size=min(run.size, TOKENS - run.first)) for run in whole.runs if run.first < TOKENS)
    return Lanes((), lane_N, is_static=True) if is_static else Lanes(runs, lane_N)


def beside(base: Matrix, switch: LaneSwitch, dtype: torch.dtype, rank: int = 5, seed: int = 50) -> LowRank:
    *stack, outputs, inputs = base.shape
    a = normal(LANES, *stack, rank, inputs, seed=seed, scale=inputs**-0.5)
    b = normal(LANES, *stack, rank, outputs, seed=seed + 1, scale=0.5)
    return LowRank(base, a.to(dtype), b.to(dtype), switch)


def packed(weight: Tensor, kind: str) -> Tensor | Packed:
    return forms.pack(formats.pack(weight, kind) if kind else weight)


def plain(weight: LowRank, dtype: torch.dtype = torch.float32) -> LowRank:
    """The same in plain numbers of this dtype."""
    base = weight.base.dense(dtype) if isinstance(weight.base, Packed) else weight.base
    assert isinstance(base, Tensor)
    return LowRank(base.to(dtype), weight.a.to(dtype), weight.b.to(dtype), weight.switch, weight.scale)


def met(x: Tensor, kind: str) -> Tensor:
    """x in float32 as weights of this kind meet it."""
    return triton_fp8.rows(x) if kind.startswith("fp8") else x.float()


def product(x: Tensor, weight: LowRank, kind: str, token_M: Tensor | None = None) -> Tensor:
    """In float32, where FP8 rounds what the base meets and not what the factors meet."""
    whole = plain(weight)
    assert isinstance(whole.base, Tensor)
    out = F.linear(met(x, kind), whole.base)
    zero = LowRank(torch.zeros_like(whole.base), whole.a, whole.b, whole.switch, whole.scale)
    return out + reference._product(x.float(), zero, token_M)


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("kind", "dtype"), [("", torch.float32), *[(k, torch.bfloat16) for k in KINDS], *RARE], ids=str
)
def test_linear(kind: str, dtype: torch.dtype) -> None:
    """Of three products in one launch two are adapted; and one alone, with a scale of its own."""
    x, switch = normal(TOKENS, 96).to(dtype), LaneSwitch()
    q, k, v = (packed(normal(n, 96, seed=n, scale=0.1).to(dtype), kind) for n in (40, 17, 32))
    first, last = forms.pack(beside(q, switch, dtype)), forms.pack(beside(v, switch, dtype, seed=60))
    assert isinstance(first, LowRank) and isinstance(last, LowRank)
    without = linear.linear(x, q, k, v)
    switch.lanes = lanes()
    outs = linear.linear(x, first, k, last)
    least = 1e-6 if dtype == torch.float32 else 4e-3
    assert torch.equal(outs[1], without[1])
    for weight, out, old in ((first, outs[0], without[0]), (last, outs[2], without[2])):
        exact = product(x, weight, kind)
        assert out.dtype == dtype and relative(out, exact) <= least
        has_none = switch.lanes.lane_N < 0
        assert torch.equal(out[has_none], old[has_none]) and relative(out, old.float()) > 0.1
    scaled = LowRank(first.base, first.a, first.b, switch, 0.5)
    assert relative(linear.linear(x, scaled)[0], product(x, scaled, kind)) <= least


@pytest.mark.parametrize("rank", [16, 100])
def test_any_rank(rank: int) -> None:
    x, switch = normal(TOKENS, 96), LaneSwitch()
    weight = beside(normal(40, 96, seed=1, scale=0.1), switch, torch.float32, rank)
    switch.lanes = lanes()
    assert relative(linear.linear(x, weight)[0], reference.linear(x, weight)[0]) < 1e-6


@pytest.mark.parametrize(("kind", "which"), [("", "all"), ("fp8", "up"), ("int4-asym", "all")])
def test_feed_forward(kind: str, which: str) -> None:
    x, switch, dtype = normal(TOKENS, 96).bfloat16(), LaneSwitch(), torch.bfloat16
    sizes = {"gate": (64, 96), "up": (64, 96), "down": (32, 64)}
    weights: dict[str, Any] = {}
    for seed, (name, shape) in enumerate(sizes.items(), 1):
        weights[name] = beside(packed(normal(*shape, seed=seed, scale=0.1).to(dtype), kind), switch, dtype, seed=seed)
        if which not in ("all", name):
            weights[name].b.zero_()
    switch.lanes = lanes()
    hidden = reference.gated(product(x, weights["gate"], kind), product(x, weights["up"], kind)).to(dtype)
    exact = product(hidden, weights["down"], kind)
    out = linear.feed_forward(x, *(w if which in ("all", n) else w.base for n, w in weights.items()))
    assert relative(out, exact) <= (0.02 if kind == "fp8" else 6e-3)


def routed(count: int, choices: int) -> tuple[Tensor, Tensor]:
    return normal(TOKENS, count, seed=7).topk(choices).indices, normal(TOKENS, choices, seed=8).softmax(-1)


@pytest.mark.parametrize("kind", [pytest.param("", marks=pytest.mark.slow), "fp8", "int4-asym"])
def test_experts(kind: str) -> None:
    count, width, hidden, dtype, switch = 4, 64, 48, torch.bfloat16, LaneSwitch()
    x, (index, weight) = normal(TOKENS, width).to(dtype), routed(count, 2)
    gate_up = beside(packed(normal(count, 2 * hidden, width, seed=1, scale=0.2).to(dtype), kind), switch, dtype)
    down = beside(packed(normal(count, width, hidden, seed=2, scale=0.2).to(dtype), kind), switch, dtype, seed=70)
    switch.lanes = lanes()
    exact = torch.zeros(TOKENS, width)
    for expert in range(count):
        token, choice = torch.where(index == expert)
        gate, up = product(x[token], gate_up[expert], kind, token).chunk(2, dim=-1)
        part = product(reference.gated(gate, up).to(dtype), down[expert], kind, token)
        exact = exact.index_add(0, token, part * weight[token, choice, None])
    out = experts.experts(x, index, weight, gate_up, down)
    assert relative(out, exact) <= (0.02 if kind == "fp8" else 6e-3)
    assert relative(experts.experts(x, index, weight, gate_up, down.base), exact) > 0.1


def test_route() -> None:
    count, width, switch = 6, 96, LaneSwitch()
    x, scale = normal(TOKENS, width, seed=3), 1 + normal(width, seed=4, scale=0.2)
    proj = beside(normal(count, width, seed=5), switch, torch.float32)
    per_expert = 1 + normal(count, seed=6, scale=0.2)
    without = route.route(x, scale, proj, per_expert, 2, 1e-6)
    switch.lanes = lanes()
    for splits in (1, 2):
        with tuning.using("route", SPLITS=splits):
            index, weight = route.route(x, scale, proj, per_expert, 2, 1e-6)
        exact_index, exact = reference.route(x, scale, proj, per_expert, 2, 1e-6)
        assert torch.equal(index, exact_index) and (weight - exact).abs().max() < 1e-5
    has_none = switch.lanes.lane_N < 0
    assert torch.equal(index[has_none], without[0][has_none]) and not torch.equal(index, without[0])


@pytest.mark.parametrize("kind", ["", pytest.param("int4", marks=pytest.mark.slow)])
def test_no_number_of_another_adapter_reaches_a_token(kind: str) -> None:
    """And its sums are those that it has alone, to the bit."""
    x, switch, dtype = normal(TOKENS, 96).bfloat16(), LaneSwitch(), torch.bfloat16
    gate, up = (
        beside(packed(normal(40, 96, seed=s, scale=0.1).to(dtype), kind), switch, dtype, seed=s) for s in (1, 2)
    )
    down = beside(packed(normal(24, 40, seed=3, scale=0.1).to(dtype), kind), switch, dtype, seed=3)
    switch.lanes = lanes()
    lane_N = switch.lanes.lane_N
    sound = linear.feed_forward(x, gate, up, down)
    for part in (gate.a, up.b, down.a):
        part[1] = float("nan")
    ill = linear.feed_forward(x, gate, up, down)
    assert torch.equal(ill[lane_N != 1], sound[lane_N != 1]) and ill[lane_N == 1].isnan().all()
    for n in (0, 7, 21):
        switch.lanes = Lanes((), lane_N[n : n + 1], is_static=True)
        assert torch.equal(linear.feed_forward(x[n : n + 1], gate, up, down), sound[n : n + 1])


def test_lanes_that_only_the_device_knows() -> None:
    x, switch = normal(TOKENS, 96), LaneSwitch()
    weight = beside(normal(40, 96, seed=1, scale=0.1), switch, torch.float32)
    switch.lanes = lanes()
    (expected,) = linear.linear(x, weight)
    switch.lanes = lanes(is_static=True)
    assert torch.equal(linear.linear(x, weight)[0], expected)
    assert relative(reference.linear(x, weight)[0], expected) < 1e-6


def test_where_nobody_has_one_all_is_as_it_was() -> None:
    x, switch = normal(TOKENS, 96), LaneSwitch()
    weight = beside(normal(40, 96, seed=1), switch, torch.float32)
    launches: list[Any] = []
    for each in (weight.base, weight):
        with noted(launches.append, runs=True):
            linear.linear(x, each)
    first, second = launches
    assert switch.lanes is NOBODY and (first.name, first.grid, first.sizes) == (
        second.name, second.grid, second.sizes,
    )  # fmt: skip


def test_packing_leaves_factors_where_they_are() -> None:
    weight = beside(formats.pack(normal(32, 64), "int4"), LaneSwitch(), torch.float32)
    once = forms.pack(weight)
    assert isinstance(once, LowRank) and isinstance(once.base, Packed)
    twice = forms.pack(once)
    assert isinstance(twice, LowRank)
    assert twice.a is once.a is weight.a and twice.b is weight.b and twice.switch is weight.switch


def test_lanes_of_another_pass_are_refused() -> None:
    switch = LaneSwitch()
    weight = beside(normal(32, 64), switch, torch.float32)
    switch.lanes = lanes()
    with pytest.raises(ValueError, match=f"x has 5 tokens, and lanes were given for {TOKENS}"):
        linear.linear(normal(5, 64), weight)


triton_interpreter.in_a_child(globals())
