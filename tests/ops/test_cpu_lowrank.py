"""ops/cpu/lowrank.h: low-rank factors beside weights of every form: each operation against the reference in float64,
by every way of multiplying tiles; rows of several adapters in one pass, each as alone; and whole models.

A product may be no less exact than that without factors, beyond what plain PyTorch makes of them in the same dtype.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sfumato import ops
from sfumato.errors import InputError
from sfumato.model.adapters import Adapter, Adapters, Factors, new_adapter, targeted
from sfumato.model.cache import KVCache
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model, products, replace_
from sfumato.ops import cpu, fused, reference
from sfumato.ops.contract import Matrix
from sfumato.ops.cpu import build, weights
from sfumato.ops.lowrank import NO_LANE, LanePair, Lanes, LaneSwitch, LowRank
from sfumato.quant import formats

pytestmark = pytest.mark.skipif(build.obstacle() is not None, reason=f"the library cannot be built: {build.obstacle()}")

DTYPES = (torch.float32, torch.bfloat16)
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
FORMS = ("", "int8", "int4", "int4-g32-asym", "fp8", "nvfp4")
STACK = 3
"""Lanes beside each weight here."""


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def switch_of(*lanes: int) -> LaneSwitch:
    """Each token's lane."""
    switch = LaneSwitch()
    switch.lanes = Lanes.of([LanePair(NO_LANE, lane) for lane in lanes], 0, 1, "cpu")
    return switch


def by_fives(tokens: int) -> LaneSwitch:
    """Runs of 5, 10, 15 … tokens: of each lane, none, and the first again."""
    lanes: list[int] = []
    while len(lanes) < tokens:
        lanes += [(2, NO_LANE, 0, 1)[len(lanes) // 5 % 4]] * (5 + len(lanes) // 4)
    return switch_of(*lanes[:tokens])


def beside(base: Matrix, switch: LaneSwitch, rank: int = 5, seed: int = 0) -> LowRank:
    """The weight with random factors, whose product is about as large as the weight's is."""
    *stack, outputs, inputs = base.shape
    dtype = base.dtype if isinstance(base, Tensor) else torch.bfloat16
    a = random(STACK, *stack, rank, inputs, seed=seed + 1, dtype=dtype, scale=inputs**-0.5)
    return LowRank(base, a, random(STACK, *stack, rank, outputs, seed=seed + 2, dtype=dtype, scale=0.5), switch, 1.5)


def double(weight: Matrix) -> Any:
    return weight.double() if isinstance(weight, Tensor) else weight.each(lambda part: part.double())


def check_close(result: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    """As in the tests of the operations without factors."""
    assert result.shape == exact.shape and result.isfinite().all()
    error, own = ((one.double() - exact).abs().max() for one in (result, plain))
    assert error <= 2 * own + 4 * EPS[dtype] * exact.abs().max(), f"error {error:.3g}, plain {own:.3g}"


# ---- operations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, inputs, rank", [(1, 1, 1), (5, 24, 16), (33, 97, 5), (600, 70, 33)])
def test_linear(way: str, dtype: torch.dtype, rows: int, inputs: int, rank: int) -> None:
    switch, x = by_fives(rows), random(rows, inputs, dtype=dtype)
    plain_ones: list[Tensor] = [random(n, inputs, seed=n, dtype=dtype, scale=inputs**-0.5) for n in (1, 33, 64)]
    every: list[Matrix] = [beside(plain_ones[0], switch, rank), plain_ones[1], beside(plain_ones[2], switch, rank + 1)]
    result = cpu.linear(x, *(cpu.pack(weight) for weight in every))
    exact, plain = reference.linear(x.double(), *map(double, every)), fused.linear(x, *every)
    for one, two, three in zip(result, exact, plain, strict=True):
        check_close(one, two, three, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width, inner", [(1, 24, 20), (40, 64, 96), (530, 33, 70)])
def test_feed_forward(way: str, dtype: torch.dtype, rows: int, width: int, inner: int) -> None:
    switch, x = by_fives(rows), random(rows, width, dtype=dtype)
    shapes = ((inner, width), (inner, width), (width, inner))
    three = [beside(random(*s, seed=n, dtype=dtype, scale=s[1] ** -0.5), switch, seed=n) for n, s in enumerate(shapes)]
    exact = reference.feed_forward(x.double(), *map(double, three))
    check_close(cpu.feed_forward(x, *map(cpu.pack, three)), exact, fused.feed_forward(x, *three), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "count, tokens, width, inner, chosen", [(1, 1, 24, 8, 1), (5, 600, 64, 32, 2), (8, 130, 72, 36, 4)]
)
def test_experts(way: str, dtype: torch.dtype, count: int, tokens: int, width: int, inner: int, chosen: int) -> None:
    """One expert for all, so that a unit of rows begins within a lane; factors beside both stacks, or one of them."""
    switch, x = by_fives(tokens), random(tokens, width, dtype=dtype)
    gate_up = random(count, 2 * inner, width, seed=1, dtype=dtype, scale=width**-0.5)
    down = random(count, width, inner, seed=2, dtype=dtype, scale=inner**-0.5)
    index = torch.stack([(torch.arange(chosen) + n % 2 * n) % count for n in range(tokens)])
    share = random(tokens, chosen, seed=3).abs()
    for one, two in (
        (beside(gate_up, switch), beside(down, switch, 6, 7)), (gate_up, beside(down, switch)),
        (beside(gate_up, switch), down),
    ):  # fmt: skip
        result = cpu.experts(x, index, share, cpu.pack(one), cpu.pack(two))
        exact = reference.experts(x.double(), index, share.double(), double(one), double(two))
        check_close(result, exact, fused.experts(x, index, share, one, two), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [4, 37, 128])
def test_route(way: str, dtype: torch.dtype, count: int) -> None:
    """The experts that the sum of both products says, but where bfloat16 logits tie."""
    x, scale, per = random(61, 96, dtype=dtype), 1 + random(96, dtype=dtype, scale=0.2), torch.ones(count, dtype=dtype)
    proj = beside(random(count, 96, dtype=dtype), by_fives(61))
    index, weight = cpu.route(x, scale, proj, per, 4, 1e-6)
    want_index, want = reference.route(x, scale, proj, per, 4, 1e-6)
    is_same = (index.sort(-1).values == want_index.sort(-1).values).all(-1)
    assert is_same.float().mean() > (0.99 if dtype == torch.float32 else 0.85)
    if dtype == torch.float32:
        assert torch.allclose(weight[is_same], want[is_same], atol=1e-5)
    plain = cpu.route(x, scale, proj.base, per, 4, 1e-6)
    is_free = proj.switch.lanes.lane_N == NO_LANE
    assert all(torch.equal(one[is_free], two[is_free]) for one, two in zip((index, weight), plain, strict=True))
    assert count == 4 or not torch.equal(index, plain[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_bases_of_every_form(way: str, form: str, dtype: torch.dtype) -> None:
    """What the base gives alone, and the product of the factors with x as it is, whatever the base rounds of x."""
    switch, x = by_fives(75), random(75, 256, dtype=dtype)

    def in_form(*shape: int) -> LowRank:
        plain = random(*shape, dtype=dtype, scale=shape[-1] ** -0.5)
        base: Matrix = formats.pack(plain, form) if form else plain
        return replace(beside(plain, switch, 16), base=base)

    one, stack, down = in_form(70, 256), in_form(4, 128, 256), in_form(4, 256, 64)
    packed = cpu.pack(one)
    alone = cpu.linear(x, packed.base)[0].double()
    zeros = LowRank(torch.zeros(70, 256), one.a, one.b, switch, one.scale)
    delta = reference.linear(x.double(), double(zeros))[0]
    assert delta.norm() > 0.3 * alone.norm()
    assert (cpu.linear(x, packed)[0] - alone - delta).abs().max() <= 3 * EPS[dtype] * (alone + delta).abs().max()
    index, share = torch.arange(150).reshape(75, 2) % 4, torch.full((75, 2), 0.5)
    exact = reference.experts(x, index, share, stack, down)
    result = cpu.experts(x, index, share, cpu.pack(stack), cpu.pack(down))
    assert (result - exact).norm() < 0.03 * exact.norm()


# ---- lanes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["", "int4"])
def test_a_rows_answer_depends_neither_on_its_batch_nor_on_threads(way: str, form: str) -> None:
    tokens, dtype = 90, torch.bfloat16
    switch, x = by_fives(tokens), random(tokens, 128, dtype=dtype)
    lanes = switch.lanes.lane_N.tolist()

    def packed(*shape: int) -> LowRank:
        plain = random(*shape, dtype=dtype, scale=shape[-1] ** -0.5)
        return cpu.pack(replace(beside(plain, switch), base=formats.pack(plain, form) if form else plain))

    one, gate, up, down = packed(70, 128), packed(96, 128), packed(96, 128), packed(128, 96)
    stacks, proj = (packed(4, 192, 128), packed(4, 128, 96)), beside(random(4, 128, dtype=dtype), switch)
    norm, per = torch.ones(128, dtype=dtype), torch.ones(4, dtype=dtype)

    def results(x: Tensor) -> list[Tensor]:
        routed = cpu.route(x, norm, proj, per, 2, 1e-6)
        return [cpu.linear(x, one)[0], cpu.feed_forward(x, gate, up, down), cpu.experts(x, *routed, *stacks)]

    whole, before = results(x), torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(before, 2))
        assert all(map(torch.equal, results(x), whole))
    finally:
        torch.set_num_threads(before)
    for n in range(0, tokens, 3):
        switch.lanes = switch_of(lanes[n]).lanes
        assert all(torch.equal(part, want[n : n + 1]) for part, want in zip(results(x[n : n + 1]), whole, strict=True))


def test_without_a_lane_it_is_the_weight_alone() -> None:
    """The very argument of the base: nothing of the factors is looked at, and nothing of them is read."""
    x, switch = random(9, 64), LaneSwitch()
    weight = beside(cpu.pack(random(40, 64)), switch)
    weight = replace(weight, a=weight.a.float() * torch.nan, b=weight.b.float())
    assert weights.operand(weight, x.dtype) is weights.operand(weight.base, x.dtype)
    assert torch.equal(cpu.linear(x, weight)[0], cpu.linear(x, weight.base)[0])
    switch.lanes = switch_of(*[NO_LANE] * 9).lanes
    assert torch.equal(cpu.linear(x, weight)[0], cpu.linear(x, weight.base)[0])


@pytest.mark.parametrize("rank", [0, 1, 3, 4, 5])
def test_a_lane_of_a_lower_rank_is_read_no_further(rank: int) -> None:
    """An adapter beside one of a higher rank, or without factors here: zeros stand behind its own."""
    x, switch = random(9, 70), switch_of(*[1] * 9)
    weight = cpu.pack(beside(random(40, 70), switch))
    weight.a[1, rank:] = 0
    alone = (
        cpu.pack(LowRank(weight.base, weight.a[:, :rank], weight.b[:, :rank], switch, weight.scale)) if rank else None
    )
    weight.b[1, rank:] = torch.nan
    want = cpu.linear(x, weight.base if alone is None else alone)[0]
    assert torch.equal(cpu.linear(x, weight)[0], want)


def test_a_lane_that_is_not_finite_stays_in_its_rows(way: str) -> None:
    switch, x = switch_of(*[0] * 7, *[1] * 7), random(14, 64)
    weight = cpu.pack(beside(random(40, 64), switch))
    want = cpu.linear(x, weight)[0]
    weight.b[1] = torch.inf
    result = cpu.linear(x, weight)[0]
    assert torch.equal(result[:7], want[:7]) and not result[7:].isfinite().any()


def test_packing_leaves_the_factors_where_they_are() -> None:
    """Lanes are filled in place: what is written there later is what the next product reads."""
    weight = beside(random(40, 64), switch_of(0, 0, 0))
    packed = cpu.pack(weight)
    assert packed.a is weight.a and packed.b is weight.b and cpu.pack(packed) is packed
    x = random(3, 64)
    cpu.linear(x, packed)
    weight.b[0] = 0
    assert torch.equal(cpu.linear(x, packed)[0], cpu.linear(x, packed.base)[0])
    gaps = replace(weight, a=torch.stack([weight.a, weight.a], -1)[..., 0])
    assert not gaps.a.is_contiguous() and cpu.pack(gaps).a.is_contiguous()


def test_what_does_not_fit_is_said() -> None:
    x, switch = random(5, 64), switch_of(0, 0, 0, 1, 1)
    weight = beside(random(40, 64), switch)
    packed = cpu.pack(weight)
    for lanes, tokens in ((switch_of(0, 0, 0, 3, 3), 5), (switch_of(0, 0, 0), 5), (switch_of(*[0] * 9), 5)):
        switch.lanes = lanes.lanes
        with pytest.raises(InputError, match="lanes of a pass are those of another number of tokens, or a lane is out"):
            cpu.linear(x[:tokens], packed)
    switch.lanes = switch_of(*[0] * 5).lanes
    with pytest.raises(InputError, match=r"factors \[3, 5, 64\] and \[3, 4, 40\] lie beside a weight \[40, 64\]"):
        cpu.pack(replace(weight, b=weight.b[:, :4]))
    with pytest.raises(InputError, match=r"factors in float32 or bfloat16, not torch.float16"):
        cpu.pack(weight.each(lambda part: part.half() if part.dim() == 3 else part))
    with pytest.raises(InputError, match=r"are torch.float32, and what meets them torch.bfloat16"):
        cpu.linear(x.bfloat16(), packed)
    with pytest.raises(InputError, match=r"x has 32 inputs"):
        cpu.linear(x[:, :32], packed)
    with pytest.raises(InputError, match=r"packed; call Model.pack_ first"):
        cpu.linear(x, weight)
    with pytest.raises(InputError, match="int9"):
        cpu.pack(replace(weight, base=replace(formats.pack(random(40, 64), "int8"), kind="int9")))


# ---- whole models ----------------------------------------------------------------------------------------------------


def random_adapter(model: Model, seed: int, rank: int = 4) -> Adapter:
    """Factors beside everything, of both passes, that change what the model says without drowning it."""

    def factors(own: int) -> dict[str, Factors]:
        fresh = new_adapter(model, rank, rank, tuple(targeted(model)), seed=own).factors
        return {
            name: one._replace(b=random(*one.b.shape, seed=own + n, scale=0.5))
            for n, (name, one) in enumerate(fresh.items())
        }

    return Adapter(factors(seed), factors(seed + 1000))


def hidden_of(model: Model, lanes: list[LanePair], rows: list[int]) -> list[Tensor]:
    """An encode pass, a pass of both, and a denoise pass, of these rows among all: each has a prompt of its own."""
    config, generator = model.config, torch.Generator().manual_seed(3)
    tokens_XT = torch.randint(config.vocab_size, (6, 9), generator=generator)
    canvas_XL = torch.randint(config.vocab_size, (6, config.canvas_length), generator=generator)
    soft_XLD = torch.randn(6, config.canvas_length, config.hidden_size, generator=generator).to(model.dtype)
    cache = KVCache.allocate(config, len(rows), 64, "cpu", model.dtype)
    cache.lanes[:] = [lanes[row] for row in rows]
    tokens, canvas = tokens_XT[rows], canvas_XL[rows]
    with torch.inference_mode():
        one = model.encode(tokens, cache)
        two = model.encode_and_denoise(tokens[:, :4], [4] * len(rows), canvas, cache)
        return [one, *two, model.denoise(canvas, cache, soft_XLD[rows])]


def model_of(name: str, layers: int, dtype: torch.dtype, form: str = "") -> Model:
    """A random model by its operations, all products in one form."""
    model = Model(replace(RELEASED, layers=RELEASED.layers[:layers]), ops.load(name))
    tiny.randomise_(model.named_parameters(), 0, 1.5, MIX)  # layer scalars stay one, or rounding becomes chaos
    model = model.to(dtype).requires_grad_(False).eval()
    for owner, leaf in list(products(model)) if form else []:
        replace_(owner, leaf, formats.pack(getattr(owner, leaf).detach(), form))
    return model.pack_()


MIX = 0.1
RELEASED: ModelConfig = replace(tiny.THIN, hidden_size=64, intermediate_size=96, expert_size=32, canvas_length=16)
"""As many layers, experts and chosen experts as the released model has."""


@pytest.mark.parametrize("layers", [6, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype, form", [(torch.float32, ""), (torch.bfloat16, ""), (torch.bfloat16, "int4-g32")])
def test_a_model_with_several_adapters(dtype: torch.dtype, form: str, layers: int) -> None:
    """Rows of two adapters and of none: as near to float32 as torch's own calls, and to the bit as alone."""
    rows = [*range(6)]
    every = dict[str, list[Tensor]]()
    for name in ("reference", "fused", "cpu"):
        model = model_of(name, layers, dtype, form)
        if name == "reference":
            model = model.float()
        bank = Adapters(model)
        one, two = (bank.load(str(n), random_adapter(model, n)) for n in range(2))
        lanes = [one, LanePair(), two, two, one, LanePair()]
        every[name] = hidden_of(model, lanes, rows)
    for exact, fused_one, result in zip(every["reference"], every["fused"], every["cpu"], strict=True):
        error, plain = ((x.float() - exact).norm() / exact.norm() for x in (result, fused_one))
        assert error < 2 * plain, (error, plain)
    for row in (0, 1, 3):
        for own, whole in zip(hidden_of(model, lanes, [row]), every["cpu"], strict=True):
            assert torch.equal(own[0], whole[row])
    for loaded in bank.names:
        bank.unload(loaded)
    for own, whole in zip(hidden_of(model, [LanePair()] * 6, rows), every["cpu"], strict=True):
        assert torch.equal(own[1], whole[1]) and torch.equal(own[5], whole[5])
        assert (own[0].float() - whole[0].float()).norm() > 0.1 * own[0].float().norm()


def test_small_layers_row_by_row_are_those_of_all_rows_at_once() -> None:
    """Where a thread takes a row through all of a layer, its lanes are that row's: with one thread nobody does."""
    before, every = torch.get_num_threads(), list[list[Tensor]]()
    model = tiny.tiny_model(name="cpu")
    bank = Adapters(model)
    one, two = (bank.load(str(n), random_adapter(model, n)) for n in range(2))
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            lanes = [one, LanePair(), two, two, one, LanePair(two.encode, one.denoise)]
            every.append(hidden_of(model, lanes, [*range(6)]))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *every))
