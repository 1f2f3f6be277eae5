"""ops/triton/experts.py and route.py: under Triton's interpreter, against the reference; and compiled ahead of time."""

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
from sfumato.ops.packed import Packed
from sfumato.ops.triton import ahead, experts, forms, route, tuning
from sfumato.quant import formats

if triton_interpreter.IS_ON:
    triton_fp8.put_right()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["", "int8", "fp8", "int4", "int4-asym", "nvfp4"]
EPS = 1e-6


@pytest.fixture(autouse=triton_interpreter.IS_ON)
def small() -> Iterator[None]:
    """Small tiles, of which small shapes have several; not for what is compiled."""
    with (
        tuning.using("experts_gate_up", BLOCK_N=64, BLOCK_M=16, BLOCK_K=64),
        tuning.using("experts_down", BLOCK_N=64, BLOCK_K=64),
        tuning.using("experts_gate_up_128", BLOCK_N=64, BLOCK_K=128),
        tuning.using("route", BLOCK_K=64, SPLITS=2),
        tuning.using("listed", BLOCK=32),
        tuning.using("combine", BLOCK=64),
    ):
        yield


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def packed(weight: Tensor, kind: str) -> Tensor | Packed:
    return forms.pack(formats.pack(weight, kind) if kind else weight)


def whole(weight: Tensor | Packed) -> Tensor:
    return weight.dense() if isinstance(weight, Packed) else weight.float()


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.float() - exact).norm() / exact.norm())


def routed(tokens: int, count: int, choices: int, how: str) -> tuple[Tensor, Tensor]:
    """(index, weight): every token to `choices` different experts."""
    score = normal(tokens, count, seed=7)
    if how == "one":  # the same experts for all, so that the others get nothing
        score = score[:1].expand(tokens, count)
    elif how == "few":
        score = torch.where(torch.arange(count) < choices + 1, score, -torch.inf)
    return score.topk(choices).indices, normal(tokens, choices, seed=8).softmax(-1)


def plain_fp8(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The reference with activations in FP8 before each product, and float32 sums."""
    out = torch.zeros(x.shape)
    for n, j in ((n, j) for n in range(len(x)) for j in range(index.shape[1])):
        e = int(index[n, j])
        gate, up = F.linear(triton_fp8.rows(x[n : n + 1]), gate_up[e]).chunk(2, -1)
        hidden = triton_fp8.rows(reference.gated(gate, up).to(x.dtype))
        out[n] += (F.linear(hidden, down[e]) * weight[n, j])[0]
    return out.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "count", "choices", "how"),
    [
        (17, 4, 2, "all"),
        pytest.param(1, 8, 3, "all", marks=pytest.mark.slow),
        pytest.param(20, 4, 1, "one", marks=pytest.mark.slow),
        (6, 7, 2, "few"),
    ],
)
def test_experts(kind: str, dtype: torch.dtype, tokens: int, count: int, choices: int, how: str) -> None:
    width, hidden = 96, 48 if kind == "nvfp4" else 40
    x, (index, weight) = normal(tokens, width).to(dtype), routed(tokens, count, choices, how)
    gate_up = packed(normal(count, 2 * hidden, width, seed=1, scale=0.2).to(dtype), kind)
    down = packed(normal(count, width, hidden, seed=2, scale=0.2).to(dtype), kind)
    out = experts.experts(x, index, weight, gate_up, down)
    exact = reference.experts(x.float(), index, weight, whole(gate_up), whole(down))
    if kind == "fp8":
        plain = plain_fp8(x, index, weight, whole(gate_up), whole(down))
    else:
        plain = reference.experts(x, index, weight, whole(gate_up).to(dtype), whole(down).to(dtype))
    assert out.dtype == dtype and out.shape == x.shape
    assert relative(out, exact) <= max(2 * relative(plain, exact), 1e-6)
    if kind == "fp8":
        assert relative(out, plain.float()) < 0.02


def test_a_token_does_not_depend_on_the_others() -> None:
    x, (index, weight) = normal(17, 64).bfloat16(), routed(17, 4, 2, "all")
    for kind in KINDS:
        gate_up = packed(normal(4, 64, 64, seed=1, scale=0.2).bfloat16(), kind)
        down = packed(normal(4, 64, 32, seed=2, scale=0.2).bfloat16(), kind)
        many = experts.experts(x, index, weight, gate_up, down)
        for n in (0, 16):
            one = slice(n, n + 1)
            assert torch.equal(experts.experts(x[one], index[one], weight[one], gate_up, down), many[one])


def test_products_of_different_kinds() -> None:
    x, (index, weight) = normal(9, 64), routed(9, 4, 2, "all")
    gate_up, down = normal(4, 48, 64, seed=1, scale=0.2), normal(4, 64, 24, seed=2, scale=0.2)
    for one, two in (("int4", ""), ("", "int4"), ("int8", "int4-asym")):
        first, last = packed(gate_up, one), packed(down, two)
        exact = reference.experts(x, index, weight, whole(first), whole(last))
        assert relative(experts.experts(x, index, weight, first, last), exact) < 1e-6


@pytest.mark.parametrize("hidden", [128, 96])
def test_fp8_by_blocks(hidden: int) -> None:
    """Of 96, as of the release's 704, the seam between gate and up lies within a block; so do the inputs' end."""
    x, (index, weight) = normal(5, 128), routed(5, 3, 2, "all")
    gate_up = packed(normal(3, 2 * hidden, 128, seed=1, scale=0.2), "fp8-block")
    down = packed(normal(3, 128, hidden, seed=2, scale=0.2), "fp8-block")
    plain = plain_fp8(x, index, weight, whole(gate_up), whole(down))
    assert relative(experts.experts(x, index, weight, gate_up, down), plain) < 0.01


def test_no_token() -> None:
    out = experts.experts(
        normal(0, 64), torch.empty(0, 2, dtype=torch.long), normal(0, 2), normal(4, 48, 64), normal(4, 64, 24)
    )
    assert out.shape == (0, 64)


@pytest.mark.parametrize(
    ("tokens", "count", "choices", "how"),
    [
        (256, 128, 8, "all"),
        (1, 128, 8, "all"),
        (64, 16, 1, "one"),
        (33, 5, 2, "few"),
        (17, 1, 1, "all"),
        (6, 6, 6, "all"),
    ],
)
def test_listed(tokens: int, count: int, choices: int, how: str) -> None:
    index, _ = routed(tokens, count, choices, how)
    check_lists(index, *experts.listed(index, count))


def check_lists(index: Tensor, count_E: Tensor, list_EN: Tensor) -> None:
    assert torch.equal(count_E.long(), index.flatten().bincount(minlength=len(count_E)))
    for e, each in enumerate(count_E.tolist()):
        assert torch.equal(list_EN[e, :each].long().sort().values, torch.where(index.flatten() == e)[0])


@pytest.mark.parametrize(("tokens", "width", "count", "choices"), [(19, 200, 6, 2), (33, 96, 128, 8), (5, 40, 3, 3)])
def test_route_writes_the_lists(tokens: int, width: int, count: int, choices: int) -> None:
    residual, scale, proj = normal(tokens, width), normal(width, seed=1), normal(count, width, seed=2)
    index, weight = route.route(residual, scale, proj, torch.ones(count), choices, EPS)
    root, zeros = (residual.square().mean(-1) + EPS).rsqrt(), torch.zeros(route.zeros_for(tokens, count)).int()
    router = route.RouterWeights(scale, proj, torch.ones(count))
    *lists, same = route.listed(residual, root, router, choices, zeros)
    check_lists(index, *lists)
    assert torch.allclose(same, weight, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "width", "count", "choices"), [(1, 64, 128, 8), (19, 200, 6, 2), (33, 96, 128, 8), (5, 40, 3, 3)]
)
def test_route(tokens: int, width: int, count: int, choices: int, dtype: torch.dtype) -> None:
    residual, scale = normal(tokens, width, scale=3).to(dtype), (1 + normal(width, seed=1, scale=0.1)).to(dtype)
    proj, each = normal(count, width, seed=2).to(dtype), normal(count, seed=3).abs().to(dtype)
    index, weight = route.route(residual, scale, proj, each, choices, EPS)
    assert index.dtype == torch.int64 and weight.dtype == torch.float32
    # The logits of the reference are rounded once more, which may swap neighbours; an exact one says how far off.
    x = (reference.rms_norm(residual, None, EPS) * scale * width**-0.5).float()
    p = torch.softmax(F.linear(x, proj.float()), -1)
    top = p.topk(choices).values
    assert torch.allclose(p.gather(1, index), top, rtol=1e-4)
    assert (index.sort(-1).values.diff(dim=-1) > 0).all()
    expected = p.gather(1, index)
    expected = expected / expected.sum(-1, keepdim=True) * each.float()[index]
    assert torch.allclose(weight, expected, rtol=1e-4)
    if dtype == torch.float32:
        other_index, other_weight = reference.route(residual, scale, proj, each, choices, EPS)
        assert torch.equal(index, other_index) and torch.allclose(weight, other_weight, rtol=1e-4)


def test_route_is_as_exact_as_the_reference() -> None:
    dtype, tokens, width, count = torch.bfloat16, 64, 256, 16
    residual, scale, proj = (
        normal(tokens, width).to(dtype),
        torch.ones(width).to(dtype),
        normal(count, width, seed=2).to(dtype),
    )
    each = torch.ones(count).to(dtype)
    exact_index, exact = reference.route(residual.float(), scale.float(), proj.float(), each.float(), count, EPS)
    errors = []
    for run in (route.route, reference.route):
        index, weight = run(residual, scale, proj, each, count, EPS)
        by_expert = torch.zeros(tokens, count).scatter(1, index, weight.float())
        errors.append(relative(by_expert, torch.zeros(tokens, count).scatter(1, exact_index, exact)))
    assert errors[0] <= 2 * errors[1]


def test_route_of_equals_takes_the_lowest_index() -> None:
    proj = torch.ones(12, 32)
    proj[5] = 2
    index, weight = route.route(torch.ones(3, 32), torch.ones(32), proj, torch.ones(12), 4, EPS)
    assert index.tolist() == [[5, 0, 1, 2]] * 3
    assert torch.allclose(weight.sum(-1), torch.ones(3))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under the interpreter
def test_route_of_what_is_no_number_stays_in_bounds() -> None:
    residual = normal(3, 32)
    residual[1] = torch.nan
    index, weight = route.route(residual, torch.ones(32), normal(6, 32), torch.ones(6), 2, EPS)
    assert ((index >= 0) & (index < 6)).all()
    assert index[1, 0] != index[1, 1]  # an expert's list has room for each token once
    assert weight[1].isnan().all() and weight[[0, 2]].isfinite().all()


def test_route_of_a_token_does_not_depend_on_the_others() -> None:
    residual, proj = normal(37, 96).bfloat16(), normal(20, 96, seed=1).bfloat16()
    rest = (torch.ones(96).bfloat16(), proj, torch.ones(20).bfloat16(), 4, EPS)
    index, weight = route.route(residual, *rest)
    for n in (0, 16, 36):
        alone = route.route(residual[n : n + 1], *rest)
        assert torch.equal(alone[0][0], index[n]) and torch.equal(alone[1][0], weight[n])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_height_of_a_tile_changes_no_number(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Higher tiles are for more rows; whoever stands in one of them gets the same bits as in a low one."""
    x, gate_up, down = normal(37, 128).to(dtype), normal(4, 128, 128, seed=1, scale=0.2), normal(4, 128, 64, seed=2)
    index, weight = routed(37, 4, 2, "random")
    stacks = packed(gate_up.to(dtype), kind), packed(down.to(dtype), kind)
    low, tiles = experts.experts(x, index, weight, *stacks), []
    cut = experts._tiles

    def recorded(*arguments: Any) -> Any:
        tiles.append(cut(*arguments)[0])
        return cut(*arguments)

    monkeypatch.setattr(experts, "_tiles", recorded)
    for name in ("_64", "_128"):
        monkeypatch.setattr(experts, "TALL", ((0, name),))
        assert torch.equal(experts.experts(x, index, weight, *stacks), low)
    assert [one["BLOCK_M"] for one in tiles] == [64, 64, 128, 128]
    assert {one["BLOCK_K"] for one in tiles} == {64}  # else sums would differ, if not always in these few numbers


@pytest.mark.skipif(triton_interpreter.IS_ON, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", [89])  # with the least memory; all of them are `test_triton_ahead`'s
def test_ahead(arch: int) -> None:
    for special in experts.ahead(arch) + route.ahead(arch):
        row = ahead.compile_one(special, arch)
        assert row["spills"] <= 32 and row["registers"] >= 10, special.name
        assert row["shared"] <= tuning.SHARED_KIB[arch] * 1024, special.name


_compiled = test_ahead  # here, not in the child: the interpreter replaces what would be compiled
triton_interpreter.in_a_child(globals())
test_ahead = _compiled
