"""The CPU implementation: a small compiled library (`kernels.cpp`) behind the contract of `reference.py`.

bfloat16 and int8 products run on AMX tiles where the processor has them, else on AVX-512's dot products, at several
times what torch's own reach at the sizes of a canvas; float32 runs on portable vector code. Such weights are packed
once, in the order in which they are read, into huge pages. Weights in groups (4 bits, or 8) stay as they lie, perhaps
in a mapped file, and become bfloat16 tiles on their way into a product. Inference only: no gradients. Why it exists,
with figures: docs/LOG.md.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import warnings
import weakref
from collections.abc import Callable, Collection
from ctypes import c_float, c_int, c_long, c_void_p
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.errors import InputError
from sfumato.ops.contract import After, Layer, Ops, ReadOut
from sfumato.ops.cpu import build
from sfumato.ops.masks import Mask
from sfumato.ops.packed import Packed as Quantised

_IO = {torch.float32: 0, torch.bfloat16: 1}
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_STORED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_GROUPS = (32, 64, 128)
_K = (16, 32, 64)
PLAIN, DOTS, AMX = range(3)
"""The ways in which the library multiplies tiles: portable code, AVX-512's dot products, AMX."""
HUGE = 1 << 21
"""Bytes of a huge page; smaller packed weights stay in ordinary memory."""


def obstacle(dtype: torch.dtype | None, packed: Collection[Quantised] = ()) -> str | None:
    """Why these operations are not the fastest here, for a model in this dtype with some weights packed like these;
    None where they are. A compiler that fails is worth a warning."""
    if dtype is not None and dtype not in _IO:
        return f"they take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if reason := build.obstacle() or next(filter(None, map(_refusal, packed)), None):
        return reason
    try:
        build.library()
    except InputError as error:
        warnings.warn(f"{error} (auto does)", stacklevel=2)
        return str(error)
    is_tiled = any(_is_grouped(weight) for weight in packed) or (dtype == torch.bfloat16 and not packed)
    if is_tiled and _way() == PLAIN:
        return "this processor has neither AMX nor AVX-512 with BF16 and VNNI, without which bfloat16 is slow here"
    return None


def load(dtype: torch.dtype | None = None) -> Ops:
    """The record. InputError where the library cannot be built or does not know the dtype."""
    if dtype is not None and dtype not in _IO:
        raise InputError(f"the cpu operations take float32 and bfloat16, not {dtype}; choose fused")
    _way()
    return OPS


@functools.cache
def _way() -> int:
    return int(build.library().sf_start())


@dataclass(frozen=True)
class Packed:
    """A weight [O, I] or a stack [E, O, I] in panels of 32 outputs, as the library reads it."""

    kind: int
    shape: tuple[int, ...]
    data: Tensor
    """Bytes."""
    scale: Tensor | None
    """int8: float32, one an output."""

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @functools.cached_property
    def given(self) -> _Given:
        """As the library takes it; made once, as its memory stays where it is."""
        return _Given(self.data.data_ptr(), _pointer(self.scale), None, self.kind, 0, 0)

    def __reduce__(self) -> Any:  # a copy has memory of its own
        return Packed, (self.kind, self.shape, self.data, self.scale)


class _Given(ctypes.Structure):
    """A weight as the library takes it: `Given` of packing.h."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("data", "scale", "bias")),
        *((name, c_long) for name in ("kind", "group", "store")),
    ]


def empty_huge(count: int) -> Tensor:
    """Uninitialised bytes on huge pages, where the system grants them: read at up to three times the speed."""
    if count < HUGE:
        return torch.empty(count, dtype=torch.uint8)
    return torch.frombuffer(_pages(count), dtype=torch.uint8)


def _pages(count: int) -> mmap.mmap:
    pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


_FREE: dict[int, mmap.mmap] = {}


def _reused(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised, on huge pages that come back when the tensor is gone: logits are made anew with every step, and
    the system would clear their pages each time."""
    count = math.prod(shape) * like.element_size()
    if count < HUGE:
        return like.new_empty(shape)
    pages = _FREE.pop(count, None) or _pages(count)
    held = (ctypes.c_char * count).from_buffer(pages)
    weakref.finalize(held, _give_back, pages, count).atexit = False
    return torch.frombuffer(held, dtype=like.dtype).view(shape)


def _give_back(pages: mmap.mmap, count: int) -> None:
    """One is kept, of the size that was used last."""
    _FREE.clear()
    _FREE[count] = pages


def pack(weight: Tensor | Quantised | Packed) -> Packed | Quantised:
    """See `reference.pack`. int8 with a scale an output rounds what it multiplies the same way, a scale a row; weights
    in groups multiply bfloat16."""
    if isinstance(weight, Packed):
        return weight
    if isinstance(weight, Quantised):
        if reason := _refusal(weight):
            raise InputError(
                f"the cpu operations cannot take {reason}; choose ops='fused', or quantize='int8' or 'int4'"
            )
        if _is_grouped(weight):
            return weight if all(t.is_contiguous() for t in weight.parts.values()) else weight.each(Tensor.contiguous)
        return _in_panels(weight.data, weight.scale.contiguous())
    if weight.dtype not in _IO:
        raise InputError(f"the cpu operations take float32 and bfloat16 weights, not {weight.dtype}")
    return _in_panels(weight.detach(), None)


def _in_panels(weight: Tensor, scale: Tensor | None) -> Packed:
    code, (outputs, inputs) = _KINDS[weight.dtype], weight.shape[-2:]
    count = weight.numel() // (outputs * inputs)
    size = build.library().sf_packed_bytes(code, c_long(outputs), c_long(inputs))
    data = empty_huge(count * size)
    source = weight.contiguous()
    for n in range(count):
        start = source.data_ptr() + n * outputs * inputs * source.element_size()
        _call("sf_pack", code, c_void_p(start), outputs, inputs, c_void_p(data.data_ptr() + n * size))
    return Packed(code, tuple(weight.shape), data, scale)


def _is_grouped(weight: Quantised) -> bool:
    return weight.kind == "int4" or weight.scale.dim() == len(weight.shape)


def _refusal(weight: Quantised) -> str | None:
    """What these operations cannot take about a weight, as the object of a sentence."""
    if weight.kind not in ("int8", "int4"):
        return f"{weight.kind} weights"
    if not _is_grouped(weight):
        return None
    if weight.group not in (_GROUPS if weight.kind == "int4" else (16, *_GROUPS)) or weight.shape[-1] % weight.group:
        return f"{weight.kind} weights in groups of {weight.group} along {weight.shape[-1]} inputs"
    is_known = weight.scale.dtype in _STORED and (weight.bias is None or weight.bias.dtype == weight.scale.dtype)
    return None if is_known else f"scales and biases of {weight.scale.dtype}"


def settle(weight: Tensor) -> None:
    """Onto huge pages, where the system has them."""
    if weight.nbytes >= HUGE:
        _call("sf_settle", weight, weight.nbytes)


def unpack(packed: Packed) -> Tensor:
    """float32, in the weight's own order: what the products multiply with."""
    outputs, inputs = packed.shape[-2:]
    width, group = _K[packed.kind], _K[packed.kind] // 16
    kind = (torch.float32, torch.bfloat16, torch.int8)[packed.kind]
    panels, tiles = -(-outputs // 32), -(-inputs // width)
    lay = packed.data.view(kind).view(-1, panels, tiles, 2, 16, 16, group)  # panel, k tile, half, word, output, part
    plain = lay.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, panels * 32, tiles * width)[:, :outputs, :inputs].float()
    plain = plain.reshape(packed.shape)
    return plain if packed.scale is None else plain * packed.scale[..., None]


# ---- the operations --------------------------------------------------------------------------------------------------


Weight = Packed | Quantised


def linear(x: Tensor, *weights: Weight) -> tuple[Tensor, ...]:
    flat, count = _rows(x), len(weights)
    out = tuple(x.new_empty(*x.shape[:-1], w.shape[0]) for w in weights)
    outputs = (c_long * count)(*(w.shape[0] for w in weights))
    to = (c_void_p * count)(*(y.data_ptr() for y in out))
    _call("sf_linear", _io(x), flat, flat.shape[0], flat.shape[1], count, _given(*weights), outputs, to)
    return out


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    flat, out = _rows(x), torch.empty_like(x, memory_format=torch.contiguous_format)
    _call("sf_rms_norm", _io(x), flat, *flat.shape, weight, eps, out)
    return out


def norm_rope(x_BTHK: Tensor, weight_K: Tensor, eps: float, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
    x_BTHK = x_BTHK.contiguous()
    out = torch.empty_like(x_BTHK)
    batch, width, heads, size = x_BTHK.shape
    angles = cos_BTK.contiguous(), sin_BTK.contiguous()
    _call("sf_norm_rope", _io(x_BTHK), x_BTHK, batch * width, heads, size, weight_K, eps, *angles, out)
    return out


def norm_add(residual: Tensor, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    flat, residual = _rows(x), residual.contiguous()
    out = torch.empty_like(residual)
    _call("sf_norm_add", _io(x), residual, flat, *flat.shape, weight_D, eps, out)
    return out


def attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, k_XRGK: Tensor, v_XRGK: Tensor, mask: Mask) -> Tensor:
    q, k, v = q_BTHK.contiguous(), k_BTGK.contiguous(), v_BTGK.contiguous()
    out = torch.empty_like(q)
    batch, _, heads, size = q.shape
    places = mask.rows_B, mask.lengths_B, mask.counts_B
    shape = batch, mask.encode, mask.canvas, mask.window or 0, mask.ring, heads, k.shape[2], size
    _call("sf_attention", _io(q), q, k, v, k_XRGK, v_XRGK, *places, *shape, out)
    return out


def feed_forward(x: Tensor, gate: Weight, up: Weight, down: Weight) -> Tensor:
    _check_alike(gate, up)
    flat, out = _rows(x), torch.empty_like(x, memory_format=torch.contiguous_format)
    _call("sf_feed_forward", _io(x), flat, *flat.shape, gate.shape[0], _given(gate, up, down), out)
    return out


def route(
    residual_ND: Tensor, scale_D: Tensor, proj_ED: Tensor, per_expert_E: Tensor, top_k: int, eps: float
) -> tuple[Tensor, Tensor]:
    x, count = residual_ND.contiguous(), proj_ED.shape[0]
    index_NJ = torch.empty(x.shape[0], top_k, dtype=torch.long)
    weight_NJ = torch.empty(x.shape[0], top_k)
    _call("sf_route", _io(x), x, *x.shape, scale_D, proj_ED, count, per_expert_E, top_k, eps, index_NJ, weight_NJ)
    return index_NJ, weight_NJ


def experts(x_ND: Tensor, index_NJ: Tensor, weight_NJ: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    x, index_NJ, weight_NJ = x_ND.contiguous(), index_NJ.contiguous(), weight_NJ.float().contiguous()
    out, (count, width, inner) = torch.empty_like(x), down.shape
    _call(
        "sf_experts", _io(x), x, x.shape[0], width, index_NJ.shape[1], index_NJ, weight_NJ, count,
        _given(gate_up, down), inner, out,
    )  # fmt: skip
    return out


def join(
    residual_ND: Tensor,
    dense_ND: Tensor,
    sparse_ND: Tensor,
    dense_norm_D: Tensor,
    sparse_norm_D: Tensor,
    norm_D: Tensor,
    eps: float,
    scale_N1: Tensor,
) -> Tensor:
    three = residual_ND.contiguous(), dense_ND.contiguous(), sparse_ND.contiguous()
    out, norms, scale = torch.empty_like(three[0]), (dense_norm_D, sparse_norm_D, norm_D), scale_N1.contiguous()
    _call("sf_join", _io(out), *three, *out.shape, *norms, eps, scale, scale.numel(), out)
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
    """Logits are stored in the weights' dtype. All is read from them before they are rounded to it, but the word inside
    the tile in which a sample falls; `gumbel_BLV`, the oracle's dice, meets the stored ones too."""
    batch, length, size = hidden_BLD.shape
    hidden, words, count = _rows(hidden_BLD), embed_VD.shape[0], batch * length
    tiles = -(-words // _words())
    logits_BLV = _reused(hidden_BLD, batch, length, words)
    mass_WN, peak_N = torch.empty(tiles, -(-count // 32) * 32), torch.empty(count)
    sample_BL, argmax_BL = (torch.empty(batch, length, dtype=torch.long) for _ in range(2))
    entropy_BL = torch.empty(batch, length)
    temperature = (1.0 / temperature_B.float())[:, None].expand(batch, length).contiguous()
    where, ids = (None, None) if banned is None else (banned[0].to(torch.uint8).contiguous(), banned[1].contiguous())
    uniform = None if uniform_BL is None else uniform_BL.float().contiguous()
    _call(
        "sf_read_out", _io(hidden), hidden, count, size, embed_VD, words, softcap, temperature, where, ids,
        0 if ids is None else ids.numel(), uniform, logits_BLV, mass_WN, sample_BL, argmax_BL, entropy_BL, peak_N,
    )  # fmt: skip
    if gumbel_BLV is not None:
        sample_BL = (logits_BLV.float() + gumbel_BLV).argmax(-1)
    return ReadOut(sample_BL, argmax_BL, entropy_BL, logits_BLV, (mass_WN, peak_N))


def soft_embedding(logits_BLV: Tensor, embed_VD: Tensor, scale: Tensor, tiles: Any = None) -> Tensor:
    """Tiles of the vocabulary whose mass is below eps/16 over their number, at all 32 positions of a block, are left
    out, eps being the dtype's, and the rest is normalised. Masses are those of the logits before they were rounded,
    which changes a share by less than two; so no position loses more than eps/8 of its mass, and the
    error is at most eps/4 x max|E| x scale."""
    logits, (words, size), length = logits_BLV.contiguous(), embed_VD.shape, logits_BLV.shape[-2]
    if tiles is None:
        tiles = None, logits.flatten(0, -2).amax(-1).float()
    mass_WN, peak_N = tiles
    least = torch.finfo(embed_VD.dtype).eps / 16 / -(-words // _words())
    out = embed_VD.new_empty(*logits.shape[:-1], size)
    _call(
        "sf_soft_embedding", _io(logits), logits, logits.numel() // words // length, length, words, embed_VD, size,
        peak_N, mass_WN,
        least, float(scale), out,
    )  # fmt: skip
    return out


def block(
    x_BTD: Tensor,
    layer: Layer,
    cos_BTK: Tensor,
    sin_BTK: Tensor,
    k_XRGK: Tensor,
    v_XRGK: Tensor,
    mask: Mask,
    scale_N1: Tensor,
    handed: None = None,
    after: After | None = None,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """See `ops.Ops.block`; nothing is handed on. Between operations of tenths of a millisecond, a dozen calls from
    Python would cost as much as attention does."""
    x_BTD, scale_N1 = x_BTD.contiguous(), scale_N1.contiguous()
    (batch, new, width), (groups, head) = x_BTD.shape, k_XRGK.shape[2:]
    _check_alike(layer.gate, layer.up)
    products = layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down, layer.gate_up, layer.expert_down
    others = [
        layer.input_norm, layer.q_norm, layer.k_norm, layer.after_attention, layer.before_dense, layer.after_dense,
        layer.router_scale, layer.router, layer.per_expert, layer.before_experts, layer.after_experts, layer.after,
    ]  # fmt: skip
    pointers = [part.data_ptr() for part in others]
    experts, _, expert_inner = layer.expert_down.shape
    heads = layer.q.shape[0] // head
    sizes = width, heads, groups, head, layer.gate.shape[0], experts, expert_inner, layer.top_k
    y, k_BTGK = torch.empty_like(x_BTD), x_BTD.new_empty(batch, new, groups, head)
    v_BTGK = torch.empty_like(k_BTGK)
    # Logits that are gone leave their memory until the next ones need it: taken out, so that nobody else takes it.
    count, pages = _FREE.popitem() if _FREE else (0, None)
    lent = None if pages is None else c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(pages)))
    _call(
        "sf_block", _io(x_BTD), x_BTD, (c_void_p * len(pointers))(*pointers), _given(*products), (c_long * 8)(*sizes),
        layer.eps, cos_BTK.contiguous(), sin_BTK.contiguous(), k_XRGK, v_XRGK, mask.rows_B, mask.lengths_B,
        mask.counts_B, batch, mask.encode, mask.canvas, mask.window or 0, mask.ring, scale_N1, scale_N1.numel(), y,
        k_BTGK, v_BTGK, lent, count,
    )  # fmt: skip
    if pages is not None:
        _give_back(pages, count)
    return y, k_BTGK, v_BTGK, None


def conclude_(
    state: Any,
    at_B: Tensor,
    read: ReadOut,
    noise_BL: Tensor,
    hidden_BLD: Tensor,
    soft_BLD: Tensor,
    embed_VD: Tensor,
    scale: Tensor,
) -> None:
    """See `ops.Ops.conclude_`; the state is a `Canvases`. What is pinned is read as its token, with no entropy."""
    pass_ = at_B, read.sample_BL, read.argmax_BL, noise_BL, read.entropy_BL, hidden_BLD, soft_BLD, embed_VD, scale
    held = [x.contiguous() for x in pass_]  # as long as the call
    held += (
        state.canvas_XL, state.pin_XL, state.argmax_XL, state.still_XL, state.step_X, state.settled_X,
        state.stability_X, state.max_steps_X, state.room_X, state.eos_E, state.entropy_XL, state.entropy_bound_X,
        state.confidence_X, state.accepted_XL, state.is_done_X, state.is_finite_X, state.early_X, state.soft_XLD,
    )  # fmt: skip
    sizes = *hidden_BLD.shape, len(state.step_X), len(state.eos_E), state.has_pins, state.has_early
    pointers = (c_void_p * len(held))(*(x.data_ptr() for x in held))
    _call("sf_conclude", _io(hidden_BLD), pointers, (c_long * len(sizes))(*sizes))


# ---- calls ----------------------------------------------------------------------------------------------------------


@functools.cache
def _words() -> int:
    """Words of a tile of the vocabulary."""
    return int(build.library().sf_words())


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _io(x: Tensor) -> int:
    return _IO[x.dtype]


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return c_void_p(value.data_ptr())
    if isinstance(value, float):
        return c_float(value)
    return c_long(value) if isinstance(value, int) else value


def _given(*weights: Weight | None) -> Any:
    return (_Given * len(weights))(*map(_one_given, weights))


def _one_given(weight: Weight | None) -> _Given:
    if weight is None:
        return _Given()
    if isinstance(weight, Packed):
        return weight.given
    bits, pointers = 4 if weight.kind == "int4" else 8, (weight.data.data_ptr(), weight.scale.data_ptr())
    return _Given(*pointers, _pointer(weight.bias), bits, weight.group, _STORED[weight.scale.dtype])


def _check_alike(gate: Weight, up: Weight) -> None:
    kinds = [(one.kind, one.group if isinstance(one, Quantised) else 0) for one in (gate, up)]
    if kinds[0] != kinds[1]:
        raise InputError(f"gate and up are packed as {kinds[0]} and {kinds[1]}; pack both alike, or choose ops='fused'")


_FUNCTIONS: dict[str, Callable[..., Any]] = {}


def _call(name: str, *arguments: Any) -> None:
    """Call the library; the thread count that torch is set to comes last."""
    function = _FUNCTIONS.get(name)
    if function is None:
        function = _FUNCTIONS[name] = getattr(build.library(), name)
        function.restype = None  # type: ignore[attr-defined]
    function(*map(_argument, arguments), c_int(torch.get_num_threads()))


OPS = Ops(
    "cpu",
    pack,
    linear,
    rms_norm,
    norm_rope,
    norm_add,
    attention,
    feed_forward,
    route,
    experts,
    join,
    read_out,
    soft_embedding,
    settle,
    block,
    conclude_=conclude_,
)
