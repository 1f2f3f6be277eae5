"""How a weight lies for the kernels: which way it is multiplied, and how its x is laid out for that.

Each way is one `Kind`: a name that kernels are compiled for (KIND), and what the host must know about it. A new kind of
weight is an entry of `KINDS`, and its branch in the one loop over K (`product`). What this lacks: int8 by groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
import triton
from torch import Tensor

from sfumato.errors import InputError
from sfumato.ops.contract import Matrix
from sfumato.ops.lowrank import LowRank
from sfumato.ops.packed import BLOCK, CODES, Packed
from sfumato.ops.triton.ahead import POINTERS
from sfumato.ops.triton.tuning import Config, chip, config

BLOCK_ROWS = 64
"""Outputs that share a scale of FP8 by blocks in the kernels: what divides the released model's 704 and 2112."""

# ---- kinds -----------------------------------------------------------------------------------------------------------


def _any_layout(weight: Packed) -> str | None:
    return None


def _one_scale_an_output(weight: Packed) -> str | None:
    if weight.is_grouped or weight.bias is not None:
        return f"one scale an output, not one every {weight.group} inputs"
    return _whole_groups(weight)


def _whole_blocks(weight: Packed) -> str | None:
    outputs = weight.shape[-2]
    if not weight.is_grouped:
        return None
    if weight.group % 32:
        return f"blocks of a multiple of 32 inputs, not of {weight.group}"
    if weight.block_rows < BLOCK_ROWS:
        return f"blocks of {BLOCK_ROWS} outputs or more, not of {weight.block_rows}"
    if len(weight.shape) == 3 and outputs % BLOCK_ROWS:
        return f"stacks whose outputs fill blocks of {BLOCK_ROWS}, not {outputs}"
    return None


def _whole_groups(weight: Packed) -> str | None:
    inputs = weight.shape[-1]
    return f"groups that divide the {inputs} inputs, not groups of {weight.group}" if inputs % weight.group else None


@dataclass(frozen=True)
class Kind:
    """One way in which the kernels multiply."""

    name: str
    """What KIND is in the kernels."""
    layout: str = "plain"
    """How x is stored for it: "plain", in four "classes" (`product.spread`), or in "fp8" with a scale a row."""
    together: int = 1
    """Inputs of which a group must be a multiple."""
    refusal: Callable[[Packed], str | None] = _any_layout
    """What the kernels take in place of such a weight, beside `together`."""
    data: torch.dtype | None = None
    """How the kernels read its codes, where not as they are: what the compiler knows on every device."""
    scale: torch.dtype | None = None
    """How they read its scales, likewise."""
    pointers: tuple[str | None, str, str | None, str | None] = (None, "", None, None)
    """Pointers to what goes with x, to a weight, its scale and what else it has, as `ahead.Special` spells them; ""
    is x's own dtype and None that there is none."""

    @property
    def is_halved(self) -> bool:
        """Two codes a byte, read as words of four."""
        return self.layout == "classes"

    @property
    def has_short_groups(self) -> bool:
        """A step along K holds several of its groups, whatever the step."""
        return self.together >= 16

    @property
    def tiles(self) -> str:
        """The kind whose tile sizes it takes: a bias changes no byte of the codes."""
        return self.name.removesuffix("_bias")


KINDS = {
    kind.name: kind
    for kind in (
        Kind("plain"),
        Kind("int8", refusal=_one_scale_an_output, pointers=(None, "*i8", "*fp32", None)),
        Kind("fp8", "fp8", refusal=_whole_blocks, pointers=("*fp32", "*fp8e4nv", "*fp32", None)),
        # FP8 where the hardware has none: widened to x's dtype, and x stays as it is.
        Kind("fp8_wide", refusal=_whole_blocks, data=torch.uint8, pointers=(None, "*u8", "*fp32", None)),
        Kind("int4", "classes", 4, _whole_groups, torch.int16, pointers=(None, "*i16", "*fp16", None)),
        Kind("int4_bias", "classes", 4, _whole_groups, torch.int16, pointers=("*fp32", "*i16", "*bf16", "*bf16")),
        Kind("nvfp4", "classes", 16, _whole_groups, torch.int16, torch.uint8, (None, "*i16", "*u8", "*fp32")),
        Kind("mxfp4", "classes", 32, _whole_groups, torch.int16, pointers=(None, "*i16", "*u8", None)),
    )
}
"""All of them, by name."""


# ---- weights ---------------------------------------------------------------------------------------------------------


@overload
def pack(weight: Tensor) -> Tensor: ...
@overload
def pack(weight: Packed) -> Packed: ...
@overload
def pack(weight: Matrix) -> Matrix: ...
def pack(weight: Matrix) -> Matrix:
    """A weight [O, I] or a stack [E, O, I], plain, `Packed`, or either with low-rank factors, as kernels take it.

    Factors stay where they are. InputError: codes that no kernel here unpacks."""
    if isinstance(weight, Tensor):
        return weight.contiguous()
    if isinstance(weight, LowRank):
        return replace(weight, base=pack(weight.base), a=weight.a.contiguous(), b=weight.b.contiguous())
    if not isinstance(weight, Packed):
        raise InputError(f'the triton operations cannot take a {type(weight).__name__}; choose ops="fused"')
    if why := refusal(weight):
        raise InputError(
            f"the triton operations cannot take this {weight.kind} weight: they take {why};"
            ' choose ops="fused" or quantize="int4"'
        )
    if weight.kind == "nvfp4" and weight.factor is None:
        weight = replace(weight, factor=torch.ones(weight.shape[:-1], device=weight.device))
    if weight.kind == "fp8" and weight.is_grouped:
        weight = weight.in_blocks_of(BLOCK_ROWS)
    return weight.each(Tensor.contiguous)


def refusal(weight: Packed) -> str | None:
    """What the kernels take in place of such a weight; None where they take it."""
    if weight.kind not in CODES or weight.kind not in KINDS:
        return f"only {', '.join(name for name in CODES if name in KINDS)}"
    kind = KINDS[weight.kind]
    if reason := kind.refusal(weight):
        return reason
    if weight.group % kind.together:
        return f"groups of a multiple of {kind.together} inputs, not of {weight.group}"
    return None


@dataclass(frozen=True, eq=False)
class LaneFactors:
    """What adapters have beside a weight, and which one each token has."""

    a: Tensor
    """[S, R, I], or [S, E, R, I] of a stack."""
    b: Tensor
    """[S, R, O] or [S, E, R, O]."""
    lane_N: Tensor
    """int64, below 0 for none."""

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[-2]


@dataclass(frozen=True, eq=False)
class Form:
    """A weight as the kernels take it: which way it is multiplied, its sizes, its codes and what they are worth."""

    kind: str
    """The name of its `Kind`."""
    outputs: int
    inputs: int
    group: int = 1
    """Inputs that share a scale; 1 where there is one an output."""
    data: Tensor | None = None
    scale: Tensor | None = None
    extra: Tensor | None = None
    """int4_bias: the bias of each group. nvfp4: the factor of each output."""
    beside: LaneFactors | None = None
    """Where tokens of the pass have adapters."""

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """Codes, scales and what else it has, in the order in which kernels take them."""
        return self.data, self.scale, self.extra

    @property
    def launch(self) -> tuple[Any, ...]:
        """Weights for which this is equal may be multiplied by one launch (`are_alike`)."""
        return self.kind, self.group, self.scale is not None and self.scale.dtype

    @property
    def is_halved(self) -> bool:
        """See `Kind.is_halved`."""
        return KINDS[self.kind].is_halved

    @property
    def layout(self) -> tuple[str, int]:
        """How its x is laid out for it, and the group of which x's sums stand beside it."""
        if self.kind == "int4_bias" and self.group & (self.group - 1) == 0:
            return "sums", self.group
        return KINDS[self.kind].layout, 1


def form(weight: Matrix, x: Tensor) -> Form:
    """How this weight is multiplied on x's device. ValueError where x does not fit."""
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x has width {x.shape[-1]} and the weight takes {weight.shape[-1]}")
    outputs, inputs = weight.shape[-2:]
    if isinstance(weight, Tensor):
        if weight.dtype != x.dtype:
            raise ValueError(f"x is {x.dtype} and the weight {weight.dtype}; give both one dtype")
        return Form("plain", outputs, inputs, 1, weight.contiguous())
    if isinstance(weight, LowRank):
        return replace(form(weight.base, x), beside=beside(weight, x.dtype))
    if not isinstance(weight, Packed):
        raise InputError("the triton operations take weights that they have packed; call Model.pack_ first")
    kind = _kind_of(weight, str(x.device))
    data = weight.data if kind.data is None else weight.data.view(kind.data)
    if weight.kind == "fp8" and weight.is_grouped:
        weight = weight.in_blocks_of(BLOCK_ROWS)  # as `pack` has left it
    scale = weight.scale if kind.scale is None else weight.scale.view(kind.scale)
    extra = weight.factor if weight.bias is None else weight.bias
    return Form(kind.name, outputs, inputs, weight.group if weight.is_grouped else 1, data, scale, extra)


def beside(weight: LowRank, dtype: torch.dtype) -> LaneFactors | None:
    """Its factors in this dtype, where a token of the pass may have some."""
    lanes = weight.switch.lanes
    if not lanes.has_any:
        return None
    b = weight.b if weight.scale == 1.0 else weight.b * weight.scale
    return LaneFactors(weight.a.to(dtype).contiguous(), b.to(dtype).contiguous(), lanes.lane_N)


def are_alike(forms: Sequence[Form]) -> bool:
    """Whether one launch takes all of these weights, with what lies beside them."""
    ranks = {one.beside.rank for one in forms if one.beside is not None}
    return len({one.launch for one in forms}) == 1 and len(ranks) <= 1


def _kind_of(weight: Packed, device: str) -> Kind:
    if weight.kind == "fp8" and not has_fp8(device):
        return KINDS["fp8_wide"]
    return KINDS[weight.kind if weight.bias is None else f"{weight.kind}_bias"]


def has_fp8(device: str) -> bool:
    """Whether this device multiplies float8_e4m3fn: from sm_89 on; and the interpreter does."""
    return chip(device)[1] >= 89


def has_tensor_memory(device: torch.device | str) -> bool:
    """Whether the tensor cores' sums lie in a memory of their own."""
    return 100 <= chip(str(device))[1] < 110


# ---- launches --------------------------------------------------------------------------------------------------------


def blocks(
    op: str,
    shape: Sequence[int],
    weight: Form,
    dtype: torch.dtype | str,
    device: torch.device | str,
    defaults: dict[str, dict[str, Config]],
) -> tuple[dict[str, Any], dict[str, int]]:
    """Tile sizes that fit this weight, and how the kernel is launched."""
    short = str(dtype).removeprefix("torch.")
    kind = KINDS[weight.kind].tiles
    default = defaults[op]["float32" if short == "float32" and kind != "fp8" else kind]
    small = {**default, "num_stages": min(default["num_stages"], 3)}
    named = short if kind == "plain" else f"{kind} {short}"
    chosen = config(op, shape, named, device, default, small)
    tiles = {name: value for name, value in chosen.items() if name.startswith("BLOCK_")}
    least = 64 if weight.is_halved else 32  # a product of the tensor cores takes 16 inputs, of one class each
    tiles["BLOCK_K"] = max(least, min(tiles["BLOCK_K"], triton.next_power_of_2(weight.inputs)))
    share = weight.group & -weight.group  # the largest power of two in it
    if not KINDS[weight.kind].has_short_groups and share >= least:
        tiles["BLOCK_K"] = min(tiles["BLOCK_K"], share)  # one scale for the whole step
    return tiles, {name: chosen[name] for name in ("num_warps", "num_stages")}


def dense_specials(arch: int) -> list[tuple[str, Form, str]]:
    """What is compiled ahead: (name, a form of no size, dtype of x)."""
    kinds = [("bfloat16", "plain", 1), ("fp8", "fp8" if arch >= 89 else "fp8_wide", 1), ("int8", "int8", 1)]
    kinds += [("int4", "int4", 64), ("int4 bias", "int4_bias", 64), ("nvfp4", "nvfp4", 16)]
    specials = [(name, Form(kind, 0, 0, group), "bfloat16") for name, kind, group in kinds]
    if arch == 90:
        specials += [("float32", Form("plain", 0, 0), "float32"), ("int4 float16", Form("int4", 0, 0, 64), "float16")]
        specials += [("fp8 block", Form("fp8", 0, 0, BLOCK), "bfloat16")]
        specials += [("mxfp4", Form("mxfp4", 0, 0, 32), "bfloat16")]
    return specials


def operand_types(kind: str, dtype: str) -> dict[str, str | None]:
    """Pointers, as Special spells them, of x and of the other operands of this kind; None where there is none.

    By the names x, x_extra (what goes with x), w, scale, extra (what else a weight has)."""
    x_extra, weight, scale, extra = KINDS[kind].pointers
    x = "*fp8e4nv" if KINDS[kind].layout == "fp8" else POINTERS[dtype]
    return {"x": x, "x_extra": x_extra, "w": weight or x, "scale": scale, "extra": extra}
