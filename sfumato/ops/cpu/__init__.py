"""The CPU implementation: a small compiled library (`kernels.cpp`) behind the contract of `reference.py`.

bfloat16 and int8 products run on AMX tiles where the processor has them, else on AVX-512's dot products, at several
times what torch's own reach at the sizes of a canvas; float32 runs on portable vector code. Such weights are packed
once, in the order in which they are read, into huge pages. Weights in groups (4 bits, or 8) stay as they lie, perhaps
in a mapped file, and become bfloat16 tiles on their way into a product. Beside all of these low-rank factors are read
as they lie (`lowrank.h`). Inference only: no gradients. Why it exists, with figures: docs/LOG.md.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import warnings
from collections.abc import Collection
from ctypes import c_long, c_void_p
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import InputError
from sfumato.ops.contract import After, BlockPass, BlockResult, CanvasState, JoinNorms, Layer, Matrix, Ops, ReadOut
from sfumato.ops.cpu import build, memory
from sfumato.ops.cpu.calls import NOTHING, NUMBER_TYPES, Operand, call
from sfumato.ops.cpu.memory import HUGE
from sfumato.ops.cpu.weights import Panels, operand, pack, refusal, with_lanes
from sfumato.ops.lowrank import LowRank
from sfumato.ops.masks import Mask
from sfumato.ops.packed import Packed

__all__ = [
    "AMX", "DOTS", "HUGE", "OPS", "PLAIN", "Panels", "attention", "block", "conclude_", "experts", "feed_forward",
    "join", "linear", "load", "norm_add", "norm_rope", "obstacle", "pack", "place_embedding_", "read_out", "rms_norm",
    "route", "soft_embedding",
]  # fmt: skip

PLAIN, DOTS, AMX = range(3)
"""The ways in which the library multiplies tiles: portable code, AVX-512's dot products, AMX."""


def obstacle(dtype: torch.dtype | None, packed: Collection[Packed] = ()) -> str | None:
    """Why these operations are not the fastest here; None where they are.

    It is about a model in this dtype with some weights packed like these. A compiler that fails is worth a warning."""
    if dtype is not None and dtype not in NUMBER_TYPES:
        return f"they take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if reason := build.obstacle() or next(filter(None, map(refusal, packed)), None):
        return reason
    try:
        build.library()
    except InputError as error:
        warnings.warn(f"{error} (auto does)", stacklevel=2)
        return str(error)
    is_tiled = any(weight.is_grouped or weight.kind == "fp8" for weight in packed)
    is_tiled = is_tiled or (dtype == torch.bfloat16 and not packed)
    if is_tiled and _way() == PLAIN:
        return "this processor has neither AMX nor AVX-512 with BF16 and VNNI, without which bfloat16 is slow here"
    return None


def load(dtype: torch.dtype | None = None) -> Ops:
    """The record. InputError where the library cannot be built or does not know the dtype."""
    if dtype is not None and dtype not in NUMBER_TYPES:
        raise InputError(f"the cpu operations take float32 and bfloat16, not {dtype}; choose fused")
    _way()
    return OPS


@functools.cache
def _way() -> int:
    return int(build.library().sf_start())


def place_embedding_(weight: Tensor) -> None:
    """Onto huge pages, where the system has them."""
    if weight.nbytes >= HUGE and weight.is_contiguous() and weight.is_cpu:
        build.library().sf_place_embedding(c_void_p(weight.data_ptr()), c_long(weight.nbytes))


# ---- the operations --------------------------------------------------------------------------------------------------


def linear(x: Tensor, *weights: Matrix) -> tuple[Tensor, ...]:
    """As `reference.linear`."""
    flat, count = _rows(x), len(weights)
    each = [operand(weight, x.dtype) for weight in weights]
    for one in each:
        if len(one.shape) != 2 or one.shape[1] != flat.shape[1]:
            raise InputError(f"x has {flat.shape[1]} inputs, and a weight is {list(one.shape)}; it must be [O, inputs]")
    out = tuple(x.new_empty(*x.shape[:-1], w.shape[0]) for w in weights)
    outputs = struct.pack(f"{count}l", *(one.shape[0] for one in each))
    to = struct.pack(f"{count}P", *(y.data_ptr() for y in out))
    call("sf_linear", flat, count, b"".join(one.raw for one in each), outputs, to)
    return out


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """As `reference.rms_norm`."""
    flat = _rows(x)
    out = torch.empty_like(flat)
    call("sf_rms_norm", flat, weight, eps, out)
    return out.view(x.shape)


def norm_rope(x_BTHK: Tensor, weight_K: Tensor, eps: float, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
    """As `reference.norm_rope`."""
    x_BTHK = x_BTHK.contiguous()
    out = torch.empty_like(x_BTHK)
    angles, places = (cos_BTK.contiguous(), sin_BTK.contiguous()), x_BTHK.shape[0] * x_BTHK.shape[1]
    call("sf_norm_rope", x_BTHK, weight_K, eps, *angles, out, N=places)
    return out


def norm_add(residual: Tensor, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As `reference.norm_add`."""
    flat, residual_ND = _rows(x), _rows(residual)
    out = torch.empty_like(residual_ND)
    call("sf_norm_add", residual_ND, flat, weight_D, eps, out)
    return out.view(residual.shape)


def attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, k_XRGK: Tensor, v_XRGK: Tensor, mask: Mask) -> Tensor:
    """As `reference.attention`."""
    q, k, v = q_BTHK.contiguous(), k_BTGK.contiguous(), v_BTGK.contiguous()
    out = torch.empty_like(q)
    call("sf_attention", q, k, v, k_XRGK, v_XRGK, *_places(mask), out, **_extent(mask))
    return out


def feed_forward(x: Tensor, gate: Matrix, up: Matrix, down: Matrix) -> Tensor:
    """As `reference.feed_forward`; gate and up of one form are one product."""
    flat = _rows(x)
    out = torch.empty_like(flat)
    call("sf_feed_forward", flat, *(operand(weight, x.dtype) for weight in (gate, up, down)), out)
    return out.view(x.shape)


def route(
    residual_ND: Tensor, scale_D: Tensor, proj_ED: Matrix, per_expert_E: Tensor, top_k: int, eps: float
) -> tuple[Tensor, Tensor]:
    """As `reference.route`."""
    x = residual_ND.contiguous()
    index_NJ = torch.empty(x.shape[0], top_k, dtype=torch.long)
    weight_NJ = torch.empty(x.shape[0], top_k)
    call("sf_route", x, scale_D, *_router(proj_ED, x.dtype), per_expert_E, eps, index_NJ, weight_NJ)
    return index_NJ, weight_NJ


def experts(x_ND: Tensor, index_NJ: Tensor, weight_NJ: Tensor, gate_up: Matrix, down: Matrix) -> Tensor:
    """As `reference.experts`."""
    x, index_NJ, weight_NJ = x_ND.contiguous(), index_NJ.contiguous(), weight_NJ.float().contiguous()
    out = torch.empty_like(x)
    call("sf_experts", x, index_NJ, weight_NJ, operand(gate_up, x.dtype), operand(down, x.dtype), out)
    return out


def join(
    residual_ND: Tensor,
    dense_ND: Tensor,
    sparse_ND: Tensor,
    norms: JoinNorms,
    eps: float,
    scale_N1: Tensor,
) -> Tensor:
    """As `reference.join`."""
    three = residual_ND.contiguous(), dense_ND.contiguous(), sparse_ND.contiguous()
    out, scale = torch.empty_like(three[0]), scale_N1.flatten()
    call("sf_join", *three, *norms, eps, scale, out)
    return out


def read_out(
    hidden_BLD: Tensor,
    embed_VD: Tensor,
    softcap: float,
    temperature_B: Tensor,
    uniform_BL: Tensor | None = None,
    gumbel_BLV: Tensor | None = None,
    banned: tuple[Tensor, Tensor] | None = None,
) -> ReadOut:
    """As `reference.read_out`; logits are stored in the weights' dtype.

    All is read from them before they are rounded to it, but the word inside the tile in which a sample falls;
    `gumbel_BLV`, the oracle's noise, is added to the stored ones too."""
    batch, length, _ = hidden_BLD.shape
    hidden, words, count = _rows(hidden_BLD), embed_VD.shape[0], batch * length
    tiles = -(-words // _words())
    logits_BLV = memory.reused(hidden_BLD, batch, length, words)
    mass_WN, peak_N = torch.empty(tiles, -(-count // 32) * 32), torch.empty(count)
    sample_BL, argmax_BL = (torch.empty(batch, length, dtype=torch.long) for _ in range(2))
    entropy_BL = torch.empty(batch, length)
    temperature = (1.0 / temperature_B.float())[:, None].expand(batch, length).contiguous()
    where, ids = (None, None) if banned is None else (banned[0].to(torch.uint8).contiguous(), banned[1].contiguous())
    uniform = None if uniform_BL is None else uniform_BL.float().contiguous()
    flat = (None if one is None else one.view(-1) for one in (temperature, where, ids, uniform))
    results = (one.view(-1) for one in (sample_BL, argmax_BL, entropy_BL))
    call(
        "sf_read_out", hidden, embed_VD, float(softcap), *flat, logits_BLV.view(count, words), mass_WN, *results,
        peak_N, A=0 if ids is None else ids.numel(), W=tiles, M=mass_WN.shape[1],
    )  # fmt: skip
    if gumbel_BLV is not None:
        sample_BL = (logits_BLV.float() + gumbel_BLV).argmax(-1)
    return ReadOut(sample_BL, argmax_BL, entropy_BL, logits_BLV, (mass_WN, peak_N))


def soft_embedding(logits_BLV: Tensor, embed_VD: Tensor, scale: Tensor, tiles: Any = None) -> Tensor:
    """As `reference.soft_embedding`; the error is at most eps/4 x max|E| x scale.

    Tiles of the vocabulary whose mass is below eps/16 over their number, at all 32 positions of a block, are left
    out, eps being the dtype's, and the rest is normalised. Masses are those of the logits before they were rounded,
    which changes a share by less than two; so no position loses more than eps/8 of its mass."""
    (words, size), shape = embed_VD.shape, logits_BLV.shape
    logits = logits_BLV.reshape(-1, *shape[-2:]).contiguous()
    count = logits.shape[0] * logits.shape[1]
    if tiles is None:
        tiles = None, logits.flatten(0, -2).amax(-1).float()
    mass_WN, peak_N = tiles
    least = torch.finfo(embed_VD.dtype).eps / 16 / -(-words // _words())
    out = embed_VD.new_empty(count, size)
    sizes = {"N": count, "W": -(-words // _words()), "M": -(-count // 32) * 32}
    call("sf_soft_embedding", logits, embed_VD, peak_N, mass_WN, least, float(scale), out, **sizes)
    return out.view(*shape[:-1], size)


def block(
    x_BTD: Tensor, layer: Layer, block_pass: BlockPass, next_input: None = None, after: After | None = None
) -> BlockResult:
    """As `contract.RunBlock`; nothing is prepared for the next block.

    Between operations of tenths of a millisecond, a dozen calls from Python would cost as much as attention does."""
    cos_BTK, sin_BTK, k_XRGK, v_XRGK, mask, scale_N1 = block_pass
    x_BTD, (batch, new, _), (groups, head) = x_BTD.contiguous(), x_BTD.shape, k_XRGK.shape[2:]
    router, beside = _router(layer.router, x_BTD.dtype)
    products = layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down, layer.gate_up, layer.expert_down
    others = (
        layer.input_norm, layer.q_norm, layer.k_norm, layer.after_attention, layer.before_dense, layer.after_dense,
        layer.router_scale, router, layer.per_expert, layer.before_experts, layer.after_experts, layer.after,
    )  # fmt: skip
    y, k_BTGK = torch.empty_like(x_BTD), x_BTD.new_empty(batch, new, groups, head)
    v_BTGK, width = torch.empty_like(k_BTGK), layer.q.shape[0]
    # Logits that are gone leave their memory until the next ones need it: taken out, so that nobody else takes it.
    pages, count = memory.borrow()
    spare = None if pages is None else ctypes.addressof(ctypes.c_char.from_buffer(pages))
    weights = (None if weight is None else operand(weight, x_BTD.dtype) for weight in products)
    call(
        "sf_block", x_BTD, *others, *weights, beside, layer.eps, cos_BTK.contiguous(), sin_BTK.contiguous(), k_XRGK,
        v_XRGK, *_places(mask), scale_N1.flatten(), y, k_BTGK, v_BTGK, spare, count, H=width // head, J=layer.top_k,
        Q=width // head * head, C=groups * head, **_extent(mask),
    )  # fmt: skip
    if pages is not None:
        memory.keep(pages, count)
    return BlockResult(y, k_BTGK, v_BTGK, None)


def conclude_(
    state: CanvasState,
    at_B: Tensor,
    read: ReadOut,
    noise_BL: Tensor,
    hidden_BLD: Tensor,
    soft_BLD: Tensor,
    embedding: tuple[Tensor, Tensor],
) -> None:
    """As `contract.Conclude`."""
    pass_ = at_B, read.sample_BL, read.argmax_BL, noise_BL, read.entropy_BL, hidden_BLD, soft_BLD, embedding[0]
    rules = state.rules
    call(
        "sf_conclude", *(x.contiguous() for x in pass_), embedding[1].view(1), state.canvas_XL, state.pin_XL,
        state.argmax_XL, state.still_XL, state.step_X, state.settled_X, rules.stability_X, rules.max_steps_X,
        state.room_X, state.eos_E, state.entropy_XL, rules.entropy_bound_X, rules.confidence_X, state.accepted_XL,
        state.is_done_X, state.is_finite_X, state.early_X, state.soft_XLD, Pins=state.has_pins, Early=state.has_early,
    )  # fmt: skip


# ---- what they share ------------------------------------------------------------------------------------------------


@functools.cache
def _words() -> int:
    """Words of a tile of the vocabulary."""
    return int(build.library().sf_words())


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _router(proj_ED: Matrix, dtype: torch.dtype) -> tuple[Any, Operand | None]:
    """A router's plain weight, and the factors beside it where tokens of this pass have some."""
    if not isinstance(proj_ED, LowRank):
        return proj_ED, None
    none = Operand(proj_ED.shape, NOTHING)
    return proj_ED.base, with_lanes(none, proj_ED, dtype) if proj_ED.switch.lanes.runs else None


def _places(mask: Mask) -> tuple[Any, ...]:
    """What the library is told of a mask, in its order."""
    return mask.rows_B, mask.lengths_B, mask.counts_B, mask.encode, mask.canvas, mask.window or 0


def _extent(mask: Mask) -> dict[str, int]:
    """New tokens of a row, and slots of a ring, as a mask has them."""
    return {"T": mask.encode + mask.canvas, "R": mask.ring + 1}


OPS = Ops(
    name="cpu",
    pack=pack,
    linear=linear,
    rms_norm=rms_norm,
    norm_rope=norm_rope,
    norm_add=norm_add,
    attention=attention,
    feed_forward=feed_forward,
    route=route,
    experts=experts,
    join=join,
    read_out=read_out,
    soft_embedding=soft_embedding,
    place_embedding_=place_embedding_,
    block=block,
    conclude_=conclude_,
)
