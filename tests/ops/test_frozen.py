"""ops/frozen.py, fused.py: gradients through packed weights and beside them, against float32; what is kept for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.ops import fused, reference
from sfumato.ops.contract import Matrix
from sfumato.ops.lowrank import NO_LANE, LanePair, Lanes, LaneSwitch, LowRank
from sfumato.ops.packed import Packed
from sfumato.quant.formats import FORMATS, pack

N, D, INNER, E, J = 40, 64, 32, 3, 2


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def rounded(x: Tensor, weight: Packed) -> Tensor:
    """What a format makes of x, with the gradient of x itself."""
    return x + (weight.round_input(x) - x).detach()


def product(x: Tensor, weight: Packed) -> Tensor:
    return F.linear(rounded(x, weight), weight.dense())


def gated(x: Tensor, gate_up: Packed, down: Packed) -> Tensor:
    gate, up = product(x, gate_up).chunk(2, dim=-1)
    return product(F.gelu(gate, approximate="tanh") * up, down)


def mixed(x: Tensor, index: Tensor, weight: Tensor, gate_up: Packed, down: Packed) -> Tensor:
    """The experts, each on all tokens."""
    every = torch.stack([gated(x, gate_up[e], down[e]) for e in range(E)], dim=1)
    return torch.einsum("nj,njd->nd", weight, every.gather(1, index[..., None].expand(-1, -1, D)))


def kept_bytes(run: Any) -> tuple[Tensor, int]:
    """What a call gives, and the bytes of all that autograd keeps of it, the inputs' own tensors included."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result: Tensor = run()
    return result, sum(kept.values())


@pytest.mark.parametrize("form", FORMATS)
def test_every_format(form: str) -> None:
    x, slope = random(2, N, D).requires_grad_(), random(2, N, 48)
    weight = pack(random(48, D, seed=1), form)
    (y,), size = kept_bytes(lambda: fused.linear(x, weight))
    assert size == 0
    expected = product(x, weight)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    (ours,), (theirs,) = (torch.autograd.grad(out, x, slope) for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["int8", "int4-g32", "fp8", "nvfp4"])
def test_experts(form: str) -> None:
    """Each expert is unpacked for its product alone: no more is kept than for activations."""
    x, shares, index = random(N, D), torch.rand(N, J), torch.rand(N, E).topk(J).indices
    gate_up, down = pack(random(E, 2 * INNER, D, seed=1), form), pack(random(E, D, INNER, seed=2), form)
    x.requires_grad_()
    shares.requires_grad_()
    y, size = kept_bytes(lambda: fused.experts(x, index, shares, gate_up, down))
    activations = 4 * N * J * (2 * INNER + INNER + INNER + 2 * D)
    assert size < 2 * activations
    expected = mixed(x, index, shares, gate_up, down)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    slope = random(N, D, seed=9)
    for ours, theirs in zip(*(torch.autograd.grad(out, (x, shares), slope) for out in (y, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_is_kept_does_not_grow_with_the_unpacked_experts() -> None:
    """Many wide experts and few tokens: unpacked they would be 16 times what is kept."""
    count, width = 16, 128
    gate_up, down = pack(random(count, 2 * width, D), "int4-g32"), pack(random(count, D, width), "int4-g32")
    x, index = random(32, D).requires_grad_(), torch.arange(32)[:, None] % count
    _, size = kept_bytes(lambda: fused.experts(x, index, torch.ones(32, 1), gate_up, down))
    assert size < 4 * count * 3 * width * D / 8


def adapted(base: Matrix, switch: LaneSwitch, rank: int, scale: float) -> LowRank:
    *stack, outputs, inputs = base.shape
    a = random(1, *stack, rank, inputs, seed=5).requires_grad_()
    return LowRank(base, a, random(1, *stack, rank, outputs, seed=6).requires_grad_(), switch, scale)


@pytest.mark.parametrize("form", ["int4-g32", "fp8"])
def test_factors_beside_a_packed_base(form: str) -> None:
    """QLoRA: the gradients of factors and inputs are those of float32 on the unpacked base; the base is not kept."""
    switch = LaneSwitch()
    switch.lanes = Lanes.of([LanePair(0, NO_LANE)], N, 0, "cpu")
    weight = adapted(pack(random(48, D), form), switch, 4, 0.5)
    assert isinstance(weight.base, Packed)
    x, slope = random(N, D, seed=8).requires_grad_(), random(N, 48)
    (y,), size = kept_bytes(lambda: fused.linear(x, weight))
    assert size <= x.nbytes + weight.a.nbytes + weight.b.nbytes + 2 * 4 * N * 4  # what the factors' gradients need
    expected = product(x, weight.base) + 0.5 * x @ weight.a[0].mT @ weight.b[0]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    leaves = (x, weight.a, weight.b)
    for ours, theirs in zip(*(torch.autograd.grad(out, leaves, slope) for out in (y, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_autocast_multiplies_in_its_own_type() -> None:
    x, weight = random(N, D).requires_grad_(), pack(random(48, D, seed=1), "int8")
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = fused.linear(x, weight)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.dense().sum(0).expand(N, D), rtol=0.02, atol=0.05)


def test_a_plain_weight_that_is_frozen_keeps_no_input() -> None:
    x, weight = random(N * 9, D).requires_grad_(), random(5, D)
    _, size = kept_bytes(lambda: fused.linear(x, weight)[0])
    assert size <= weight.nbytes
    low_rank = adapted(weight, LaneSwitch(), 2, 1.0)
    _, size = kept_bytes(lambda: fused.linear(x, low_rank)[0])
    assert size <= weight.nbytes  # nobody has a lane


def test_the_norm_has_the_gradients_of_torch_s_own() -> None:
    x, weight, slope = random(3, 5, D).requires_grad_(), random(D).requires_grad_(), random(3, 5, D, seed=4)
    for own in (weight, None):
        leaves = (x,) if own is None else (x, own)
        both = fused.rms_norm(x, own, 1e-6), F.rms_norm(x, (D,), own, 1e-6)
        for ours, theirs in zip(*(torch.autograd.grad(out, leaves, slope) for out in both), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    low = fused.rms_norm(x.detach().bfloat16().requires_grad_(), weight, 1e-6)
    assert low.dtype == torch.bfloat16 and low.requires_grad


def test_small_weights_take_their_factors_in_before_the_product() -> None:
    """By either way the same numbers and gradients: also of experts, which then go through one product for all."""
    switch = LaneSwitch()
    switch.lanes = Lanes.of([LanePair(0, NO_LANE)], 4 * N, 0, "cpu")
    x, index = random(4 * N, D).requires_grad_(), torch.rand(4 * N, E).topk(J).indices
    shares, slope = torch.rand(4 * N, J).requires_grad_(), random(4 * N, D, seed=3)
    for rank in (1, 12):  # the factors beside, and within
        gate_up = adapted(random(E, 2 * INNER, D, seed=1), switch, rank, 0.5)
        down = adapted(random(E, D, INNER, seed=2), switch, rank, 0.5)
        leaves = (x, shares, gate_up.a, gate_up.b, down.a, down.b)
        both = (ops.experts(x, index, shares, gate_up, down) for ops in (fused, reference))
        (ours, ours_grads), (theirs, theirs_grads) = ((out, torch.autograd.grad(out, leaves, slope)) for out in both)
        for one, two in zip((ours, *ours_grads), (theirs, *theirs_grads), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(two.detach().abs().max()))
