"""block: a layer in eleven launches, fourteen where x meets its weights in FP8; six more with adapters (`low_rank`).

Every launch reads its input from memory and costs microseconds of its own, so what stands between two products is one
kernel: `heads` between the projections and attention, `between` attention and the feed-forwards, `end` behind them,
up to the input of the next block. Each lays its result out as the next product takes it. Products with few outputs
are split along K, and the kernel behind them sums the parts. The dense feed-forward and router and experts depend on
each other in nothing: where a CUDA graph is recorded, they stand on two streams.

    1 queries, keys, values   2 heads   3 attention   4 output   5 between
    6 route   7 8 dense feed-forward   9 10 experts   11 end

The operations one by one (`norm`, `route`, `experts` and so on) share the device functions; results differ from theirs
in the last place at most, where a sum is split. What this lacks: FP8 codes written by the products themselves, which
would need a scale that is known before the row is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from sfumato.ops.contract import After, BlockPass, BlockResult, JoinNorms, Layer, Matrix
from sfumato.ops.triton import attention, experts, linear, route
from sfumato.ops.triton.between import between, end
from sfumato.ops.triton.forms import Form, are_alike, form
from sfumato.ops.triton.heads import append_, heads
from sfumato.ops.triton.norm import rms_norm
from sfumato.ops.triton.product import Prepared, Ready, prepare
from sfumato.ops.triton.tuning import Config, config

DEFAULTS: dict[str, Config] = {
    # SIDE: the dense feed-forward on a stream of its own.
    "block": {"SIDE": 1},
}

First = TypeVar("First")
Second = TypeVar("Second")


def block(
    x_BTD: Tensor,
    layer: Layer,
    block_pass: BlockPass,
    next_input: Ready | None = None,
    after: After | None = None,
) -> BlockResult:
    """As `contract.RunBlock`. What was encoded is in the rings when this returns."""
    batch, tokens, width = x_BTD.shape
    x_ND = x_BTD.reshape(-1, width)
    if next_input is None:
        next_input = Ready("plain", 1, rms_norm(x_ND, layer.input_norm, layer.eps), None)
    mixed_PND = _mix(next_input, layer, (batch, tokens), x_BTD.dtype, block_pass)

    gate, up = linear.pair(form(layer.gate, x_ND), form(layer.up, x_ND))
    gate_up = form(layer.gate_up, x_ND)
    zeros = x_ND.new_empty(route.zeros_for(len(x_ND), layer.router.shape[0]), dtype=torch.int32)
    first_norms = layer.after_attention, layer.before_dense, layer.before_experts
    x_ND, root_N, for_dense, for_experts = between(
        mixed_PND, x_ND, first_norms, layer.eps, [gate, up], [gate_up], zeros
    )

    dense_PND, sparse = _side_by_side(
        x_ND,
        lambda: _dense(for_dense, gate, up, layer, x_ND),
        lambda: _sparse(for_experts, gate_up, layer, x_ND, root_N, zeros),
    )

    norms = JoinNorms(layer.after_dense, layer.after_experts, layer.after)
    behind = None if after is None else (after.norm, [form(each, x_ND) for each in after.products])
    x_ND, ready = end(sparse, dense_PND, x_ND, norms, block_pass.scale_N1, layer.eps, behind)
    x_BTD = x_ND.view_as(x_BTD)
    if ready is not None and after is not None and not after.products:
        return BlockResult(x_BTD, None, None, ready.x_MK.view_as(x_BTD))
    return BlockResult(x_BTD, None, None, ready)


def _mix(x: Ready, layer: Layer, shape: tuple[int, int], dtype: torch.dtype, block_pass: BlockPass) -> Tensor:
    """Attention from the normed input to its output, [P, N, D] in parts."""
    cos_BTK, sin_BTK, k_XRGK, v_XRGK, mask, _ = block_pass
    size = k_XRGK.shape[-1]
    weights = [weight for weight in (layer.q, layer.k, layer.v) if weight is not None]
    q_BTHK, k_BTGK, *v = (y.view(*shape, -1, size) for y in _products(x, weights, dtype))
    counters = q_BTHK.new_empty(attention.zeros_for(q_BTHK, k_BTGK, mask), dtype=torch.int32)
    norms, angles = (layer.q_norm, layer.k_norm), (cos_BTK, sin_BTK)
    q_BTHK, k_BTGK, v_BTGK = heads(q_BTHK, k_BTGK, v[0] if v else None, norms, layer.eps, angles, counters)
    inputs = attention.Inputs(q_BTHK, k_BTGK, v_BTGK, k_XRGK, v_XRGK, mask)
    flat = shape[0] * shape[1], q_BTHK.shape[2] * size
    output = form(layer.o, q_BTHK.view(flat))
    if output.layout[0] == "fp8" and output.beside is None:
        ready = Prepared(*attention.quantised(inputs), None)
    else:
        ready = prepare(attention.joined(inputs, counters).view(flat), output)
    if mask.encode and mask.is_kept:
        append_(k_BTGK, v_BTGK, k_XRGK, v_XRGK, mask)
    return _in_parts(ready, output, dtype)


def _products(x: Ready, weights: Sequence[Matrix], dtype: torch.dtype) -> list[Tensor]:
    forms = [form(weight, x.x_MK) for weight in weights]
    outs = [x.x_MK.new_empty((len(x.x_MK), one.outputs), dtype=dtype) for one in forms]
    count = len(forms) if are_alike(forms) else 1
    for at in range(0, len(forms), count):
        linear.multiply(x.prepared_for(forms[at]), forms[at : at + count], outs[at : at + count], dtype)
    return outs


def _in_parts(x: Prepared, weight: Form, dtype: torch.dtype) -> Tensor:
    """One product, [P, N, D]: in float32 where it is split, whole in `dtype` else."""
    count = linear.splits(weight, dtype, x.x_MK.device)
    shape = count, len(x.x_MK), weight.outputs
    out_PND = torch.empty(shape, dtype=torch.float32 if count > 1 else dtype, device=x.x_MK.device)
    linear.multiply(x, [weight], [out_PND if count > 1 else out_PND[0]], dtype)
    return out_PND


def _dense(x: Ready, gate: Form, up: Form, layer: Layer, like_ND: Tensor) -> Tensor:
    hidden_NF = like_ND.new_empty(len(like_ND), gate.outputs)
    down = form(layer.down, hidden_NF)
    is_split = linear.hide(x.prepared_for, gate, up, hidden_NF, down.is_halved)
    return _in_parts(prepare(hidden_NF, down, is_split=is_split), down, like_ND.dtype)


def _sparse(
    x: Ready, gate_up: Form, layer: Layer, residual_ND: Tensor, root_N: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor]:
    router = route.RouterWeights.of(layer.router_scale, layer.router, layer.per_expert, residual_ND.dtype)
    count_E, list_EN, weight_NJ = route.listed(residual_ND, root_N, router, layer.top_k, zeros)
    hidden_AF = residual_ND.new_empty(weight_NJ.numel(), gate_up.outputs // 2)
    down = form(layer.expert_down, hidden_AF)
    part_AD = experts.products(x.prepared_for(gate_up), (count_E, list_EN), layer.top_k, gate_up, down, hidden_AF)
    return part_AD, weight_NJ


def _side_by_side(x_ND: Tensor, one: Callable[[], First], two: Callable[[], Second]) -> tuple[First, Second]:
    """Both, on two streams where a CUDA graph is recorded: launches without one would only wait for the host twice."""
    device = x_ND.device
    is_recorded = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if not is_recorded or not config("block", x_ND.shape[1:], x_ND.dtype, device, DEFAULTS["block"])["SIDE"]:
        return one(), two()
    main, side = torch.cuda.current_stream(device), _side(device)
    side.wait_stream(main)
    try:
        with torch.cuda.stream(side):
            first = one()
        second = two()
    finally:  # a capture that ends with a stream not joined cannot be ended at all
        main.wait_stream(side)
    return first, second


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
